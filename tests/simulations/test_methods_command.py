"""`fedlr methods` prints what was measured, docs/methods.md says the same, and the measurement can tell methods apart.

Mutants this file kills: the methods of `MUTANTS`, each a known mistake put into a method that is right; a line of the
table of docs/methods.md that was not changed with the code; a method without a line or a section; a table wider than
the terminal.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.adapters.state import LORA_B, AdapterState, ClientUpdate, LoraFactors
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.method import Always, full_adapter
from fedlr.simulations import methods_command
from fedlr.simulations.method_properties import (
    LAYERS,
    NUM_CLIENTS,
    RANK,
    MadeUpClients,
    formula,
    measured,
    message_sizes,
    named_method,
    properties_of,
)
from fedlr.simulations.methods_command import HEADER, fitted, methods, names, row

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
NAMES = sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))


def documented() -> dict[str, list[str]]:
    """The cells of the table of methods by name, from "trains" to "also"."""
    (header,) = (line for line in DOCUMENT.splitlines() if line.startswith("| method |"))
    table = DOCUMENT[DOCUMENT.index(header) :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {cells[0].strip("`"): cells[1 : len(HEADER)] for cells in rows}


def same(told: str, seen: str) -> bool:
    """A cell may go on after what was measured: `biased, on purpose`."""
    return told == seen or told.startswith((f"{seen},", f"{seen}:"))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_the_document_says_what_is_measured(name: str) -> None:
    told, seen = documented()[name], row(properties_of(name))[1:]
    aggregate = HEADER.index("aggregate") - 1
    assert same(told[aggregate], seen[aggregate]), f"{name}: {seen}"
    assert told[:aggregate] + told[aggregate + 1 :] == [*seen[:aggregate], *seen[aggregate + 1 :]], f"{name}: {seen}"


def test_the_document_has_a_line_and_a_section_for_every_method_and_for_no_other() -> None:
    assert sorted(documented()) == NAMES == names()
    headings = re.findall(r"^### .*?\((.*)\)$", DOCUMENT, flags=re.MULTILINE)
    assert sorted(name for heading in headings for name in re.findall(r"`(\w+)`", heading)) == NAMES


def test_exact_methods_end_at_rounding_and_biased_ones_far_from_it() -> None:
    """Nothing is near the limit between the two, so no other machine's rounding moves a method across."""
    seen = [properties_of(name) for name in NAMES]
    assert max(max(one.aggregate_error, one.final_error) for one in seen if one.aggregate == "exact") < 1e-6
    assert min(one.final_error for one in seen if one.aggregate == "biased") > 0.01
    assert {one.aggregate for one in seen} == {"exact", "biased", "personal"}


@pytest.mark.parametrize("name", NAMES)
def test_properties_are_the_same_in_every_measurement(name: str) -> None:
    first, second = (measured(named_method(name), num_rounds=2) for _ in range(2))
    assert first == second
    assert [a.fingerprint() for a in first.adapters] == [a.fingerprint() for a in second.adapters]


def unweighted(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    return weighted_mean(adapter, (replace(update, weight=1.0) for update in updates))


def squared_weights(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
    return weighted_mean(adapter, (replace(update, weight=update.weight**2) for update in updates))


def shrunk(adapter: AdapterState) -> AdapterState:
    layers = adapter.factors().items()
    return adapter.with_factors({path: LoraFactors(one.lora_A, 0.999 * one.lora_B) for path, one in layers})


def lost_side(adapter: AdapterState) -> AdapterState:
    return replace(adapter, side={})


# A right method, a mistake in it, the property that shows the mistake, and what the property becomes.
MUTANTS = {
    "weights are ignored": ("ffa_lora", {"aggregate": unweighted}, "aggregate", "biased"),
    "weights are squared": ("ffa_lora", {"aggregate": squared_weights}, "aggregate", "biased"),
    "the finaliser loses something": ("fedsvd", {"finalise": shrunk}, "aggregate", "biased"),
    "what was folded is forgotten": ("flora", {"finalise": lost_side}, "aggregate", "biased"),
    "both factors train": ("ffa_lora", {"block_schedule": Always(["lora_A", LORA_B])}, "aggregate", "biased"),
    "and both are noised": ("ffa_lora", {"block_schedule": Always(["lora_A", LORA_B])}, "noised", "A and B"),
    "and both go up": ("ffa_lora", {"block_schedule": Always(["lora_A", LORA_B])}, "up", "R (D + K)"),
    "the frozen factor is sent": ("ffa_lora", {"broadcast": full_adapter}, "down", "R (D + K)"),
    "the alternation is lost": ("la_lora", {"client": ClientRule()}, "noised", "A and B"),
    "nothing stays with the client": ("fedsa_lora", {"personal": ()}, "up", "R (D + K)"),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_a_method_shows_in_its_properties(mistake: str) -> None:
    name, changed, key, expected = MUTANTS[mistake]
    mutant = measured(replace(named_method(name), **changed), num_rounds=3)
    assert getattr(mutant, key) == expected != getattr(properties_of(name), key)


def test_made_up_clients_differ_from_each_other_and_from_round_to_round() -> None:
    updates = [update for asked in properties_of("ffa_lora").updates for update in asked]
    assert len({AdapterState(update.tensors, 1.0).fingerprint() for update in updates}) == len(updates)
    assert len({update.weight for update in updates}) == NUM_CLIENTS


def test_an_error_that_unlike_weights_do_not_explain_is_not_swallowed() -> None:
    def refuse(adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        raise InputError(f"Expected nobody, got {len(list(updates))} clients")

    with pytest.raises(InputError, match="got 3 clients"):
        measured(replace(named_method("ffa_lora"), aggregate=refuse))


def test_no_two_formulas_agree_in_any_layer() -> None:
    for out_features, in_features in LAYERS.values():
        values = list(message_sizes(out_features, in_features).values())
        assert len(set(values)) == len(values)
        assert out_features > NUM_CLIENTS * RANK and in_features > NUM_CLIENTS * RANK


def test_a_message_that_fits_no_formula_is_a_number() -> None:
    adapter = MadeUpClients().adapter
    odd = [(slot, tensor[:1]) for slot, tensor in adapter.tensors.items() if slot.role == LORA_B]
    assert formula([odd]) == "4 at 41 x 53 or 4 at 59 x 61 or 4 at 67 x 43"
    assert formula([adapter.tensors.items(), odd[:0]]) == "0 or R (D + K)"
    twice = [*adapter.tensors.items(), *adapter.select(frozenset({LORA_B})).items()]
    assert formula([twice]) == "2 R D + R K"


def test_the_command_lists_every_method_on_as_many_columns_as_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (60, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert methods([]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        if width == 200:
            assert [line.split()[0] for line in lines[1 : 1 + len(NAMES)]] == NAMES
            assert lines[0].split("  ")[0] == "method"


def test_the_command_describes_a_method_from_its_file_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods(["scaffold", "flora"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in ("scaffold", "flora"):
        header = (ROOT / "configs" / "method" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:3]
        assert all(" ".join(line.removeprefix("# ").split()) in out for line in header)
    assert re.search(r"ScaffoldServer\(lr=[\d.]+, num_steps=3, num_clients=12\): Average what the clients trained", out)
    assert "Always(roles=['lora_A', 'lora_B'])" in out and "server memory control" in out
    assert "columns folded 0, 12, 24, 36" in out


def test_an_unknown_method_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods(["fedsdv"]) == 2
    assert "Expected fedsvd, got 'fedsdv'" in capsys.readouterr().err


def test_help_is_the_docstring_and_measures_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_command, "names", lambda: pytest.fail("measured"))
    assert methods(["--help"]) == 0
    assert "fedlr methods [NAME ...]" in capsys.readouterr().out


def test_a_table_is_wrapped_to_the_width_and_loses_no_word() -> None:
    rows = [("a", "what it is"), ("one", "some words more than fit"), ("two", "unbreakable" * 3)]
    text = fitted(rows, 20)
    assert max(map(len, text.splitlines())) <= 20
    assert sorted("".join(text.split())) == sorted("".join(word for cells in rows for word in " ".join(cells).split()))
    assert {word for cells in rows[:2] for word in " ".join(cells).split()} <= set(text.split())
