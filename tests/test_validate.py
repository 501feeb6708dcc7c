"""The gate before aggregation: each kind of bad update is refused by its name, among good ones that still count."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from fedlr.adapters.state import LARGEST_VALUE, LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.method import Always, Method, SvdRefactor, full_adapter, keep
from fedlr.rounds.round import Dropout, RoundRequest, ServerState, run_round
from fedlr.rounds.validate import rejection

A, B = Slot("layer", LORA_A), Slot("layer", LORA_B)
ADAPTER = AdapterState({A: torch.ones(2, 3), B: torch.zeros(4, 2)}, scale=1.0)
METHOD = Method("test", Always([LORA_B]), weighted_mean, keep, full_adapter)


def update(client_id: int = 0, **changes: object) -> ClientUpdate:
    return replace(ClientUpdate(client_id, {B: torch.full((4, 2), 2.0)}, weight=1.0, base_round=0), **changes)


def with_entry(value: float) -> dict[Slot, torch.Tensor]:
    tensor = torch.ones(4, 2)
    tensor[3, 1] = value
    return {B: tensor}


BAD = [
    ("unknown_client", update(7)),
    ("unknown_client", update(-1)),
    ("wrong_round", update(base_round=1)),
    ("wrong_round", update(base_round=-1)),
    ("bad_weight", update(weight=0.0)),
    ("bad_weight", update(weight=-1.0)),
    ("bad_weight", update(weight=math.nan)),
    ("bad_weight", update(weight=math.inf)),
    ("bad_weight", update(weight=-math.inf)),
    ("wrong_keys", update(tensors={})),
    ("wrong_keys", update(tensors={A: torch.ones(2, 3)})),
    ("wrong_keys", update(tensors={B: torch.ones(4, 2), A: torch.ones(2, 3)})),
    ("wrong_keys", update(tensors={Slot("layer ", LORA_B): torch.ones(4, 2)})),
    ("wrong_keys", update(tensors={Slot("layer", "lora_b"): torch.ones(4, 2)})),
    ("wrong_shape", update(tensors={B: torch.ones(4, 1)})),  # would broadcast
    ("wrong_shape", update(tensors={B: torch.ones(1, 2)})),
    ("wrong_shape", update(tensors={B: torch.ones(2)})),
    ("wrong_shape", update(tensors={B: torch.tensor(1.0)})),
    ("wrong_shape", update(tensors={B: torch.ones(2, 4)})),
    ("wrong_shape", update(tensors={B: torch.ones(1, 4, 2)})),
    ("wrong_shape", update(tensors={B: torch.ones(0, 2)})),
    ("wrong_dtype", update(tensors={B: torch.ones(4, 2, dtype=torch.float64)})),
    ("wrong_dtype", update(tensors={B: torch.ones(4, 2, dtype=torch.bfloat16)})),
    ("wrong_dtype", update(tensors={B: torch.ones(4, 2, dtype=torch.int32)})),
    ("wrong_dtype", update(tensors={B: torch.ones(4, 2, dtype=torch.complex64)})),
    ("not_finite", update(tensors=with_entry(math.nan))),
    ("not_finite", update(tensors=with_entry(math.inf))),
    ("not_finite", update(tensors=with_entry(-math.inf))),
    ("too_large", update(tensors=with_entry(3.4e38))),
    ("too_large", update(tensors=with_entry(-1.1e6))),
]


class Sends:
    """A pool whose clients answer what they were told to."""

    def __init__(self, *outcomes: ClientUpdate | Dropout) -> None:
        self.outcomes = outcomes

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        yield from self.outcomes


def reason(candidate: ClientUpdate, *, seen: Sequence[int] = ()) -> str | None:
    return rejection(candidate, expected=ADAPTER.select(frozenset({LORA_B})), round_index=0, asked=[0, 1], seen=seen)


def test_a_good_update_passes() -> None:
    assert reason(update()) is None
    assert reason(update(tensors=with_entry(-1e6))) is None
    assert reason(update(tensors={B: torch.ones(2, 4).T})) is None  # any layout in memory


@pytest.mark.parametrize(("expected", "bad"), BAD, ids=[f"{r}-{i}" for i, (r, _) in enumerate(BAD)])
def test_a_bad_update_is_refused_by_name(expected: str, bad: ClientUpdate) -> None:
    assert reason(bad) == expected


@pytest.mark.parametrize(("expected", "bad"), BAD, ids=[f"{r}-{i}" for i, (r, _) in enumerate(BAD)])
def test_a_bad_update_is_a_counted_event_and_changes_nothing(expected: str, bad: ClientUpdate) -> None:
    before = ADAPTER.fingerprint()
    state, diagnostics = run_round(ServerState(ADAPTER), [0, 1], pool=Sends(bad, update(1)), method=METHOD)
    assert diagnostics.trained == (1,)
    assert Dropout(bad.client_id, "rejected", expected) in diagnostics.dropouts
    assert torch.equal(state.adapter.tensors[B], torch.full((4, 2), 2.0))  # the good one's alone
    assert ADAPTER.fingerprint() == before


def test_a_second_update_of_a_client_is_refused_and_the_first_stays() -> None:
    again = update(1, tensors=with_entry(9.0))
    assert reason(again, seen=[1]) == "duplicate"
    state, diagnostics = run_round(ServerState(ADAPTER), [0, 1], pool=Sends(update(1), again, update(0)), method=METHOD)
    assert diagnostics.trained == (0, 1)
    assert diagnostics.dropouts == (Dropout(1, "rejected", "duplicate"),)
    assert torch.equal(state.adapter.tensors[B], torch.full((4, 2), 2.0))


def test_a_bad_update_does_not_use_up_the_clients_turn() -> None:
    _, diagnostics = run_round(ServerState(ADAPTER), [0], pool=Sends(update(base_round=3), update()), method=METHOD)
    assert diagnostics.trained == (0,)


def test_reasons_carry_no_value_of_the_client() -> None:
    assert {expected for expected, _ in BAD} == {
        "unknown_client",
        "wrong_round",
        "bad_weight",
        "wrong_keys",
        "wrong_shape",
        "wrong_dtype",
        "not_finite",
        "too_large",
    }


@pytest.mark.parametrize("finalise", [keep, SvdRefactor()], ids=["keep", "svd"])
def test_the_largest_values_let_through_leave_the_servers_arithmetic_finite(finalise: object) -> None:
    most = {A: torch.full((2, 3), LARGEST_VALUE), B: torch.full((4, 2), -LARGEST_VALUE)}
    both = Method("both", Always([LORA_A, LORA_B]), weighted_mean, finalise, full_adapter)
    state, diagnostics = run_round(ServerState(ADAPTER), [0], pool=Sends(update(tensors=most)), method=both)
    assert diagnostics.trained == (0,)
    assert all(bool(tensor.isfinite().all()) for tensor in state.adapter.tensors.values())
    assert all(math.isfinite(value) for values in diagnostics.singular_values.values() for value in values)
