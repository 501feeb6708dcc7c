"""One client, or a minority, cannot carry an average away: whoever moves many times as far as the others is left out.

Three attacks on ten clients that train both factors (reliability.md, finding 14): huge finite values, (k B, A / k), and
two that send (-B, -A). Control: without the bound each does the harm that it is known for.

Mutants killed: one norm over all roles, in which a role that hardly moves hides (-B, -A); a mean in place of the
median; a bound on values instead of moves; the bound before the majority is known (of the first update alone).
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

import fedlr.rounds.outlying
import fedlr.rounds.round
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.method import Always, Method, full_adapter, keep
from fedlr.rounds.outlying import MAX_UPDATE_RATIO, NUM_REFERENCES, product_moves
from fedlr.rounds.round import Dropout, ServerState, run_round
from tests.server.small_federation import Outcomes
from tests.training.small_models import mutant

FEDIT = Method("fedit", Always([LORA_A, LORA_B]), weighted_mean, keep, full_adapter)
A, B = Slot("layer", LORA_A), Slot("layer", LORA_B)
Sent = dict[Slot, Tensor]
NUM_CLIENTS, HOSTILE = 10, (3, 7)
GENERATOR = torch.Generator().manual_seed(0)
STATE = ServerState(
    AdapterState(
        {A: torch.randn(4, 30, generator=GENERATOR), B: 0.1 * torch.randn(20, 4, generator=GENERATOR)}, scale=1.0
    )
)


def honest(client: int) -> Sent:
    """A round's work: lora_B moves, lora_A hardly."""
    generator = torch.Generator().manual_seed(client)
    return {
        slot: tensor + (0.01 if slot == A else 0.1) * (1 + torch.randn(tensor.shape, generator=generator))
        for slot, tensor in STATE.adapter.tensors.items()
    }


ATTACKS: Mapping[str, tuple[int, Callable[[Sent], Sent]]] = {
    "huge values": (1, lambda sent: {slot: torch.full_like(tensor, 9.9e5) for slot, tensor in sent.items()}),
    "one huge value": (
        1,
        lambda sent: {**sent, B: sent[B].index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(9.9e5))},
    ),
    "(k B, A / k)": (1, lambda sent: {A: sent[A] / 1e3, B: sent[B] * 1e3}),
    "(B / k, k A)": (1, lambda sent: {A: sent[A] * 1e3, B: sent[B] / 1e3}),
    "(-B, -A) of two": (2, lambda sent: {slot: -tensor for slot, tensor in sent.items()}),
}


def answers(attack: str) -> list[ClientUpdate]:
    num_hostile, change = ATTACKS[attack]
    sent = {client: honest(client) for client in range(NUM_CLIENTS)}
    sent.update({client: change(sent[client]) for client in HOSTILE[:num_hostile]})
    return [ClientUpdate(client, tensors, 1.0, 0) for client, tensors in sent.items()]


def effect(attack: str, *, max_ratio: float | None) -> float:
    """Return how far the attack carries the product away, relative to the honest one of all clients."""
    clients = range(NUM_CLIENTS)
    everybody = Outcomes([ClientUpdate(client, honest(client), 1.0, 0) for client in clients])
    wanted, _ = run_round(STATE, clients, pool=everybody, method=FEDIT, max_update_ratio=max_ratio)
    found, diagnostics = run_round(
        STATE, clients, pool=Outcomes(answers(attack)), method=FEDIT, max_update_ratio=max_ratio
    )
    num_hostile = ATTACKS[attack][0]
    expected = tuple(Dropout(client, "rejected", "too_far") for client in HOSTILE[:num_hostile])
    assert diagnostics.dropouts == (expected if max_ratio is not None else ())
    (one,), (other,) = (list(state.adapter.factors().values()) for state in (wanted, found))
    honest_product = one.lora_B @ one.lora_A
    return float((other.lora_B @ other.lora_A - honest_product).norm() / honest_product.norm())


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_minority_moves_the_mean_by_little(attack: str) -> None:
    assert effect(attack, max_ratio=MAX_UPDATE_RATIO) < 0.2  # of the honest mean: fewer clients are averaged
    harm = effect(attack, max_ratio=None)
    assert harm > (0.5 if attack == "(-B, -A) of two" else 30), (
        "the control: the attack does harm where none is refused"
    )


def one_norm(tensors: Sent, sent_down: Mapping[Slot, Tensor]) -> dict[str, float]:
    own = moves_as_they_are(tensors, sent_down)
    return dict.fromkeys(own, math.hypot(*own.values()))


def of_the_values(tensors: Sent, sent_down: Mapping[Slot, Tensor]) -> dict[str, float]:
    return moves_as_they_are(tensors, {slot: torch.zeros_like(tensor) for slot, tensor in sent_down.items()})


moves_as_they_are = fedlr.rounds.outlying.moves
MUTANTS = {
    "one norm over all roles": ("moves", one_norm, "(-B, -A) of two"),
    "values in place of moves": ("moves", of_the_values, "(-B, -A) of two"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_bound_that_measures_something_else_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, replacement, attack = MUTANTS[name]
    monkeypatch.setattr(fedlr.rounds.round, target, replacement)
    with pytest.raises(AssertionError):
        effect(attack, max_ratio=MAX_UPDATE_RATIO)


@pytest.mark.parametrize(
    ("change", "attack"),
    [
        (("statistics.median(", "statistics.fmean("), "huge values"),
        (("NUM_REFERENCES = 16", "NUM_REFERENCES = 1"), "huge values"),
    ],
    ids=["a mean", "no majority"],
)
def test_a_measure_that_an_attacker_sets_is_seen(
    change: tuple[str, str], attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedlr.rounds.round, "near_the_others", mutant(fedlr.rounds.outlying, change).near_the_others)
    with pytest.raises(AssertionError):
        effect(attack, max_ratio=MAX_UPDATE_RATIO)


def trained(moved: Sequence[float], *, max_ratio: float | None = MAX_UPDATE_RATIO) -> list[int]:
    """Return who is used of clients that move lora_B by so much."""
    updates = [
        ClientUpdate(c, {**STATE.adapter.tensors, B: STATE.adapter.tensors[B] + m}, 1.0, 0) for c, m in enumerate(moved)
    ]
    clients = range(len(moved))
    _, diagnostics = run_round(STATE, clients, pool=Outcomes(updates), method=FEDIT, max_update_ratio=max_ratio)
    assert {d.client_id for d in diagnostics.dropouts} == set(clients) - set(diagnostics.trained)
    return list(diagnostics.trained)


def test_who_is_near_the_others_is_used_wherever_it_stands_in_the_order() -> None:
    ratio = MAX_UPDATE_RATIO
    assert trained([1.0, 0.9 * ratio, 1.1 * ratio, 1.0, 1.0]) == [0, 1, 3, 4]
    many = [1.0] * (NUM_REFERENCES + 9)
    many[NUM_REFERENCES + 4] = 1.1 * ratio  # judged by the first ones
    assert trained(many) == [client for client in range(len(many)) if client != NUM_REFERENCES + 4]
    assert trained([1.0, 1e5, 1.0], max_ratio=None) == [0, 1, 2]


def test_nobody_is_judged_where_there_is_no_majority_or_nothing_usual() -> None:
    assert trained([1.0, 1e5]) == [0, 1]
    assert trained([0.0, 0.0, 0.0, 1.0]) == [0, 1, 2, 3]  # most clients drew no row, and add no noise


def test_a_client_of_small_rank_is_measured_by_what_it_trains() -> None:
    ranks, updates = [4, 4, 1, 4], []
    for client, rank in enumerate(ranks):
        own = honest(client)
        updates.append(ClientUpdate(client, {A: own[A][:rank], B: own[B][:, :rank]}, 1.0, 0))
    _, diagnostics = run_round(STATE, range(4), pool=Outcomes(updates), method=FEDIT, ranks=ranks, max_update_ratio=2.0)
    assert diagnostics.trained == (0, 1, 2, 3)


def test_the_median_is_that_of_the_moves() -> None:
    moved = [3.0, 1.0, 2.0, 40.0, 2.5]
    assert trained(moved, max_ratio=40.0 / statistics.median(moved) * 1.01) == [0, 1, 2, 3, 4]
    assert trained(moved, max_ratio=40.0 / statistics.median(moved) * 0.99) == [0, 1, 2, 4]


def test_the_bound_is_on_unless_it_is_taken_off() -> None:
    assert compose_experiment(["experiment=tiny"]).max_update_ratio == MAX_UPDATE_RATIO
    assert compose_experiment(["experiment=tiny", "max_update_ratio=null"]).max_update_ratio is None
    with pytest.raises(InputError, match=r"max_update_ratio"):
        compose_experiment(["experiment=tiny", "max_update_ratio=1"])


def several_times_as_far(ratio: float) -> dict[int, Sent]:
    """One client of ten moves either factor `ratio` times as far as the others, in one direction of the rank."""
    sent: dict[int, Sent] = {client: honest(client) for client in range(NUM_CLIENTS)}
    own = {slot: tensor.clone() for slot, tensor in STATE.adapter.tensors.items()}
    usual = {slot: float((sent[0][slot] - own[slot]).square().mean().sqrt()) for slot in own}
    own[A][0] += ratio * usual[A] * 2  # of 4 rows: root mean square over all is half of it
    own[B][:, 0] += ratio * usual[B] * 2
    sent[HOSTILE[0]] = own
    return sent


def test_two_factors_that_each_pass_are_stopped_by_what_they_add_to_the_product() -> None:
    updates = [ClientUpdate(client, tensors, 1.0, 0) for client, tensors in several_times_as_far(40.0).items()]
    own = fedlr.rounds.outlying.moves(updates[HOSTILE[0]].tensors, STATE.adapter.tensors)
    usual = fedlr.rounds.outlying.moves(updates[0].tensors, STATE.adapter.tensors)
    assert not fedlr.rounds.outlying.is_too_far(own, usual, max_ratio=MAX_UPDATE_RATIO)

    def left_out() -> list[int]:
        pool = Outcomes(updates)
        _, diagnostics = run_round(STATE, range(NUM_CLIENTS), pool=pool, method=FEDIT)
        return [d.client_id for d in diagnostics.dropouts]

    assert left_out() == [HOSTILE[0]]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fedlr.rounds.round, "product_moves", lambda *args, **kwargs: {})
        assert left_out() == []


@pytest.mark.parametrize("roles", [(LORA_A,), (LORA_B,), (LORA_A, LORA_B)], ids=["A", "B", "both"])
def test_the_move_in_delta_w_is_that_of_dense_products_in_any_gauge(roles: Sequence[str]) -> None:
    before, tensors = STATE.adapter, {slot: t for slot, t in honest(3).items() if slot.role in roles}
    wanted = float((product_of(before.with_tensors(tensors)) - product_of(before)).norm())
    assert product_moves(tensors, before) == {"delta_W": pytest.approx(wanted, rel=1e-9)}
    if len(roles) == 2:
        gauge = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, -1.0, 0.5, 0.0], [0.0, 0.0, 3.0, 0.0], [1.0, 0.0, 0.0, 0.5]])
        turned = {A: torch.linalg.solve(gauge.double(), tensors[A].double()), B: tensors[B].double() @ gauge.double()}
        assert product_moves(turned, before) == {"delta_W": pytest.approx(wanted, rel=1e-9)}


def product_of(adapter: AdapterState) -> Tensor:
    (layer,) = adapter.factors().values()
    return layer.lora_B.double() @ layer.lora_A.double()


def test_the_move_in_delta_w_of_a_small_rank_is_from_what_that_client_was_sent() -> None:
    rank, own = 2, honest(3)
    small = {A: own[A][:rank], B: own[B][:, :rank]}
    start = {slot: tensor.double() for slot, tensor in STATE.adapter.tensors.items()}
    wanted = small[B].double() @ small[A].double() - start[B][:, :rank] @ start[A][:rank]
    assert product_moves(small, STATE.adapter, rank=rank)["delta_W"] == pytest.approx(float(wanted.norm()), rel=1e-9)
    assert product_moves({}, STATE.adapter) == {}
