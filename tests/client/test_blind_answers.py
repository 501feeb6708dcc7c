"""A device answers alike whether its Poisson draw was empty or not, and what it does not answer costs nothing.

Every hostile message, and those that a policy cannot refuse as the model, the engine or what was kept must tell, after
every state that a device can be in, with either engine: the same word, lengths and charge for both draws; and a refusal
charges nothing. The longer table of states and messages is a slow test.

Mutants, which are found out: no rehearsal; a rehearsal after the charge; no comparison with what was
kept; a row whose failure is told; a role that is personal no more.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlr.adapters.state import LORA_A, LORA_B, SIDE_A, SIDE_B, Slot
from fedlr.client.device import Device
from fedlr.client.settings import Settings
from fedlr.client.trainee import Trainee
from fedlr.data.table import Table
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.sampling import PoissonSampler
from fedlr.rounds.pools.client_state import Kept
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import LocalPool
from fedlr.rounds.pools.rehearsal import Rehearsal
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import HookGradients
from tests.client.blind import EMPTY, FILLED, Draw, answer
from tests.client.device_files import PATH, device_settings
from tests.client.hostile_server import CASES, RULES, Case, ones, section, side

BOTH: Mapping[str, Any] = {"block": [LORA_A, LORA_B]}
A, B = Slot(f"broadcast/{PATH}", LORA_A), Slot(f"broadcast/{PATH}", LORA_B)
NOWHERE = Slot("base_model.model.nowhere", LORA_B)
SCAFFOLD = {"client_rule": section(f"{RULES}scaffold.ScaffoldClient", lr=0.5, optimizer="torch.optim.SGD")}
TURNS = {"client_rule": section(f"{RULES}alternation.LocalAlternation")}
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "fused": {},
    "hooks": {"trainer.engine": "opacus"},
    "loop": {"trainer.engine": "opacus", "trainer.grad_sample_mode": "loop"},
}


def later(number: int = 1, **facts: Any) -> Mapping[str, Any]:
    return {"round_index": number, **facts}


# What lies within the policy: the model, the engine or what was kept must say whether it can be trained.
REACHING: Mapping[str, Case] = {
    "lora_B": Case({}, later()),
    "lora_A": Case({}, later(block=[LORA_A])),
    "both": Case({}, later(**BOTH)),
    "both, lora_B personal": Case({}, later(**BOTH, personal=[LORA_B])),
    "both, lora_A personal": Case({}, later(**BOTH, personal=[LORA_A])),
    "lora_A, lora_B personal": Case({}, later(block=[LORA_A], personal=[LORA_B])),
    "the layer by name": Case({}, later(block=[[PATH, LORA_B]])),
    "a layer that is nowhere": Case({}, later(block=[list(NOWHERE)])),
    "a layer and one that is nowhere": Case({}, later(block=[[PATH, LORA_B], list(NOWHERE)])),
    "what is sent is nowhere": Case({}, later(block=[LORA_A, list(NOWHERE)], personal=[LORA_A])),
    "a rank of its own": Case({}, later(rank=1)),
    "a rank of its own, both": Case({}, later(**BOTH, rank=1)),
    "a lower rank": Case({}, later(**BOTH), {A: ones(1, 16), B: ones(16, 1)}),
    "a lower rank, lora_B personal": Case({}, later(**BOTH, personal=[LORA_B]), {A: ones(1, 16), B: ones(16, 1)}),
    "half of a lower rank": Case({}, later(), {B: ones(16, 1)}),
    "another width": Case({}, later(), {B: ones(15, 2)}),
    "another layer": Case({}, later(), {Slot(f"broadcast/{NOWHERE.path}", LORA_B): ones(16, 2)}),
    "doubles": Case({}, later(), {B: ones(16, 2).double()}),
    "huge values": Case({}, later(**BOTH), {A: 1e6 * ones(2, 16), B: 1e6 * ones(16, 2)}),
    "an enrolled layer more": Case({}, later(), {Slot(f"enrolled/{NOWHERE.path}", LORA_B): ones(16, 2)}),
    "an enrolled type": Case({}, later(), {Slot(f"enrolled/{PATH}", LORA_B): torch.zeros(16, 2).double()}),
    "another round": Case({}, later(2)),
    "another client": Case({}, later(client_id=7)),
    "a side": Case({}, later(), side(ones(2, 16), ones(16, 2))),
    "a side of another width": Case({}, later(), side(ones(2, 15), ones(16, 2))),
    "a side elsewhere": Case(
        {}, later(), {Slot(f"side/{NOWHERE.path}", r): t for r, t in ((SIDE_A, ones(2, 16)), (SIDE_B, ones(16, 2)))}
    ),
    "SCAFFOLD": Case(SCAFFOLD, later()),
    "SCAFFOLD, both": Case(SCAFFOLD, later(**BOTH)),
    "SCAFFOLD, a lower rank": Case(SCAFFOLD, later(**BOTH), {A: ones(1, 16), B: ones(16, 1)}),
    "SCAFFOLD, a rank of its own": Case(SCAFFOLD, later(**BOTH, rank=1)),
    "SCAFFOLD, controls": Case(SCAFFOLD, later(), {Slot(f"control/{PATH}", LORA_B): ones(16, 2)}),
    "SCAFFOLD, controls of one row": Case(SCAFFOLD, later(), {Slot(f"control/{PATH}", LORA_B): ones(1, 2)}),
    "SCAFFOLD, controls elsewhere": Case(SCAFFOLD, later(), {Slot(f"control/{NOWHERE.path}", LORA_B): ones(16, 2)}),
    "in turn, of one": Case(TURNS, later()),
    "in turn": Case(TURNS, later(**BOTH)),
    "scaled": Case({"trainer.after_noise": section(f"{RULES}preconditioned.ScaledGradient", reg=0.1)}, later(**BOTH)),
    "a learning rate that explodes": Case({"trainer.optimizer.lr": 1e6}, later(**BOTH)),
    "Adam": Case({"trainer.optimizer": section("torch.optim.Adam", lr=0.1)}, later()),
    "more layers": Case({"adapter.target_modules": "all-linear"}, later()),
    "no such layer": Case({"adapter.target_modules": ["nothing"]}, later()),
    "longer texts than the model reads": Case({"max_length": 512}, later()),
    "texts of no token": Case({"max_length": 1}, later()),
}  # fmt: skip

STATES: Mapping[str, Sequence[Case]] = {
    "fresh": [],
    "lora_B was personal": [Case({}, {**BOTH, "personal": [LORA_B]})],
    "lora_A was trained": [Case({}, {"block": [LORA_A]})],
    "SCAFFOLD": [Case(SCAFFOLD)],
    "a lower rank was personal": [Case({}, {**BOTH, "personal": [LORA_B]}, {A: ones(1, 16), B: ones(16, 1)})],
    "refused": [Case({}, {"block": [list(NOWHERE)]})],
    "killed after the charge": [],
}


TRAINEES: dict[str, Trainee] = {}


class Killed(SystemExit):
    pass


class Site:
    """A device's folder in a state, to which it returns before each message."""

    def __init__(self, folder: Path, state: str, engine: str, draw: Draw, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(PoissonSampler, "draw", lambda *given: draw(*given))
        folder.mkdir(parents=True)
        self._settings, self._engine = device_settings(folder / "device", privacy__epsilon=1e4), engine
        for case in STATES[state]:
            self.answer(case)
        if state == "killed after the charge":
            with patch.context() as deadly, pytest.raises(Killed):
                deadly.setattr(PrivacyLedger, "settle_all", _killed)
                self.answer(Case({}, later(**BOTH, personal=[LORA_B])))
        self._saved = shutil.copytree(self._settings.state_dir, folder / "saved")

    def answer(self, case: Case) -> tuple[Any, ...]:
        """Return all that a server, and the ledger's owner, see of a message."""
        asked = replace_terms(case, self._engine).record()
        device = Device(self._settings, say=lambda line: None)
        seen = answer(device, asked, self._settings)
        device.close()
        return seen

    def asked(self, case: Case) -> tuple[Any, ...]:
        seen = self.answer(case)
        if len(seen) > 1 and seen[0]["refused"] not in ("policy", "model"):
            shutil.rmtree(self._settings.state_dir)
            shutil.copytree(self._saved, self._settings.state_dir)
        return seen


def _killed(*_: object) -> None:
    raise Killed


def replace_terms(case: Case, engine: str) -> Case:
    return case._replace(terms={**ENGINES[engine], **case.terms})


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Load the model once for the same terms; the rehearsals begin anew."""
    original = Trainee.prepare

    def prepare(settings: Settings, terms: Any, rows: Table, *, features: bool = False, say: Any) -> Trainee:
        key = f"{terms.sha256()} {features}"
        if key not in TRAINEES:
            TRAINEES[key] = original(settings, terms, rows, features=features, say=say)
        return replace(TRAINEES[key], settings=settings)

    monkeypatch.setattr(Trainee, "prepare", prepare)
    yield


def check(folder: Path, state: str, engine: str, cases: Mapping[str, Case], patch: pytest.MonkeyPatch) -> set[str]:
    """Compare what is seen of every message with an empty draw and with two rows; return what was answered."""
    seen = {}
    for name, draw in (("empty", EMPTY), ("filled", FILLED)):
        site = Site(folder / name, state, engine, draw, patch)
        seen[name] = {message: site.asked(case) for message, case in cases.items()}
    differ = [message for message in cases if seen["empty"][message] != seen["filled"][message]]
    assert not differ, f"the answer tells whether a row was drawn: {differ}"
    return {message for message in cases if len(seen["empty"][message]) > 1 and seen["empty"][message][1]}


FEW = (
    *("lora_A", "both", "both, lora_B personal", "a layer that is nowhere", "what is sent is nowhere"),
    *(
        "a lower rank, lora_B personal",
        "half of a lower rank",
        "SCAFFOLD, a lower rank",
        "SCAFFOLD, controls of one row",
    ),
    *("in turn, of one", "a side elsewhere", "longer texts than the model reads"),
)


def checked(folder: Path, state: str, engine: str, names: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    answered = check(folder, state, engine, {name: REACHING[name] for name in names}, patch)
    assert ("both, lora_B personal" in answered) == (state != "a lower rank was personal")
    assert ("both" in answered) == ("personal" not in state)  # what was personal once is not asked for later
    assert not answered & {"a layer that is nowhere", "SCAFFOLD, controls of one row", "in turn, of one"}


@pytest.mark.parametrize(
    ("state", "engine"),
    [
        *(("fresh", "fused"), ("lora_B was personal", "fused"), ("a lower rank was personal", "fused")),
        *(("SCAFFOLD", "fused"), ("lora_B was personal", "hooks"), ("killed after the charge", "fused")),
    ],
)
def test_no_answer_tells_whether_a_row_was_drawn(
    state: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked(tmp_path, state, engine, FEW, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("state", STATES)
def test_nor_does_any_in_any_state(state: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(tmp_path, state, engine, tuple(REACHING), monkeypatch)


def test_no_hostile_message_tells_whether_a_row_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {name: case for name, case in CASES.items() if not case.device}
    assert check(tmp_path, "lora_B was personal", "fused", cases, monkeypatch) == set()


@pytest.mark.parametrize("engine", ["fused", "hooks"])
def test_one_process_that_is_asked_everything_answers_alike(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for name, draw in (("empty", EMPTY), ("filled", FILLED)):
        monkeypatch.setattr(PoissonSampler, "draw", lambda *given, draw=draw: draw(*given))
        settings = device_settings(tmp_path / name, privacy__epsilon=1e4)
        device = Device(settings, say=lambda line: None)
        asked = [replace_terms(case, engine).record() for case in REACHING.values()]
        seen.append([answer(device, record, settings) for record in asked])
        device.close()
    assert seen[0] == seen[1]


def blind(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Ask a few messages that the policy cannot refuse; fails for a device that they find out."""
    for state, engine, names in (
        ("lora_B was personal", "fused", ("lora_A", "both")),
        ("fresh", "hooks", ("in turn", "another width", "longer texts than the model reads")),
        ("fresh", "fused", ("in turn, of one", "SCAFFOLD, controls of one row")),
        ("SCAFFOLD", "fused", ("SCAFFOLD, a lower rank",)),
    ):
        cases = {name: REACHING[name] for name in names}
        answered = check(folder / f"{state} {engine}", state, engine, cases, patch)
        assert not answered & {"lora_A", "both", "SCAFFOLD, controls of one row"}, "it does not fit, and is answered"


def test_the_few_messages_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind(tmp_path, monkeypatch)


def _late(pool: type) -> Callable[..., Any]:
    """Return a reservation that is written before the round is tried."""
    original = pool._rehearse

    def rehearse(self: Any, task: Any, adapter: Any, cohort: Any) -> None:
        reserve = self._accounts.reserve
        found = reserve(task, cohort, self.kept)
        self._accounts.reserve = lambda *_: found
        try:
            original(self, task, adapter, cohort)
        finally:
            self._accounts.reserve = reserve

    return rehearse


MUTANTS: Mapping[str, Sequence[tuple[Any, str, Any]]] = {
    "no rehearsal": [(pool, "_rehearse", lambda *_: None) for pool in (FusedPool, LocalPool)],
    "no rehearsal, nothing compared": [
        *((pool, "_rehearse", lambda *_: None) for pool in (FusedPool, LocalPool)),
        (Kept, "check", lambda *_: None),
    ],
    "a rehearsal after the charge": [(pool, "_rehearse", _late(pool)) for pool in (FusedPool, LocalPool)],
    "nothing compared": [(Kept, "check", lambda *_: None)],
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_device_that_finds_out_late_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, attribute, becomes in MUTANTS[name]:
        monkeypatch.setattr(owner, attribute, becomes)
    with pytest.raises(AssertionError):
        blind(tmp_path, monkeypatch)


# Where a pass over one row fails, and how: the memory, a value that the model does not take.
PASSES = {"fused": (FusedGradients, "clipped_sums"), "hooks": (HookGradients, "clipped_sum")}
FAILURES = [MemoryError(), RuntimeError("CUDA out of memory"), IndexError("index out of range in self")]


def failing_rows(folder: Path, engine: str, error: Exception, patch: pytest.MonkeyPatch, log: list[str]) -> None:
    """One of two rows cannot be computed, in a round whose rehearsal went well; the answer says nothing of it."""
    owner, name = PASSES[engine]
    original, seen, active = getattr(owner, name), [], {"now": False}

    def fails(self: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        if active["now"]:
            raise error
        return original(self, inputs, *given, **named)

    patch.setattr(owner, name, fails)
    for kind, draw in (("empty", EMPTY), ("filled", FILLED)):

        def drawn(*given: Any, draw: Draw = draw) -> Any:
            active["now"] = given[0].sample_rate < 1.0
            return draw(*given)

        patch.setattr(PoissonSampler, "draw", drawn)
        settings = device_settings(folder / kind, privacy__epsilon=1e4)
        device = Device(settings, say=log.append)
        asked = replace_terms(Case({}, BOTH), engine).record()
        seen.append(answer(device, asked, settings))
        device.close()
        active["now"] = False
    assert seen[0] == seen[1] and seen[0][1], "the answer tells that a row failed"


@pytest.mark.parametrize("engine", PASSES)
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_row_that_cannot_be_computed_counts_as_zero_and_is_told_in_the_devices_own_log(
    engine: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TRAINEES.clear()  # its log is this test's
    log: list[str] = []
    failing_rows(tmp_path, engine, error, monkeypatch, log)
    assert sum("counts as zero" in line for line in log) == 1


def _raises(self: Rehearsal, error: Exception, num_rows: int) -> None:
    raise error


@pytest.mark.parametrize("engine", PASSES)
def test_a_device_that_tells_of_a_row_that_failed_is_found_out(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rehearsal, "failed", _raises)
    with pytest.raises(AssertionError):
        failing_rows(tmp_path, engine, MemoryError(), monkeypatch, [])


def test_a_failure_of_several_rows_is_an_error(tmp_path: Path) -> None:
    rehearsal = TRAINEES[next(iter(TRAINEES))].rehearsal
    with pytest.raises(MemoryError):
        rehearsal.failed(MemoryError(), 2)
