"""Starts that the server makes: the base's function at first, the same adapter everywhere, nobody's private rows.

Mutants this file kills: a side that is forgotten, in the model, the export, a checkpoint or a message; a start that a
device computes itself; a private file taken for public under another name; a statement that does not name the table.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from fedlr.adapters.state import SHIPPED, AdapterState, ClientUpdate, num_bytes, side_tensors
from fedlr.config.build import build
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.models.adapter_config import FROM_LABELS, FROM_PUBLIC, MADE_BY_THE_SERVER, WITH_SIDE
from fedlr.models.base_delta import SideWeights
from fedlr.models.peft_state import read_adapter, write_adapter
from fedlr.models.tuners.attach import NOT_IN_RUNS, run_tuner
from fedlr.privacy.statement import recompute
from fedlr.rounds.pools.local import sharing_base
from fedlr.rounds.round import ServerState, request_of
from fedlr.runs.checkpoint import latest_checkpoint, save_checkpoint
from fedlr.runs.directory import CHECKPOINTS
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.resume import resume
from fedlr.simulations.runtime import make_pool
from fedlr.simulations.simulate import simulate
from fedlr.tasks.probe import probe_inputs
from fedlr.tasks.synthetic import VOCABULARY
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, federation, leave_state_behind, lines, rounds

XS = ("adapter=lora_xs", "method=fedavg", "trainer.engine=opacus")
KEEPS_THE_FUNCTION = [name for name in MADE_BY_THE_SERVER if name != "lora_sb"]
TABLE: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A public table of made-up words that nobody trains on."""
    path = tmp_path_factory.mktemp("public") / "public.csv"
    rows = [f"{' '.join(VOCABULARY[k : k + 3 + k % 7])},{('no', 'yes')[k % 2]}" for k in range(60)]
    path.write_text("\n".join(["words,opinion", *rows]) + "\n", encoding="utf-8")
    TABLE[:] = [path]
    yield path


def words(start: str, *more: str) -> tuple[str, ...]:
    """Return the overrides of a run from this start."""
    given = [f"adapter.init_lora_weights={start}", *(XS if start == "lora_sb" else ())]
    if start in FROM_PUBLIC:
        labels = ", label_column: opinion, labels: ['no', 'yes']" if start in FROM_LABELS else ""
        given.append(f"adapter.public={{path: {TABLE[0]}, text_column: words, num_examples: 40{labels}}}")
    return (*given, *more)


def logits_at(f: Federation, adapter: AdapterState) -> Tensor:
    """What the federation's model says with an adapter and its side."""
    model = sharing_base(f.model)
    side = SideWeights(model)
    write_adapter(model, adapter.tensors)
    side.merge(adapter)
    with torch.no_grad():
        logits: Tensor = model.eval()(**probe_inputs(model)).logits
    side.merge(replace(adapter, side={}))
    return logits


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("method", ["ffa_lora", "fedsvd", "fedit", "flora", "renewal", "fedask"])
@pytest.mark.parametrize("start", KEEPS_THE_FUNCTION)
def test_the_function_at_the_start_is_the_bases(start: str, method: str) -> None:
    f = federation(*words(start, f"method={method}"))
    plain = federation()
    expected = logits_at(plain, plain.start.adapter)
    assert distance(logits_at(f, f.start.adapter), expected) < 1e-5
    assert f.base.fingerprint == plain.base.fingerprint
    assert f.start.adapter.tensors.keys() == plain.start.adapter.tensors.keys()
    assert f.start.adapter.fingerprint() != plain.start.adapter.fingerprint()
    if start in WITH_SIDE:
        forgotten = replace(f.start.adapter, side={})
        assert distance(logits_at(f, forgotten), expected) > 1e-3, "a mutant without the side is another function"


def test_lora_sb_starts_a_step_away_on_purpose() -> None:
    f, plain = federation(*words("lora_sb")), federation(*XS)
    expected = logits_at(plain, plain.start.adapter)
    assert distance(logits_at(f, f.start.adapter), expected) > 1e-5
    shipped = f.start.adapter.select(frozenset({SHIPPED}))
    assert shipped.keys() == plain.start.adapter.select(frozenset({SHIPPED})).keys()
    for slot, tensor in shipped.items():
        rows = tensor if "_A_" in slot.path else tensor.T
        torch.testing.assert_close(rows @ rows.T, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", MADE_BY_THE_SERVER)
def test_a_private_run_completes_and_its_export_opens_on_the_plain_base(start: str, tmp_path: Path) -> None:
    overrides = words(start, "privacy=dp")
    run = simulate(experiment(*overrides, f"tracking.output_dir={tmp_path}"), say=lambda line: None)
    f = federation(*overrides)
    state = latest_checkpoint(run / CHECKPOINTS, say=print)
    assert state is not None and state.state.adapter.side.keys() == f.start.adapter.side.keys()
    base = build(f.experiment.model.section(), "model", label_names=f.label_names, seed=f.seed).network
    opened = PeftModel.from_pretrained(base, str(run / "adapter"))
    with torch.no_grad():
        there = opened.eval()(**probe_inputs(opened)).logits
    assert distance(there, logits_at(f, state.state.adapter)) < 1e-5
    assert distance(there, logits_at(f, f.start.adapter)) > 1e-5, "training has moved the logits"
    statement = recompute(run)
    assert (str(TABLE[0]) in statement.get("start", "")) == (start in FROM_PUBLIC)
    assert ("SHA-256" in statement.get("start", "")) == (start in FROM_PUBLIC)


def test_a_side_goes_down_every_round_and_is_counted(tmp_path: Path) -> None:
    def bytes_down(*overrides: str) -> int:
        _, metrics, _ = rounds(federation(*overrides, "method=ffa_lora"), tmp_path / "_".join(overrides)[-8:])
        assert len({row["bytes_down"] for row in metrics[1:]}) == 1
        return int(metrics[1]["bytes_down"])

    f = federation(*words("pissa", "method=ffa_lora"))
    side = num_bytes(side_tensors(f.start.adapter.side).values())
    assert side == 4 * 4 * 4 * (32 + 32)
    assert bytes_down(*words("pissa")) == bytes_down("adapter.init_lora_weights=true") + 3 * side


@pytest.mark.parametrize("start", ["pissa", "lora_ga"])
def test_runs_repeat_to_the_bit_whatever_the_number_of_workers(start: str, tmp_path: Path) -> None:
    def play(folder: str, *more: str) -> Any:
        with torch_threads(1):
            f = assemble(experiment(*words(start, *more)), seed=0)
        return rounds(f, tmp_path / folder)

    first = play("one")
    assert first == play("again")
    assert first[0] == play("threads", "runtime.num_workers=2")[0]


def test_another_seed_draws_other_public_rows() -> None:
    one, other = (federation(*words("eva"), seed=seed).start.adapter for seed in (0, 1))
    assert one.fingerprint() != other.fingerprint()


def test_a_checkpoint_holds_the_side(tmp_path: Path) -> None:
    start = federation(*words("pissa")).start
    save_checkpoint(tmp_path, start, {})
    found = latest_checkpoint(tmp_path, say=print)
    assert found is not None and found.state.adapter.fingerprint() == start.adapter.fingerprint()
    assert start.adapter.fingerprint() != replace(start.adapter, side={}).fingerprint()


def test_a_run_does_not_go_on_from_another_table(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    shutil.copy(TABLE[0], table)
    given = ["adapter.init_lora_weights=eva", f"adapter.public={{path: {table}, text_column: words, num_examples: 20}}"]
    run = simulate(experiment(*given, f"tracking.output_dir={tmp_path}"), say=lambda line: None)
    (run / "summary.json").unlink()
    table.write_text("\n".join(sorted(table.read_text(encoding="utf-8").splitlines(), reverse=True)), encoding="utf-8")
    with pytest.raises(InputError, match="the adapter that the run began with"):
        resume(run, say=lambda line: None)
    shutil.copy(TABLE[0], table)
    resume(run, say=lambda line: None)
    assert (run / "summary.json").exists()


def test_behind_a_cached_prefix_clients_train_to_the_same_values() -> None:
    def trained(*more: str) -> Any:
        f = federation(*words("pissa", "adapter.layers=[1]", "privacy=none", *more))
        with torch_threads(1), closing(make_pool(f, None)) as pool:
            (update,) = pool.train(f.request(), [0])
        return update

    whole, upper = trained(), trained("runtime.cache_prefix=true")
    for slot, tensor in whole.tensors.items():
        torch.testing.assert_close(upper.tensors[slot], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "renewal"])
def test_a_method_that_folds_goes_on_from_the_side_of_the_start(method: str) -> None:
    """A round in which nobody moved leaves the base's function, however the side is grown."""
    f = federation(*words("pissa", f"method={method}"))
    state = f.start
    for number in range(2):
        task = request_of(state, f.method)
        sent = dict(state.adapter.select(task.shared))
        updates = [ClientUpdate(client, sent, 1.0, number) for client in range(3)]
        state = ServerState(f.method.finalise(f.method.aggregate(state.adapter, updates)), number + 1)
    assert distance(logits_at(f, state.adapter), logits_at(f, f.start.adapter)) < 1e-5
    grown = any(len(side.lora_A) > 4 for side in state.adapter.side.values())
    assert grown == (method != "fedex_lora"), "FedEx adds the bias of a mean, and here there is none"


@pytest.mark.parametrize("method", ["drop_lora", "dylora", "rank_budget", "rank_energy", "selective_layers", "hetlora"])
def test_a_method_that_would_cut_what_a_start_took_out_of_the_base_is_refused(method: str) -> None:
    with pytest.raises(InputError, match=f"init_lora_weights=true or principal for method={method}, got pissa"):
        federation(*words("pissa", f"method={method}"))
    if method == "hetlora":
        assert federation(*words("pissa", "method=hetlora", "method.aggregate.keep=1")).start.adapter.side


@pytest.mark.parametrize("start", MADE_BY_THE_SERVER)
def test_terms_ask_no_device_for_a_start(start: str) -> None:
    e = experiment(*words(start))
    more: dict[str, Any] = {"experiment_id": "0" * 32, "seed": 0, "model_sha256": "0" * 64, "label_names": ["a", "b"]}
    terms = Terms.of(e, None, **more)
    assert terms.adapter.init_lora_weights is True and terms.adapter.public is None
    assert Terms.read(terms.text()) == terms
    hostile = json.loads(terms.text())
    hostile["adapter"] |= {"init_lora_weights": start, "public": None}
    with pytest.raises(InputError, match="an adapter that a device can build"):
        Terms.read(json.dumps(hostile))
    hostile["adapter"] |= {"init_lora_weights": True, "public": {"path": "/etc/passwd"}}
    with pytest.raises(InputError, match="an adapter that a device can build"):
        Terms.read(json.dumps(hostile))


def private(path: Path) -> tuple[str, ...]:
    columns = ("data.text_column=words", "data.label_column=opinion", "data.labels=['no','yes']", "data.num_test=10")
    return ("experiment=tiny", "data=table", f"data.path={path}", *columns, "data.max_length=32", "data.public=true")


def test_the_private_file_is_no_public_table(tmp_path: Path) -> None:
    link, copy = tmp_path / "link.csv", tmp_path / "copy.csv"
    link.symlink_to(TABLE[0])
    shutil.copy(TABLE[0], copy)
    for path in (TABLE[0], link):
        with pytest.raises(InputError, match=r"public\.path to be another table than data\.path"):
            compose_experiment([*private(path), *words("eva")])
    e = compose_experiment([*private(copy), *words("eva"), "privacy=none"])
    with pytest.raises(InputError, match="the same file as .* without noise, outside every ledger"):
        assemble(e, seed=0)
    header, *rows = TABLE[0].read_text(encoding="utf-8").splitlines()
    copy.write_text("\n".join([header, "nobody wrote this,no", *rows]), encoding="utf-8")
    with pytest.raises(InputError, match="without a text of the clients', got 60 of theirs"):
        assemble(e, seed=0)
    copy.write_text("\n".join([header, *(f"other {row}" for row in rows)]), encoding="utf-8")
    assert assemble(e, seed=0).origin, "whose rows another table holds is the user's word"


REFUSED = {
    r"adapter\.public=\{path: FILE\} for adapter\.init_lora_weights=eva": ["adapter.init_lora_weights=eva"],
    r"adapter\.public=null for adapter\.init_lora_weights=pissa": [
        "adapter.init_lora_weights=pissa",
        "adapter.public={path: x.csv}",
    ],
    r"adapter\.public\.labels for adapter\.init_lora_weights=lora_ga": [
        "adapter.init_lora_weights=lora_ga",
        "adapter.public={path: x.csv}",
    ],
    "adapter=lora_xs for adapter.init_lora_weights=lora_sb": [
        "adapter.init_lora_weights=lora_sb",
        "adapter.public={path: x.csv, labels: [a, b]}",
    ],
    r"adapter\.public\.num_examples to be .* 4096": [
        "adapter.init_lora_weights=eva",
        "adapter.public={path: x.csv, num_examples: 5000}",
    ],
    r"runtime\.base_dtype=float32 for adapter\.init_lora_weights=olora": [
        "adapter.init_lora_weights=olora",
        "runtime.base_dtype=bfloat16",
    ],
    r"adapter\.client_ranks=null for adapter\.init_lora_weights=pissa": [
        "adapter.init_lora_weights=pissa",
        "adapter.client_ranks=[2,4]",
        "method=flexlora",
    ],
    r"adapter\.client_memory_mb=null for adapter\.init_lora_weights=pissa": [
        "adapter.init_lora_weights=pissa",
        "adapter.client_memory_mb=[1]",
        "method=flexlora",
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_start_that_cannot_be_is_refused_by_key(message: str) -> None:
    with pytest.raises(InputError, match=message):
        experiment(*REFUSED[message])


def test_tables_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    numbers = tmp_path / "empty.csv"
    numbers.write_text("words,opinion\n,yes\nfine,no\n", encoding="utf-8")
    refused = {
        f"{{path: {tmp_path}/none.csv}}": "a .csv, .tsv, .jsonl, .json, .parquet file",
        f"{{path: {TABLE[0]}}}": "no column 'text'",
        f"{{path: {numbers}, text_column: words}}": "row 2: the text is empty",
        f"{{path: {TABLE[0]}, text_column: words, labels: [a, b, c]}}": "Expected 2 adapter.public.labels",
    }
    for table, message in refused.items():
        with pytest.raises(InputError, match=message):
            assemble(experiment("adapter.init_lora_weights=eva", f"adapter.public={table}"), seed=0)


@pytest.mark.parametrize("system", ["eva", "corda", "lora_ga", "pissa", "olora"])
def test_the_system_of_a_start_tells_the_key_to_set(system: str) -> None:
    with pytest.raises(InputError, match=f"set adapter=lora adapter.init_lora_weights={system}"):
        run_tuner(system)
    assert NOT_IN_RUNS[system].startswith("it is LoRA with another start")


def test_randomness_of_the_operating_system_starts_as_well(tmp_path: Path) -> None:
    overrides = words("eva", "privacy.randomness=os", "seed=null", f"tracking.output_dir={tmp_path}")
    run = simulate(experiment(*overrides), say=lambda line: None)
    assert len(lines(run / "metrics.jsonl")) == 3
    assert "public.csv" in (run / "adapter" / "README.md").read_text(encoding="utf-8")


def test_leaving_behind_folds_the_side_into_further_ranks(tmp_path: Path) -> None:
    f = federation(*words("pissa", "privacy=none"))
    state = ServerState(f.start.adapter)
    leave_state_behind(f, tmp_path, state)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(config["rank_pattern"].values()) == {8}
    assert read_adapter(sharing_base(f.model)).side == {}
