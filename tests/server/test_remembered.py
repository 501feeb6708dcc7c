"""What a device said stands over all runs of a server, is told back to it, and is signed (R-L5, R-L6, R-L8).

Mutants killed: memory that ends with a run, that a later run lowers, or that takes a reply sent again for an old one;
an echo of nothing, or of an older head than is known; a signature of anything, of another word, or of any key;
a verify that lets less be stated than was signed, a smaller delta, words of another run or of an earlier round, another
row of a ledger, or any sentence; heads of two runs in the order in which they were written.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import fedlr.flower.signed
import fedlr.server.remembered
import fedlr.server.reports
import fedlr.simulations.signatures
from fedlr.errors import InputError
from fedlr.flower.messages import LedgerEcho, ReplyFacts
from fedlr.flower.node_key import create_node_key, load_node_key
from fedlr.flower.signed import sign
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.reported import reported_statement
from fedlr.server.remembered import Remembered
from fedlr.server.reports import Reports
from tests.server.small_federation import TERMS
from tests.server.whole_federation import experiment
from tests.training.small_models import mutant

HEADS = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]


def said(epsilon: float, head: str, **changes: object) -> ReplyFacts:
    facts = {"experiment_id": TERMS.experiment_id, "client_id": 2, "round_index": 0, "task_sha256": "0" * 64}
    return ReplyFacts(**{**facts, "refused": None, "epsilon": epsilon, "delta": 1e-5, "ledger_head": head, **changes})  # type: ignore[arg-type]


def a_run(roster: Path, *words: tuple[float, str, str], module: object = fedlr.server.reports) -> list[str | None]:
    """Return what a run that hears these words refuses, beginning with what the runs before it left."""
    reports = module.Reports(remembered=Remembered.beside(roster))  # type: ignore[attr-defined]
    found = [reports.hear(2, said(epsilon, head), task) for epsilon, head, task in words]
    reports.remember()
    return found


def a_word_outlives_its_run(roster: Path, module: object = fedlr.server.reports) -> None:
    assert a_run(roster, (3.0, HEADS[0], "1" * 64), (5.0, HEADS[1], "2" * 64), module=module) == [None, None]
    assert a_run(roster, (1.0, HEADS[2], "3" * 64), module=module) == ["epsilon_fell"], "the ledger is new"
    assert a_run(roster, (5.0, HEADS[0], "3" * 64), module=module) == ["old_ledger"], "it was put back"
    assert a_run(roster, (5.0, HEADS[1], "2" * 64), module=module) == [None], "sent again to a server that was killed"
    for_another = (5.0, HEADS[1], "3" * 64), (5.0, HEADS[1], "4" * 64)
    assert a_run(roster, *for_another, module=module) == [None, "old_ledger"], "sent again after another run, once"
    assert a_run(roster, (4.0, HEADS[1], "3" * 64), module=module) == ["epsilon_fell"]
    assert a_run(roster, (6.0, HEADS[3], "4" * 64), module=module) == [None]
    echo = module.Reports(remembered=Remembered.beside(roster)).echo(2)  # type: ignore[attr-defined]
    assert echo == LedgerEcho(6.0, HEADS[3])


def test_a_word_outlives_the_run_that_heard_it(tmp_path: Path) -> None:
    a_word_outlives_its_run(tmp_path / "roster.json")


@pytest.mark.parametrize(
    "change",
    [
        (
            "max(self.epsilon.get(client, 0.0), known.epsilon)\n        self.epsilon[client]",
            "self.epsilon.get(client, 0.0)\n        self.epsilon[client]",
        ),
        ("if facts.ledger_head in known.heads[:-1]:", "if False:"),
        ("if facts.ledger_head in known.heads[:-1]:", "if facts.ledger_head in known.heads:"),
        ("heads.append(facts.ledger_head)\n        self", "self"),
        ("LedgerEcho(epsilon, newest[-1])", "LedgerEcho(epsilon, newest[0])"),
        ("return LedgerEcho(epsilon, newest[-1]) if newest else None", "return None"),
        ("self.remembered.keep(", "dict("),
    ],
    ids=["own words", "any head", "nothing twice", "any number of times", "the oldest head", "no echo", "nothing kept"],
)
def test_a_memory_that_forgets_is_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        a_word_outlives_its_run(tmp_path / "roster.json", mutant(fedlr.server.reports, change))


def test_two_runs_beside_each_other_lower_nothing(tmp_path: Path) -> None:
    one, other = (Reports(remembered=Remembered.beside(tmp_path / "roster.json")) for _ in range(2))
    for reports, epsilon, head in ((one, 5.0, HEADS[0]), (other, 2.0, HEADS[1])):
        assert reports.hear(2, said(epsilon, head), "1" * 64) is None
        reports.remember()
    known = Remembered.beside(tmp_path / "roster.json").of(2)
    assert (known.epsilon, known.heads) == (5.0, (HEADS[1], HEADS[0])), "in the order of what was spent"
    one.remember()  # with nothing new, it puts no head of its own behind the other's
    assert Remembered.beside(tmp_path / "roster.json").of(2).heads == (HEADS[1], HEADS[0])


def heads_keep_their_order(roster: Path, module: Any = fedlr.server.remembered) -> None:
    """Two runs hear a device at the same moment, the one that heard it last writes first; then both are killed."""
    known = [module.Remembered.beside(roster) for _ in range(2)]
    for remembered, spent, head in ((known[0], 1.0, HEADS[0]), (known[1], 3.0, HEADS[2]), (known[0], 2.0, HEADS[1])):
        remembered.keep({2: module.Known(epsilon=spent, heads=(head,), spent=(spent,))})
    assert module.Remembered.beside(roster).of(2).heads == tuple(HEADS[:3])
    reports = Reports(remembered=module.Remembered.beside(roster))
    assert reports.echo(2) == LedgerEcho(3.0, HEADS[2])
    assert reports.hear(2, said(3.0, HEADS[2]), "1" * 64) is None, "sent again"
    known[0].keep({2: module.Known(epsilon=3.0, heads=(HEADS[3],), spent=(2.9999,))})  # its grid rounds the other way
    assert module.Remembered.beside(roster).of(2).heads[-1] == HEADS[3], "it follows what its run has seen"


def test_heads_that_are_written_in_another_order_than_they_were_heard_keep_theirs(tmp_path: Path) -> None:
    heads_keep_their_order(tmp_path / "roster.json")


@pytest.mark.parametrize(
    "change",
    [
        ("(added if added[0][1] < there[0][1] else there).pop(0)", "there.pop(0)"),
        ("seen = frozenset(self.of(client).heads)", "seen = frozenset()"),
        ("self.clients = clients", "pass"),
    ],
    ids=["as it comes", "by epsilon alone", "sees nothing"],
)
def test_another_order_of_heads_is_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        heads_keep_their_order(tmp_path / "roster.json", mutant(fedlr.server.remembered, change))


def test_a_file_from_before_epsilons_were_kept_is_read(tmp_path: Path) -> None:
    (tmp_path / fedlr.server.remembered.NAME).write_text(
        json.dumps({"clients": {"2": {"epsilon": 2.0, "heads": HEADS[:2]}}})
    )
    assert a_run(tmp_path / "roster.json", (2.5, HEADS[2], "1" * 64)) == [None]
    assert Remembered.beside(tmp_path / "roster.json").of(2).rows() == [
        (HEADS[0], 0.0),
        (HEADS[1], 0.0),
        (HEADS[2], 2.5),
    ]


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_newest_head_is_told_back_where_the_file_keeps_fewer_than_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    monkeypatch.setattr(fedlr.server.remembered, "MOST_HEADS", 2)
    reports = Reports(remembered=Remembered.beside(tmp_path / "roster.json"))
    for epsilon, head in enumerate(HEADS, 1):
        assert reports.hear(2, said(float(epsilon), head), head) is None
        assert reports.echo(2) == LedgerEcho(float(epsilon), head)
        reports.remember()
        if is_killed:
            reports = Reports.of(reports.facts())
            reports.remembered = Remembered.beside(tmp_path / "roster.json")
        assert reports.echo(2) == LedgerEcho(float(epsilon), head)
    assert Remembered.beside(tmp_path / "roster.json").of(2).heads == tuple(HEADS[2:])


def test_a_memory_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / fedlr.server.remembered.NAME).write_text('{"clients": {"2": {"epsilon": -1.0}}}')
    with pytest.raises(InputError, match=r"ledgers\.json"):
        Remembered.beside(tmp_path / "roster.json")


def test_a_folder_that_cannot_be_written_is_named_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = experiment(f"deployment.roster={tmp_path}/roster.json").deployment
    Remembered.of_server(beside).require_writable()
    assert not (tmp_path / fedlr.server.remembered.NAME).exists(), "an empty one would be taken for a kept one"
    told = Remembered.of_server(beside.model_copy(update={"ledgers": f"{tmp_path}/state/known.json"}))
    assert told.path == tmp_path / "state" / "known.json"

    def is_read_only(*args: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch, pytest.raises(InputError, match=rf"got {tmp_path}: .*set deployment\.ledgers"):
        patch.setattr(os, "open", is_read_only)
        Remembered.of_server(beside).require_writable()
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(InputError, match=rf"got {tmp_path}: it is not writable; set deployment\.ledgers"):
        Remembered.of_server(beside).require_writable()


def test_nothing_is_kept_of_a_simulation(tmp_path: Path) -> None:
    reports = Reports()
    assert reports.hear(2, said(1.0, HEADS[0]), "1" * 64) is None
    reports.remember()
    assert not list(tmp_path.iterdir())


def keys(folder: Path, name: str) -> tuple[Path, str]:
    return folder / name, create_node_key(folder / name).read_text()


def signatures_hold(folder: Path, module: object = fedlr.server.reports) -> None:
    """Raise AssertionError unless only the client's own signature of its very word counts."""
    path, line = keys(folder, "own")
    other, _ = keys(folder, "other")
    facts = said(2.0, HEADS[0])
    own = facts.model_copy(update={"signature": sign(facts.model_dump(), load_node_key(path))})
    foreign = facts.model_copy(update={"signature": sign(facts.model_dump(), load_node_key(other))})
    moved = own.model_copy(update={"epsilon": 1.0})
    found = {
        name: module.Reports().hear(2, word, "1" * 64, public_key=line)  # type: ignore[attr-defined]
        for name, word in {"own": own, "foreign": foreign, "moved": moved, "none": facts}.items()
    }
    assert found == {"own": None, "foreign": "bad_signature", "moved": "bad_signature", "none": None}
    reports = module.Reports()  # type: ignore[attr-defined]
    assert reports.hear(2, own, "1" * 64, public_key=line) is None
    assert json.loads(json.dumps(reports.facts()))["signed"]["2"]["epsilon"] == 2.0
    assert module.Reports.of(reports.facts()).signed == reports.signed  # type: ignore[attr-defined]

    def signed(epsilon: float, head: str, **changes: object) -> ReplyFacts:
        word = said(epsilon, head, **changes)
        return word.model_copy(update={"signature": sign(word.model_dump(), load_node_key(path))})

    rounded = signed(1.9999, HEADS[1], round_index=1)
    assert reports.hear(2, rounded, "2" * 64, public_key=line) is None
    assert reports.hear(2, signed(1.0, HEADS[0]), "3" * 64, public_key=line) == "epsilon_fell"
    assert reports.signed == {}, "its last word is a lower one"
    refusal = signed(2.5, HEADS[2], round_index=2, refused="budget_exhausted")
    for word, epsilon in ((rounded, 2.0), (refusal, 2.5)):
        assert reports.hear(2, word, "2" * 64, public_key=line) is None
        head, stated = reports.last_heads()[2], reports.signed[2]["ledger_head"]
        assert (reports.epsilon[2], head, stated) == (epsilon, word.ledger_head, word.ledger_head), "its last word"
    assert reports.hear(2, signed(9.0, HEADS[0]), "3" * 64, public_key=line) == "old_ledger"
    assert reports.signed == {} and reports.last_heads() == {2: HEADS[1]}, "what it said contradicts itself"
    assert reports.hear(2, refusal, "2" * 64, public_key=line) == "epsilon_fell"
    assert reports.hear(2, said(9.5, HEADS[3]), "4" * 64, public_key=line) is None
    assert reports.signed == {}, "the last word came without one"


def test_a_word_counts_as_signed_by_its_own_key_alone(tmp_path: Path) -> None:
    signatures_hold(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        ("and not is_signed(word, facts.signature, public_key)", "and False"),
        ("self.signed.pop(client, None)", "pass"),
        ("and facts.signature and not is_old", "and facts.signature"),
        ("{**heads, **{client", "{**{client"),
        ('signed={int(client): dict(word) for client, word in facts.get("signed", {}).items()},', ""),
    ],
    ids=["any signature", "an older one stays", "of an older row", "no unsigned row", "forgotten at a restart"],
)
def test_a_server_that_takes_any_signature_is_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        signatures_hold(tmp_path, mutant(fedlr.server.reports, change))


def a_signed_statement(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what two of four devices report, of which one signed, and its public key."""
    path, line = keys(folder, "own")
    facts = said(2.0, HEADS[0])
    own = facts.model_copy(update={"signature": sign(facts.model_dump(), load_node_key(path))})
    reports = Reports()
    assert reports.hear(2, own, "1" * 64, public_key=line) is None
    assert reports.hear(1, said(1.5, HEADS[1], client_id=1), "1" * 64) is None
    told = reported_statement(
        1e-5,
        reports.epsilon,
        reports.last_heads(),
        num_clients=4,
        randomness="os",
        mechanism=Mechanism(1.0, 1.0, 0.1, 8.0),
        signed=reports.signed,
    )
    return told, line


def test_a_statement_says_who_signed_and_verify_finds_what_was_changed(tmp_path: Path) -> None:
    told, line = a_signed_statement(tmp_path)
    assert told["signatures"].startswith("1 of 4 clients signed")
    stated, roster = tmp_path / "privacy.json", tmp_path / "roster.json"
    stated.write_text(json.dumps(told))
    entry = {"client_id": 2, "name": "a", "node_id": 7, "public_key": line}
    roster.write_text(json.dumps({"clients": [entry], "revoked": []}))
    found = ["client 1: not signed", "client 2: signed epsilon 2 at delta 1e-05", "2 clients reported nothing"]
    *others, unchecked = fedlr.simulations.signatures.verify(tmp_path, roster)
    assert others == found and "last words was not checked" in unchecked
    rounds_used(tmp_path, 0)
    assert fedlr.simulations.signatures.verify(tmp_path, roster) == found
    roster.write_text(json.dumps({"clients": [{**entry, "public_key": keys(tmp_path, "other")[1]}]}))
    with pytest.raises(InputError, match="not the client's in the roster"):
        fedlr.simulations.signatures.verify(tmp_path, roster)
    for key, value in (("epsilon", 1.0), ("ledger_head", HEADS[3]), ("round_index", 1), ("client_id", 1)):
        changed = json.loads(json.dumps(told))
        changed["clients"][1]["signed"][key] = value
        stated.write_text(json.dumps(changed))
        with pytest.raises(InputError, match="client 2"):
            fedlr.simulations.signatures.verify(tmp_path, None)
    statement_follows(tmp_path, told)
    stated.write_text(json.dumps(told))
    other_key = {**entry, "public_key": keys(tmp_path, "newer")[1]}
    roster.write_text(json.dumps({"clients": [other_key], "revoked": [entry]}))
    assert fedlr.simulations.signatures.verify(tmp_path, roster), "of before enrol --replace"
    (tmp_path / "ledger.jsonl").touch()
    assert not fedlr.simulations.signatures.is_reported(tmp_path), "a ledger that is here is computed"


def rounds_used(run_dir: Path, *rounds: int) -> None:
    """Write that these rounds used an update of client 2, and a later one did not."""
    fates = [*((number, "trained") for number in rounds), (9, "rejected")]
    rows = [{"round_index": number, "client_id": 2, "status": status} for number, status in fates]
    (run_dir / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def statement_follows(run_dir: Path, told: dict[str, Any], module: object = fedlr.simulations.signatures) -> None:
    """Raise AssertionError unless verify refuses each change of what is stated, upwards and downwards."""

    def is_refused(changed: dict[str, Any], says: str) -> None:
        (run_dir / "privacy.json").write_text(json.dumps(changed))
        try:
            module.verify(run_dir, None)  # type: ignore[attr-defined]
        except InputError as error:
            assert says in str(error), error
        else:
            raise AssertionError(f"passed: {says}")

    def again(epsilon: float = 2.0, delta: float = 1e-5) -> dict[str, Any]:
        """Return the statement as whoever changed it would write it: whole, but with the words that there are."""
        signed = {2: told["clients"][1]["signed"]}
        numbers = {"num_clients": 4, "randomness": "os", "mechanism": Mechanism(1.0, 1.0, 0.1, 8.0), "signed": signed}
        return reported_statement(delta, {1: 1.5, 2: epsilon}, {1: HEADS[1], 2: HEADS[0]}, **numbers)  # type: ignore[arg-type]

    assert again() == told
    for epsilon in (1.0, 2.5):
        is_refused(again(epsilon), "another epsilon")
    is_refused(again(delta=1e-9), "larger delta")
    for key, value in (("delta", 1e-6), ("for_release", False), ("num_clients", 5), ("signatures", "all")):
        is_refused({**told, key: value}, "follows from its clients")
    is_refused({**told, "statement": told["statement"].replace("<= 2.0", "<= 0.1")}, "statement")
    is_refused({**told, "delta": "1e-5"}, "what devices report")
    for value in ({}, [{}], "none", [{**told["clients"][0], "epsilon": "a"}]):
        is_refused({**told, "clients": value}, "Expected")
    (run_dir / "identity.json").write_text(json.dumps({"experiment_id": "f" * 32, "seed": 0}))
    is_refused(told, "another run")
    (run_dir / "identity.json").unlink()
    newer = json.loads(json.dumps(told))
    newer["clients"][1]["head"] = HEADS[3]
    is_refused(newer, "another row of its ledger")
    rounds_used(run_dir, 0, 1)
    is_refused(told, "of round 0, and not its last: round 1 used its update")
    (run_dir / "clients.jsonl").write_text("[]\n")
    is_refused(told, "a line for each client and round")
    (run_dir / "clients.jsonl").unlink()


@pytest.mark.parametrize(
    "change",
    [
        ('lowest <= word["epsilon"] <= client["epsilon"]', 'word["epsilon"] >= client["epsilon"]'),
        ('lowest <= word["epsilon"] <= client["epsilon"]', 'word["epsilon"] <= client["epsilon"]'),
        ('word["ledger_head"] != client["head"]', "False"),
        ('word["round_index"] < used', 'word["round_index"] > used'),
        ('word["delta"] <= delta', "True"),
        ('if word["experiment_id"] not in experiments:', "if False:"),
        ("    if different:", "    if False:"),
    ],
    ids=[
        "less than was signed",
        "more than was signed",
        "any row",
        "any round",
        "any delta",
        "any run",
        "any sentence",
    ],
)
def test_a_verify_that_lets_less_be_stated_is_seen(tmp_path: Path, change: tuple[str, str]) -> None:
    told, _ = a_signed_statement(tmp_path)
    with pytest.raises(AssertionError):
        statement_follows(tmp_path, told, mutant(fedlr.simulations.signatures, change))


def test_a_signature_is_of_one_length_and_the_same_again(tmp_path: Path) -> None:
    key = load_node_key(keys(tmp_path, "own")[0])
    words = [said(epsilon, head).model_dump() for epsilon in (0.0, 1.25, 9e8) for head in HEADS]
    signed = [sign(word, key) for word in words]
    assert {len(one) for one in signed} == {192} and signed == [sign(word, key) for word in words]
    assert not fedlr.flower.signed.is_signed(words[0], signed[0], "no key") and len(set(signed)) == len(signed)
