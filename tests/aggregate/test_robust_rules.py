"""Rules that resist hostile clients: each against a direct computation on dense matrices in float64, invariant to the
gauge of B A, right up to its breakdown point and not beyond, and refused where its promise would not hold.

Mutants killed: a rule without its metric (distances of lora_B alone), one that compares factors where both train, one
that averages factors where it compared products, Krum that counts a client as its own neighbour.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedlr.methods.aggregate.geometric_median as geometric_median
import fedlr.methods.aggregate.multi_krum as multi_krum
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.centered_clipping import CenteredClipping, clipped_centre
from fedlr.methods.aggregate.coordinate_median import CoordinateMedian
from fedlr.methods.aggregate.geometric_median import GeometricMedian, weiszfeld
from fedlr.methods.aggregate.geometry import combined, distances_from, gram, squared_distances
from fedlr.methods.aggregate.held import TooFewUpdates
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.multi_krum import MultiKrum, krum_scores
from fedlr.methods.aggregate.rank import svd_redistribution
from fedlr.methods.aggregate.trimmed_mean import TrimmedMean
from fedlr.methods.method import Always, Method, keep, trained_block
from fedlr.rounds.round import Dropout, ServerState, federated_rounds, run_round
from tests.server.small_federation import Outcomes
from tests.training.small_models import mutant

D, K, R, SCALE = 7, 9, 3, 0.5
PATHS = ("layer.0", "layer.1")
HEAD_SLOT = Slot("head.weight", HEAD)
B_ONLY, A_ONLY, BOTH = (LORA_B, HEAD), (LORA_A, HEAD), (LORA_A, LORA_B, HEAD)
Rule = Callable[[AdapterState, Sequence[ClientUpdate]], AdapterState]
BY_COORDINATE: dict[str, Rule] = {"median": CoordinateMedian(), "trimmed": TrimmedMean(2)}
BY_DISTANCE: dict[str, Rule] = {"krum": MultiKrum(2), "geometric": GeometricMedian(), "clipping": CenteredClipping()}
RULES = BY_COORDINATE | BY_DISTANCE
Vectors = NDArray[np.float64]


def start(dtype: torch.dtype = torch.float64) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    tensors = {HEAD_SLOT: torch.randn(2, D, generator=generator, dtype=dtype)}
    for number, path in enumerate(PATHS):
        tensors[Slot(path, LORA_A)] = (1 + 3 * number) * torch.randn(R, K, generator=generator, dtype=dtype)
        tensors[Slot(path, LORA_B)] = torch.randn(D, R, generator=generator, dtype=dtype)
    return AdapterState(tensors, SCALE)


def honest(adapter: AdapterState, roles: Sequence[str], num_clients: int, *, seed: int = 1) -> list[ClientUpdate]:
    """A step in common, and as much of each client's own."""
    generator = torch.Generator().manual_seed(seed)
    slots = [slot for slot in sorted(adapter.tensors) if slot.role in roles]
    shared = {slot: torch.randn(adapter.tensors[slot].shape, generator=generator) for slot in slots}
    return [
        ClientUpdate(
            client,
            {
                slot: adapter.tensors[slot]
                + 0.1 * (shared[slot] + torch.randn(shared[slot].shape, generator=generator)).to(torch.float64)
                for slot in slots
            },
            1.0,
            0,
        )
        for client in range(num_clients)
    ]


def function_of(adapter: AdapterState) -> Vectors:
    """All that the adapter computes as one vector: dense products and the head."""
    dense = [(layer.lora_B.double() @ layer.lora_A.double()).flatten() for layer in adapter.factors().values()]
    return torch.cat([*dense, adapter.tensors[HEAD_SLOT].double().flatten()]).numpy()


def moves_of(adapter: AdapterState, updates: Sequence[ClientUpdate]) -> Vectors:
    return np.stack([function_of(adapter.with_tensors(u.tensors)) for u in updates]) - function_of(adapter)


def best_rank(function: Vectors) -> Vectors:
    """The best approximation of rank R of each layer of a vector, the head as it is."""
    parts, size = [], D * K
    for number in range(len(PATHS)):
        u, s, vh = np.linalg.svd(function[number * size : (number + 1) * size].reshape(D, K))
        parts.append(((u[:, :R] * s[:R]) @ vh[:R]).ravel())
    return np.concatenate([*parts, function[len(PATHS) * size :]])


def step_of(rule: Rule, adapter: AdapterState, updates: Sequence[ClientUpdate]) -> Vectors:
    return function_of(rule(adapter, updates)) - function_of(adapter)


def krum_directly(points: Vectors, num_malicious: int, number: int) -> list[int]:
    scores = []
    for place, point in enumerate(points):
        squares = sorted(float(((point - other) ** 2).sum()) for j, other in enumerate(points) if j != place)
        scores.append(sum(squares[: len(points) - num_malicious - 2]))
    return sorted(sorted(range(len(points)), key=lambda place: scores[place])[:number])


def geometric_median_directly(points: Vectors, weights: Vectors) -> Vectors:
    z = np.average(points, axis=0, weights=weights)
    for _ in range(20_000):
        pull = weights / np.linalg.norm(points - z, axis=1)
        z = pull @ points / pull.sum()
    return z


def clipping_directly(points: Vectors, radius: float | None, num_iterations: int) -> Vectors:
    v = np.zeros(points.shape[1])
    for _ in range(num_iterations):
        lengths = np.linalg.norm(points - v, axis=1)
        bound = np.median(lengths) if radius is None else radius
        v = v + ((points - v) * np.minimum(1, bound / lengths)[:, None]).mean(axis=0)
    return v


def as_sent(adapter: AdapterState, roles: Sequence[str], step: Vectors) -> Vectors:
    """What a server can make of a step: where both factors train, its best rank."""
    whole = function_of(adapter) + step
    return (best_rank(whole) if roles == BOTH else whole) - function_of(adapter)


ROLES = pytest.mark.parametrize("roles", [B_ONLY, A_ONLY, BOTH], ids=["B", "A", "both"])


@pytest.mark.parametrize("num_clients", [1, 2, 5, 8])
def test_the_median_and_the_trimmed_mean_are_those_of_every_number(num_clients: int) -> None:
    adapter = start()
    updates = honest(adapter, BOTH, num_clients)
    for slot in updates[0].tensors:
        values = np.stack([update.tensors[slot].numpy() for update in updates])
        found = CoordinateMedian()(adapter, updates).tensors[slot].numpy()
        assert np.allclose(found, np.median(values, axis=0), rtol=0, atol=1e-15)
        for f in range((num_clients + 1) // 2):
            middle = np.sort(values, axis=0)[f : num_clients - f].mean(axis=0)
            assert np.allclose(TrimmedMean(f)(adapter, updates).tensors[slot].numpy(), middle, rtol=0, atol=1e-14)


@ROLES
def test_inner_products_and_distances_are_those_of_dense_matrices(roles: Sequence[str]) -> None:
    adapter = start()
    updates = honest(adapter, roles, 6)
    points = moves_of(adapter, updates)
    found = gram(adapter, updates)
    assert np.allclose(found.numpy(), points @ points.T, rtol=1e-11, atol=1e-12)
    dense = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    assert np.allclose(squared_distances(found).numpy(), dense, rtol=1e-10, atol=1e-12)
    coefficients = np.array([0.5, 0.2, 0.0, 0.1, 0.1, 0.0])
    wanted = np.linalg.norm(points - coefficients @ points, axis=1)
    assert np.allclose(distances_from(found, torch.from_numpy(coefficients)).numpy(), wanted, rtol=1e-10)


@ROLES
@pytest.mark.parametrize(("num_malicious", "num_selected"), [(1, None), (2, None), (2, 1), (2, 3), (0, 1)])
def test_multi_krum_is_the_mean_of_the_chosen(roles: Sequence[str], num_malicious: int, num_selected: int) -> None:
    adapter = start()
    updates = honest(adapter, roles, 9)
    points = moves_of(adapter, updates)
    chosen = krum_directly(points, num_malicious, num_selected or 9 - num_malicious)
    wanted = as_sent(adapter, roles, points[chosen].mean(axis=0))
    assert np.allclose(step_of(MultiKrum(num_malicious, num_selected), adapter, updates), wanted, atol=1e-10)


@ROLES
@pytest.mark.parametrize("weights", [(1.0,) * 7, (1.0, 2.0, 3.0, 1.0, 2.0, 1.0, 2.0)], ids=["alike", "unlike"])
def test_the_geometric_median_is_that_of_dense_vectors(roles: Sequence[str], weights: Sequence[float]) -> None:
    adapter = start()
    updates = [replace(u, weight=w) for u, w in zip(honest(adapter, roles, 7), weights, strict=True)]
    wanted = geometric_median_directly(moves_of(adapter, updates), np.array(weights))
    assert np.allclose(step_of(GeometricMedian(), adapter, updates), as_sent(adapter, roles, wanted), atol=1e-9)


def test_the_geometric_median_has_its_closed_forms() -> None:
    """On a line it is the median; of the corners of an equilateral triangle their mean; one of most weight is it."""
    line = torch.tensor([[0.0], [1.0], [7.0], [8.0], [100.0]]).double()
    ones = torch.ones(5, dtype=torch.float64)
    assert float(weiszfeld(line @ line.T, ones, smoothing=1e-9, num_iterations=20_000) @ line[:, 0]) == pytest.approx(
        7.0, abs=1e-3
    )
    angles = 2 * torch.pi * torch.arange(3).double() / 3
    corners = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = weiszfeld(corners @ corners.T, ones[:3], smoothing=1e-9, num_iterations=1000)
    assert torch.allclose(found, torch.full((3,), 1 / 3).double())
    heavy = torch.tensor([5.0, 1.0, 1.0]).double()
    found = weiszfeld(corners @ corners.T, heavy, smoothing=1e-9, num_iterations=20_000)
    assert torch.allclose(found @ corners, corners[0], atol=1e-3)


@ROLES
@pytest.mark.parametrize(("radius", "num_iterations"), [(None, 1), (None, 5), (0.3, 4), (1e9, 2)])
def test_centered_clipping_is_that_of_dense_vectors(
    roles: Sequence[str], radius: float | None, num_iterations: int
) -> None:
    adapter = start()
    updates = honest(adapter, roles, 7)
    wanted = clipping_directly(moves_of(adapter, updates), radius, num_iterations)
    found = step_of(CenteredClipping(radius, num_iterations), adapter, updates)
    assert np.allclose(found, as_sent(adapter, roles, wanted), atol=1e-10)


def in_other_gauges(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """The same functions: every client multiplies its factors by a matrix of its own and by the inverse."""
    generator = torch.Generator().manual_seed(7)
    turned = []
    for update in updates:
        tensors = dict(update.tensors)
        for path in PATHS:
            gauge = torch.eye(R) * 2 + 0.5 * torch.randn(R, R, generator=generator)
            gauge = (gauge * (1 if update.client_id % 2 else -3)).double()
            tensors[Slot(path, LORA_B)] = tensors[Slot(path, LORA_B)] @ gauge
            tensors[Slot(path, LORA_A)] = torch.linalg.solve(gauge, tensors[Slot(path, LORA_A)])
        turned.append(replace(update, tensors=tensors))
    return turned


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_no_gauge_of_a_client_changes_a_rule_of_distances(name: str) -> None:
    adapter = start()
    updates = honest(adapter, BOTH, 9)
    one, other = (step_of(BY_DISTANCE[name], adapter, sent) for sent in (updates, in_other_gauges(updates)))
    assert np.allclose(one, other, atol=1e-9) and np.abs(one).max() > 0.01


@pytest.mark.parametrize("name", BY_DISTANCE)
@pytest.mark.parametrize("roles", [B_ONLY, BOTH], ids=["B", "both"])
def test_no_gauge_of_the_broadcast_changes_a_rule_of_distances(name: str, roles: Sequence[str]) -> None:
    """Everybody holds (B G, G^-1 A): the same functions go in, and the same function comes out."""
    adapter = start()
    updates = honest(adapter, roles, 9)
    gauge = torch.tensor([[2.0, 1.0, 0.0], [0.0, -0.3, 1.0], [0.0, 0.0, 5.0]]).double()

    def turned(slot: Slot, tensor: Tensor) -> Tensor:
        if slot.role == HEAD:
            return tensor
        return tensor @ gauge if slot.role == LORA_B else torch.linalg.solve(gauge, tensor)

    there = replace(adapter, tensors={slot: turned(slot, t) for slot, t in adapter.tensors.items()})
    sent = [replace(u, tensors={slot: turned(slot, t) for slot, t in u.tensors.items()}) for u in updates]
    assert np.allclose(step_of(BY_DISTANCE[name], adapter, updates), step_of(BY_DISTANCE[name], there, sent), atol=1e-9)


@pytest.mark.parametrize("name", BY_COORDINATE)
def test_a_rule_of_coordinates_depends_on_the_basis_and_bounds_a_minority_that_takes_another(name: str) -> None:
    adapter, rule = start(), BY_COORDINATE[name]
    updates = honest(adapter, BOTH, 9)
    assert not np.allclose(step_of(rule, adapter, updates), step_of(rule, adapter, in_other_gauges(updates)), atol=0.1)
    after = rule(adapter, [*updates[:7], *in_other_gauges(updates[7:])])
    for slot in updates[0].tensors:
        values = torch.stack([update.tensors[slot] for update in updates[:7]])
        assert (after.tensors[slot] >= values.amin(0) - 1e-12).all()
        assert (after.tensors[slot] <= values.amax(0) + 1e-12).all()


HOSTILE: dict[str, Callable[[Tensor, Slot], Tensor]] = {
    "huge": lambda sent, slot: torch.full_like(sent, 9.9e5),
    "a thousand times as far": lambda sent, slot: sent + 1e3 * torch.ones_like(sent),
    "(-B, -A)": lambda sent, slot: -sent,
    "(k B, A / k)": lambda sent, slot: sent * 1e3 if slot.role == LORA_B else sent / 1e3,
}


def attacked(updates: Sequence[ClientUpdate], attack: str, num_bad: int) -> list[ClientUpdate]:
    changed = [replace(u, tensors={s: HOSTILE[attack](t, s) for s, t in u.tensors.items()}) for u in updates[:num_bad]]
    return [*changed, *updates[num_bad:]]


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("name", RULES)
def test_as_many_as_a_rule_is_made_for_carry_it_nowhere(name: str, attack: str) -> None:
    """2 of 9, which is also what Krum and the trimmed mean are told; the mean is the control."""
    adapter, num_bad = start(), 2
    updates = honest(adapter, BOTH, 9)
    points = moves_of(adapter, updates[num_bad:])
    spread = np.linalg.norm(points - points.mean(axis=0), axis=1).max()

    def distance(rule: Rule) -> float:
        return float(np.linalg.norm(step_of(rule, adapter, attacked(updates, attack, num_bad)) - points.mean(axis=0)))

    assert distance(RULES[name]) < 2 * spread
    assert distance(weighted_mean) > 5 * spread


@pytest.mark.parametrize(
    ("rule", "num_bad", "breaks"),
    [
        (CoordinateMedian(), 4, False),
        (CoordinateMedian(), 5, True),
        (TrimmedMean(3), 3, False),
        (TrimmedMean(3), 4, True),
        (MultiKrum(3), 3, False),
        (MultiKrum(3), 6, True),
        (GeometricMedian(), 4, False),
        (GeometricMedian(), 5, True),
        (CenteredClipping(), 4, False),
        (CenteredClipping(), 5, True),
    ],
)
def test_a_rule_breaks_where_it_is_said_to_and_not_before(rule: Rule, num_bad: int, breaks: bool) -> None:
    """Of 9 clients, who all send the same huge values."""
    adapter = start()
    updates = honest(adapter, B_ONLY, 9)
    step = step_of(rule, adapter, attacked(updates, "a thousand times as far", num_bad))
    assert (np.linalg.norm(step) > 50) == breaks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_hostile_clients_a_rule_is_the_mean(dtype: torch.dtype) -> None:
    adapter = start(dtype)
    updates = [replace(u, tensors={s: t.to(dtype) for s, t in u.tensors.items()}) for u in honest(start(), B_ONLY, 5)]
    mean = weighted_mean(adapter, updates).fingerprint()
    assert TrimmedMean(0)(adapter, updates).fingerprint() == mean == MultiKrum(0)(adapter, updates).fingerprint()
    far = CenteredClipping(radius=1e9, num_iterations=1)(adapter, updates)
    assert np.allclose(function_of(far), function_of(weighted_mean(adapter, updates)), atol=1e-6)
    both = honest(start(), BOTH, 5)
    assert MultiKrum(0)(start(), both).fingerprint() == svd_redistribution(start(), both).fingerprint()


@ROLES
@pytest.mark.parametrize("name", [name for name in RULES if name not in ("trimmed", "krum")])
def test_one_update_or_equal_ones_give_that_update(name: str, roles: Sequence[str]) -> None:
    adapter = start()
    (update,) = honest(adapter, roles, 1)
    for num_clients in (1, 2, 6):
        alike = [replace(update, client_id=client) for client in range(num_clients)]
        found = step_of(RULES[name], adapter, alike)
        assert np.allclose(found, moves_of(adapter, [update])[0], atol=1e-9), num_clients


@pytest.mark.parametrize("name", RULES)
def test_updates_that_moved_nothing_move_nothing(name: str) -> None:
    adapter = start()
    still = {slot: tensor for slot, tensor in adapter.tensors.items() if slot.role in B_ONLY}
    updates = [ClientUpdate(client, still, 1.0, 0) for client in range(7)]
    assert np.allclose(step_of(RULES[name], adapter, updates), 0, atol=1e-12)
    one = replace(honest(adapter, B_ONLY, 1)[0], client_id=7)
    assert np.linalg.norm(step_of(RULES[name], adapter, [*updates, one])) < 0.51 * np.linalg.norm(
        moves_of(adapter, [one])
    )


def test_ties_go_to_the_lower_client_whatever_the_order() -> None:
    adapter = start()
    (one, other) = honest(adapter, B_ONLY, 2)
    updates = [replace(one if client < 3 else other, client_id=client) for client in range(6)]
    rule = MultiKrum(1, num_selected=3)
    for order in (updates, updates[::-1]):
        assert np.allclose(step_of(rule, adapter, order), moves_of(adapter, [one])[0], atol=1e-12)
    assert krum_scores(torch.zeros(5, 5), 1).tolist() == [0.0] * 5


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(1), MultiKrum(1), CenteredClipping()])
def test_unequal_weights_are_refused_but_by_the_geometric_median(rule: Rule) -> None:
    adapter = start()
    updates = [replace(u, weight=1.0 + u.client_id) for u in honest(adapter, B_ONLY, 5)]
    with pytest.raises(InputError, match="Expected weighting=uniform for method.aggregate=.*got weights from 1 to 5"):
        rule(adapter, updates)
    GeometricMedian()(adapter, updates)


@pytest.mark.parametrize(
    ("rule", "least"), [(TrimmedMean(2), 5), (MultiKrum(2), 7), (MultiKrum(0, 3), 3), (MultiKrum(1, 8), 9)]
)
def test_too_few_updates_are_refused(rule: Any, least: int) -> None:
    adapter = start()
    assert rule.least_updates == least
    rule(adapter, honest(adapter, B_ONLY, least))
    with pytest.raises(TooFewUpdates, match=f"at least {least} usable updates in a round for method.aggregate="):
        rule(adapter, honest(adapter, B_ONLY, least - 1))
    with pytest.raises(ValueError, match="at least one update"):
        rule(adapter, [])


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: TrimmedMean(-1), "num_malicious"),
        (lambda: MultiKrum(-1), "num_malicious"),
        (lambda: MultiKrum(1, 0), "num_selected"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing"),
        (lambda: CenteredClipping(radius=0.0), "radius"),
        (lambda: CenteredClipping(num_iterations=0), "num_iterations"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make: Callable[[], Rule], key: str) -> None:
    with pytest.raises(InputError, match=f"Expected {key} in"):
        make()


def round_of(rule: Any, num_updates: int, *, cohort: int = 6) -> Any:
    adapter = start()
    method = Method("krum", Always([LORA_B]), rule, keep, trained_block)
    updates = honest(adapter, (LORA_B,), num_updates)
    return run_round(ServerState(adapter), range(cohort), pool=Outcomes(updates), method=method)


def test_a_round_with_too_few_updates_keeps_its_adapter_and_says_so() -> None:
    state, diagnostics = round_of(MultiKrum(1), 4)
    assert state.adapter.fingerprint() == start().fingerprint() and state.round_index == 1
    assert diagnostics.trained == () and diagnostics.bytes_up == 0 and diagnostics.change is None
    rejected = [d for d in diagnostics.dropouts if d.reason == "too_few"]
    assert rejected == [Dropout(client, "rejected", "too_few") for client in range(4)]
    assert {d.client_id for d in diagnostics.dropouts if d.reason == "no_answer"} == {4, 5}
    state, diagnostics = round_of(MultiKrum(1), 5)
    assert diagnostics.trained == (0, 1, 2, 3, 4) and state.adapter.fingerprint() != start().fingerprint()


def test_a_round_with_too_few_updates_is_below_any_quorum() -> None:
    adapter = start()
    method = Method("krum", Always([LORA_B]), MultiKrum(1), keep, trained_block)
    pool = Outcomes(honest(adapter, (LORA_B,), 4))
    rounds = federated_rounds(
        ServerState(adapter),
        pool=pool,
        method=method,
        num_rounds=1,
        num_clients=6,
        cohort_size=6,
        max_participations=1,
        seed=0,
        quorum=1,
    )
    assert next(rounds)[0].round_index == 0  # abandoned: it is asked again


def test_momentum_has_coordinates_where_one_factor_trains() -> None:
    for rule in RULES.values():
        method = Method("robust", Always([LORA_B]), rule, keep, trained_block)
        assert LORA_B in method.momentum_roles
        both = replace(method, block_schedule=Always([LORA_A, LORA_B]))
        assert (LORA_B in both.momentum_roles) == (rule in BY_COORDINATE.values())


def wrong_metric(adapter: AdapterState, held: Sequence[ClientUpdate]) -> Tensor:
    flat = torch.stack([torch.cat([u.tensors[s].flatten() for s in sorted(u.tensors)]) for u in held])
    return flat @ flat.T


def test_distances_of_factors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_krum, "gram", wrong_metric)
    with pytest.raises(AssertionError):
        for selected in (1, 3, None):
            test_multi_krum_is_the_mean_of_the_chosen(B_ONLY, 2, selected)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        test_no_gauge_of_a_client_changes_a_rule_of_distances("krum")


def test_a_mean_of_factors_after_a_choice_by_products_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_factors(adapter: AdapterState, held: Sequence[ClientUpdate], coefficients: Sequence[float]) -> AdapterState:
        return weighted_mean(adapter, [replace(u, weight=w) for u, w in zip(held, coefficients, strict=True)])

    monkeypatch.setattr(geometric_median, "combined", of_factors)
    with pytest.raises(AssertionError):
        test_as_many_as_a_rule_is_made_for_carry_it_nowhere("geometric", "(-B, -A)")


def test_krum_that_is_its_own_neighbour_is_seen() -> None:
    wrong = mutant(multi_krum, ("torch.inf", "0.0"))
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])
    squares = (points - points.T).square()
    assert krum_scores(squares, 1).tolist() == [5.0, 2.0, 2.0, 5.0, 19013.0]
    assert not np.array_equal(wrong.krum_scores(squares, 1).numpy(), krum_scores(squares, 1).numpy())


def test_a_combination_with_what_was_broadcast_stays_that_far_behind() -> None:
    adapter = start()
    updates = honest(adapter, B_ONLY, 2)
    points = moves_of(adapter, updates)
    found = function_of(combined(adapter, updates, [0.25, 0.25], stay=0.5)) - function_of(adapter)
    assert np.allclose(found, 0.25 * points.sum(axis=0), atol=1e-12)
    assert clipped_centre(torch.zeros(3, 3).double(), radius=None, num_iterations=2).sum() == pytest.approx(1.0)
