"""One factor a round: RoLoRA alternates it, AS-LoRA chooses it by layer. Both are exact in every round.

Mutants this file kills: lora_A first, while lora_B is zero; a broadcast of the trained factor alone, for a client that
missed a round; a score of |d|^2 with the noise in it, or without the turning back; scores of the other layer; a factor
that is never tried, or never again; scores that are forgotten, or kept of a factor that did not train.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, Block, ClientUpdate, Slot, num_values
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.layer_choice import SCORE, WAIT, BetterFactor, ScoredMean
from fedlr.methods.measure.diagnostics import aggregation_error
from fedlr.methods.measure.ideal import Ideal
from fedlr.methods.method import Alternate, Method, full_adapter, trained_block
from tests.methods_of_files import method_of

D, K, R = 12, 20, 3
PATHS = ("layer.0", "layer.1")
A0, B0 = Slot("layer.0", LORA_A), Slot("layer.0", LORA_B)


def load(name: str) -> Method:
    method = method_of(name)
    assert isinstance(method, Method) and method.name == name
    return method


def make_adapter(*, trained: bool = False) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    slots = {Slot(path, LORA_A): torch.randn(R, K, generator=generator).double() / K**0.5 for path in PATHS}
    for path in PATHS:
        drawn = torch.randn(D, R, generator=generator).double()
        slots[Slot(path, LORA_B)] = drawn if trained else torch.zeros_like(drawn)
    return AdapterState(slots, scale=1.0)


def moved(adapter: AdapterState, steps: dict[Slot, Tensor], *, weight: float = 1.0, client_id: int = 0) -> ClientUpdate:
    return ClientUpdate(client_id, {slot: adapter.tensors[slot] + step for slot, step in steps.items()}, weight, 0)


def noisy_clients(adapter: AdapterState, block: Block, *, round_index: int, num_clients: int = 3) -> list[ClientUpdate]:
    generator = torch.Generator().manual_seed(round_index)
    cohort = []
    for client_id in range(num_clients):
        trained = adapter.select(block).items()
        steps = {slot: 0.1 * torch.randn(tensor.shape, generator=generator).double() for slot, tensor in trained}
        cohort.append(moved(adapter, steps, weight=1.0 + client_id, client_id=client_id))
    return cohort


def ones(slot: Slot, size: float = 1.0) -> Tensor:
    """A step of Frobenius norm `size`."""
    tensor = make_adapter().tensors[slot]
    return size * torch.ones_like(tensor) / tensor.numel() ** 0.5


def scored(adapter: AdapterState, steps: dict[Slot, Tensor], *, rule: ScoredMean | None = None) -> AdapterState:
    """The adapter after a round of one client that took these steps; lora_B and lora_A go back to where they were."""
    after = (rule or ScoredMean(decay=0.0))(adapter, [moved(adapter, steps)])
    return replace(adapter, memory=after.memory)


# Both methods


@pytest.mark.parametrize("name", ["rolora", "as_lora"])
def test_every_round_is_exact_and_trains_one_factor_a_layer(name):  # (16)
    method, adapter = load(name), make_adapter()
    choices = set()
    for round_index in range(12):
        block = method.block_schedule(round_index, adapter)
        slots = adapter.select(block)
        assert sorted(slot.path for slot in slots) == list(PATHS)
        updates = noisy_clients(adapter, block, round_index=round_index)
        after = method.finalise(method.aggregate(adapter, updates))
        errors = aggregation_error(Ideal.of(adapter, updates), after)
        assert max(errors.values()) < 1e-12
        assert all(after.tensors[slot] is adapter.tensors[slot] for slot in adapter.tensors if slot not in slots)
        choices |= {slot.role for slot in slots}
        adapter = after
    assert choices == {LORA_A, LORA_B}


@pytest.mark.parametrize("name", ["rolora", "as_lora"])
def test_lora_B_is_first_because_lora_A_has_no_gradient_while_it_is_zero(name):
    method, adapter = load(name), make_adapter()
    assert {slot.role for slot in adapter.select(method.block_schedule(0, adapter))} == {LORA_B}
    layer = adapter.factors()["layer.0"]
    lora_A, lora_B = layer.lora_A.clone().requires_grad_(), layer.lora_B.clone().requires_grad_()
    (lora_B @ lora_A).sum().backward()
    assert not lora_A.grad.any() and lora_B.grad.any()
    assert Alternate((LORA_A, LORA_B))(0, adapter) == {LORA_A}  # the mutant: a first round for nothing


@pytest.mark.parametrize("name", ["rolora", "as_lora"])
def test_a_client_that_missed_a_round_gets_both_factors(name):
    """With the trained factor alone it would compute with a product that is nobody's."""
    method, adapter = load(name), make_adapter(trained=True)
    missed = dict(adapter.tensors)
    updates = noisy_clients(adapter, method.block_schedule(0, adapter), round_index=0)
    after = method.aggregate(adapter, updates)
    block = method.block_schedule(1, after)

    def product(broadcast: Callable[[AdapterState, Block], dict[Slot, Tensor]]) -> Tensor:
        held = {**missed, **broadcast(after, block)}
        return held[B0] @ held[A0]

    assert torch.equal(product(method.broadcast), after.tensors[B0] @ after.tensors[A0])
    assert method.broadcast is full_adapter
    assert not torch.allclose(product(trained_block), after.tensors[B0] @ after.tensors[A0])


@pytest.mark.parametrize(
    ("name", "round_index", "up"), [("rolora", 0, R * D), ("rolora", 1, R * K), ("as_lora", 0, R * D)]
)
def test_a_round_sends_one_factor_up_and_both_down(name, round_index, up):
    method, adapter = load(name), make_adapter()
    block = method.block_schedule(round_index, adapter)
    assert num_values(adapter.select(block).values()) == len(PATHS) * up
    assert num_values(method.broadcast(adapter, block).values()) == len(PATHS) * R * (D + K)


def test_rolora_alternates_whatever_the_adapter():
    method = load("rolora")
    blocks = [method.block_schedule(round_index, make_adapter(trained=True)) for round_index in range(4)]
    assert blocks == [{LORA_B}, {LORA_A}, {LORA_B}, {LORA_A}]


# AS-LoRA: the choice


def choices(adapter: AdapterState, schedule: BetterFactor | None = None) -> dict[str, str]:
    block = (schedule or BetterFactor())(7, adapter)
    assert all(isinstance(entry, Slot) for entry in block) and len(block) == len(PATHS)
    return {entry.path: entry.role for entry in block if isinstance(entry, Slot)}


def remembered(scores: dict[Slot, float], waits: dict[Slot, float] | None = None) -> AdapterState:
    adapter = make_adapter(trained=True).remembering(SCORE, {slot: torch.tensor(v) for slot, v in scores.items()})
    waits = dict.fromkeys(scores, 0.0) | (waits or {})
    return adapter.remembering(WAIT, {slot: torch.tensor(wait) for slot, wait in waits.items()})


def test_each_layer_trains_the_factor_of_its_own_higher_score():
    A1, B1 = Slot("layer.1", LORA_A), Slot("layer.1", LORA_B)
    assert choices(remembered({A0: 2.0, B0: 1.0, A1: 1.0, B1: 2.0})) == {"layer.0": LORA_A, "layer.1": LORA_B}
    assert choices(remembered({A0: 1.0, B0: 2.0, A1: 3.0, B1: 2.9})) == {"layer.0": LORA_B, "layer.1": LORA_A}
    assert choices(remembered({A0: 1.0, B0: 1.0, A1: 0.0, B1: 0.0})) == {"layer.0": LORA_B, "layer.1": LORA_B}


def test_a_factor_that_was_never_tried_is_next_and_lora_B_before_lora_A():
    A1, B1 = Slot("layer.1", LORA_A), Slot("layer.1", LORA_B)
    assert choices(make_adapter(trained=True)) == {"layer.0": LORA_B, "layer.1": LORA_B}
    assert choices(remembered({B0: 9.0, A1: 9.0})) == {"layer.0": LORA_A, "layer.1": LORA_B}
    assert choices(remembered({B0: 9.0, A0: 0.0, B1: 0.0, A1: 9.0})) == {"layer.0": LORA_B, "layer.1": LORA_A}


def test_lora_B_of_zero_trains_whatever_the_scores_say():
    adapter = remembered({A0: 9.0, B0: 0.0, Slot("layer.1", LORA_A): 9.0, Slot("layer.1", LORA_B): 0.0})
    blank = adapter.with_tensors({B0: torch.zeros(D, R).double()})
    assert choices(blank) == {"layer.0": LORA_B, "layer.1": LORA_A}


def test_a_factor_that_waited_long_enough_is_tried_again():
    A1, B1 = Slot("layer.1", LORA_A), Slot("layer.1", LORA_B)
    scores = {A0: 0.0, B0: 9.0, A1: 9.0, B1: 0.0}
    adapter = remembered(scores, {A0: 5.0, B1: 4.0})
    assert choices(adapter, BetterFactor(max_wait=5)) == {"layer.0": LORA_A, "layer.1": LORA_A}
    assert choices(adapter, BetterFactor(max_wait=4)) == {"layer.0": LORA_A, "layer.1": LORA_B}
    assert choices(adapter, BetterFactor(max_wait=6)) == {"layer.0": LORA_B, "layer.1": LORA_A}


@pytest.mark.parametrize("max_wait", [1, 3])
def test_no_factor_is_left_for_longer_than_max_wait(max_wait):
    """Also where one factor always looks better; max_wait 1 alternates."""
    adapter, schedule, rule = make_adapter(), BetterFactor(max_wait), ScoredMean()
    history = []
    for round_index in range(13):
        block = schedule(round_index, adapter)
        history.append({slot.role for slot in block if slot.path == "layer.0"})
        steps = {slot: ones(slot, 10.0 if slot.role == LORA_A else 0.1) for slot in block}
        adapter = rule(adapter, [moved(adapter, steps)])
    expected = [LORA_B] + [LORA_B if number % (max_wait + 1) == 0 else LORA_A for number in range(1, 13)]
    assert history == [{role} for role in expected]


# AS-LoRA: the score


def score(adapter: AdapterState, slot: Slot) -> float:
    return float(adapter.memory[SCORE][slot])


def test_the_first_score_of_a_factor_is_the_square_of_its_step():
    adapter = scored(make_adapter(trained=True), {A0: ones(A0, 3.0)})
    assert score(adapter, A0) == pytest.approx(9.0) and adapter.memory[SCORE].keys() == {A0}


@pytest.mark.parametrize(("turn", "expected"), [(1.0, 4.0), (0.5, 3.0), (0.0, 2.0), (-0.5, 1.0), (-1.0, 0.0)])
def test_a_step_that_turns_back_scores_less(turn, expected):
    """|d|^2 (1 + c) / 2: steps of one length, at an angle whose cosine is `turn`."""
    first = torch.zeros(R, K).double()
    first[0, 0] = 2.0
    second = torch.zeros(R, K).double()
    second[0, 0], second[0, 1] = 2.0 * turn, 2.0 * (1 - turn**2) ** 0.5
    adapter = scored(scored(make_adapter(trained=True), {A0: first}), {A0: second})
    assert score(adapter, A0) == pytest.approx(expected)


@pytest.mark.parametrize("curvature", [0.1, 0.5, 0.9, 1.5])
def test_the_score_is_the_second_order_saving_on_a_quadratic(curvature):
    """Loss h x^2 / 2 and steps -eta h x: what one more step of the last length would save, times eta."""
    eta = 1.0
    point = make_adapter(trained=True).with_tensors({B0: torch.zeros(D, R).double()})
    point = point.with_tensors({B0: ones(B0, 5.0)})
    for _ in range(2):
        gradient = curvature * point.tensors[B0]
        last = float((eta * gradient).norm())
        point = ScoredMean(decay=0.0)(point, [moved(point, {B0: -eta * gradient})])
    saving = eta * (last * last / eta - curvature * last**2 / 2)  # <g, d> = |d|^2 / eta at the step's start
    assert score(point, B0) == pytest.approx(saving, rel=1e-9)


def test_scores_are_smoothed_over_the_rounds_in_which_the_factor_trained():
    rule = ScoredMean(decay=0.75)
    adapter = scored(make_adapter(trained=True), {A0: ones(A0, 2.0)}, rule=rule)
    adapter = scored(adapter, {B0: ones(B0, 7.0)}, rule=rule)
    assert score(adapter, A0) == pytest.approx(4.0)
    adapter = scored(adapter, {A0: ones(A0, 6.0)}, rule=rule)
    assert score(adapter, A0) == pytest.approx(0.75 * 4 + 0.25 * 36)
    assert score(adapter, B0) == pytest.approx(49.0)


def test_rounds_of_waiting_are_counted():
    adapter = make_adapter(trained=True)
    for steps in ({A0: ones(A0)}, {B0: ones(B0)}, {B0: ones(B0)}):
        adapter = scored(adapter, steps)
    waits = {slot: float(wait) for slot, wait in adapter.memory[WAIT].items()}
    assert waits == {A0: 2.0, B0: 0.0, Slot("layer.1", LORA_A): 3.0, Slot("layer.1", LORA_B): 3.0}


def test_noise_alone_scores_as_nothing_whatever_the_size_of_the_factor():
    """Mean of 300 rounds of pure noise, decay 0: the square of the mean step is biased by its entries' noise."""
    generator, adapter = torch.Generator().manual_seed(0), make_adapter(trained=True)
    biased, unbiased = {A0: 0.0, B0: 0.0}, {A0: 0.0, B0: 0.0}
    for _ in range(300):
        cohort = []
        for client_id in range(4):
            steps = {slot: torch.randn(adapter.tensors[slot].shape, generator=generator).double() for slot in biased}
            cohort.append(moved(adapter, steps, weight=1.0 + client_id, client_id=client_id))
        after = ScoredMean(decay=0.0)(adapter, cohort)
        for slot in biased:
            step = after.tensors[slot] - adapter.tensors[slot]
            biased[slot] += float(step.square().sum()) / 300
            unbiased[slot] += score(after, slot) / 300
    alone = sum((weight / 10) ** 2 for weight in (1, 2, 3, 4))
    assert biased[A0] == pytest.approx(R * K * alone, rel=0.05)
    assert biased[B0] == pytest.approx(R * D * alone, rel=0.05)
    # Floored at 0 the mean is about 0.4 standard deviations, sqrt(2 entries) at most; the noise itself is gone.
    assert all(unbiased[slot] < 0.25 * biased[slot] for slot in biased)


def test_a_step_that_all_clients_share_scores_its_square_under_noise():
    generator, adapter = torch.Generator().manual_seed(0), make_adapter(trained=True)
    found = []
    for _ in range(300):
        cohort = []
        for client_id in range(4):
            noise = torch.randn(R, K, generator=generator).double()
            cohort.append(moved(adapter, {A0: ones(A0, 10.0) + noise}, weight=1.0 + client_id, client_id=client_id))
        found.append(score(ScoredMean(decay=0.0)(adapter, cohort), A0))
    # One round's sd is about 2 * 10 * sqrt(0.3) + ...: 12; the mean's 0.7. Noise in it would add R K * 0.3 = 18.
    assert sum(found) / 300 == pytest.approx(100.0, abs=3.0)


def test_the_mean_is_the_weighted_mean_and_the_weights_scale_is_not_seen():
    adapter = make_adapter(trained=True)
    updates = noisy_clients(adapter, frozenset({A0, Slot("layer.1", LORA_B)}), round_index=3)
    after = ScoredMean()(adapter, iter(updates))
    assert after.fingerprint() == weighted_mean(adapter, updates).fingerprint()
    scaled = ScoredMean()(adapter, [replace(update, weight=1024 * update.weight) for update in updates])
    assert score(scaled, A0) == pytest.approx(score(after, A0), rel=1e-12)
    one = ScoredMean()(adapter, updates[:1])
    doubled = ScoredMean()(adapter, [*updates[:1], replace(updates[0], client_id=9)])
    assert score(doubled, A0) == pytest.approx(score(one, A0), rel=1e-12)


def test_a_head_is_averaged_and_has_no_score():
    slot = Slot("head.weight", HEAD)
    adapter = make_adapter(trained=True)
    adapter = replace(adapter, tensors={**adapter.tensors, slot: torch.zeros(2, D).double()})
    updates = [moved(adapter, {slot: torch.ones(2, D).double(), A0: ones(A0)}, client_id=k) for k in range(2)]
    after = ScoredMean()(adapter, updates)
    assert torch.equal(after.tensors[slot], torch.ones(2, D).double())
    assert all(slot not in tensors for tensors in after.memory.values()) and "control" not in after.memory


def test_as_lora_learns_what_one_factor_cannot():
    """Clients with their own targets around one product: both factors must move, and the choice settles by itself."""
    method, generator = load("as_lora"), torch.Generator().manual_seed(1)
    adapter = make_adapter()
    target = torch.randn(D, R, generator=generator).double() @ torch.randn(R, K, generator=generator).double() / R
    targets = [target + 0.1 * torch.randn(D, K, generator=generator).double() for _ in range(3)]

    def gap(adapter: AdapterState) -> float:
        return sum(float(torch.dist(f.lora_B @ f.lora_A, target)) for f in adapter.factors().values())

    def play(schedule) -> tuple[float, list[Block]]:
        state, blocks = adapter, []
        for round_index in range(25):
            block = frozenset(state.select(schedule(round_index, state)))
            updates = []
            for client_id, wanted in enumerate(targets):
                steps = {}
                for path, layer in state.factors().items():
                    miss = layer.lora_B @ layer.lora_A - wanted
                    steps[Slot(path, LORA_A)] = -0.1 * layer.lora_B.T @ miss
                    steps[Slot(path, LORA_B)] = -0.1 * miss @ layer.lora_A.T
                updates.append(moved(state, {slot: steps[slot] for slot in block}, client_id=client_id))
            state = method.aggregate(state, updates)
            blocks.append(block)
        return gap(state), blocks

    chosen, blocks = play(method.block_schedule)
    only_B, _ = play(lambda round_index, state: frozenset({LORA_B}))
    assert chosen < 0.7 * only_B
    assert len({frozenset(block) for block in blocks}) > 2  # layers do not always choose alike


@pytest.mark.parametrize("max_wait", [0, -1])
def test_a_wait_below_one_round_is_refused(max_wait):
    with pytest.raises(InputError, match="Expected max_wait to be at least 1"):
        BetterFactor(max_wait)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_does_not_smooth_is_refused(decay):
    with pytest.raises(InputError, match="Expected decay in"):
        ScoredMean(decay)
