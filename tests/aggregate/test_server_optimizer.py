"""Server optimisers: closed forms for a steady direction, an independent optimiser, and the limits that are the mean.

Mutants this file kills: a pseudo-gradient of the wrong sign; moments that are forgotten between rounds, or shared by
clients; Adam with a bias correction (Flower's) or a second moment that starts at 0; Yogi with Adam's second moment;
a second moment of the momentum instead of Delta; moments of tensors that did not train; weights that do not reach it.
"""

import math
from dataclasses import replace

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, Slot, num_values
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.server_optimizer import MOMENTUM, SECOND_MOMENT, FedAdam, FedAvgM, FedYogi
from fedlr.methods.method import keep, trained_block
from tests.methods_of_files import method_of

SLOT = Slot("layer", LORA_B)
RULES = [FedAvgM(), FedAdam(), FedYogi()]


def one_number(value: float = 0.0) -> AdapterState:
    slots = {Slot("layer", LORA_A): torch.ones(1, 1).double(), SLOT: torch.full((1, 1), value).double()}
    return AdapterState(slots, scale=1.0)


def towards(adapter: AdapterState, delta: float, *, weight: float = 1.0, client_id: int = 0) -> ClientUpdate:
    """A client that went `delta` from what it was sent."""
    return ClientUpdate(client_id, {SLOT: adapter.tensors[SLOT] + delta}, weight, 0)


def walk(rule, deltas) -> list[float]:
    """The positions after rounds whose means are these far from the broadcast."""
    adapter, positions = one_number(), []
    for delta in deltas:
        adapter = rule(adapter, [towards(adapter, delta)])
        positions.append(float(adapter.tensors[SLOT]))
    return positions


# The mean as a limit


@pytest.mark.parametrize("trained", [(LORA_B,), (LORA_A, LORA_B, HEAD)])
def test_without_momentum_and_at_lr_1_it_is_the_mean_bit_for_bit(federation, trained):
    adapter, updates = federation(*trained, dtype=torch.float32)
    after = FedAvgM(lr=1.0, momentum=0.0)(adapter, updates)
    assert after.fingerprint() == weighted_mean(adapter, updates).fingerprint() != adapter.fingerprint()


def test_in_float64_it_is_the_mean_to_rounding(federation):
    adapter, updates = federation(LORA_B)
    after, mean = FedAvgM(lr=1.0, momentum=0.0)(adapter, updates), weighted_mean(adapter, updates)
    assert all(torch.allclose(after.tensors[slot], mean.tensors[slot], rtol=0, atol=1e-14) for slot in mean.tensors)


@pytest.mark.parametrize("rule", [FedAdam, FedYogi])
def test_without_adaptivity_it_is_the_mean(federation, rule):
    """lr = tau -> infinity: the step lr m / (sqrt(v) + tau) becomes m, for v of tau^2 twice that far down."""
    adapter, updates = federation(LORA_B)
    mean = weighted_mean(adapter, updates)
    after = rule(lr=2e9, beta_1=0.0, beta_2=1 - 1e-12, tau=1e9)(adapter, updates)
    assert all(torch.allclose(after.tensors[slot], mean.tensors[slot], atol=1e-6) for slot in mean.tensors)


@pytest.mark.parametrize("rule", [FedAvgM(lr=0.3, momentum=0.0), FedAdam(), FedYogi()])
def test_a_step_goes_the_way_of_the_clients(federation, rule):
    adapter, updates = federation(LORA_B)
    step = {slot: rule(adapter, updates).tensors[slot] - adapter.tensors[slot] for slot in updates[0].tensors}
    mean = {slot: weighted_mean(adapter, updates).tensors[slot] - adapter.tensors[slot] for slot in step}
    assert all((step[slot] * mean[slot] >= 0).all() and step[slot].any() for slot in step)


# Against references


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_fedavgm_is_sgd_with_momentum_on_the_pseudo_gradient(momentum):
    deltas = [1.0, -0.5, 0.25, 3.0, 0.0, -2.0]
    parameter = torch.nn.Parameter(torch.zeros(1).double())
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=momentum)
    expected = []
    for delta in deltas:
        parameter.grad = torch.tensor([-delta]).double()
        optimizer.step()
        expected.append(float(parameter.detach()))
    assert walk(FedAvgM(lr=0.3, momentum=momentum), deltas) == pytest.approx(expected, rel=1e-12)


def test_a_steady_direction_ends_at_lr_over_one_less_momentum():
    positions = walk(FedAvgM(lr=0.1, momentum=0.9), [1.0] * 200)
    assert positions[-1] - positions[-2] == pytest.approx(1.0, rel=1e-8)
    assert positions[0] == pytest.approx(0.1)


def adaptive_steps(delta: float, num_rounds: int, *, second_moment) -> list[float]:
    """Closed form of the positions for a steady Delta: m_t = (1 - beta_1^t) Delta."""
    position, positions = 0.0, []
    for number in range(1, num_rounds + 1):
        position += 0.1 * (1 - 0.9**number) * delta / (math.sqrt(second_moment(number)) + 0.5)
        positions.append(position)
    return positions


@pytest.mark.parametrize("delta", [2.0, -0.01, 0.5])
def test_fedadam_has_its_closed_form_for_a_steady_direction(delta):
    """v_t = beta_2^t tau^2 + (1 - beta_2^t) Delta^2: it starts at tau^2, and nothing is corrected."""
    rule = FedAdam(lr=0.1, beta_1=0.9, beta_2=0.8, tau=0.5)
    closed = adaptive_steps(delta, 12, second_moment=lambda t: 0.8**t * 0.25 + (1 - 0.8**t) * delta**2)
    assert walk(rule, [delta] * 12) == pytest.approx(closed, rel=1e-12)
    from_zero = adaptive_steps(delta, 12, second_moment=lambda t: (1 - 0.8**t) * delta**2)
    assert abs(from_zero[0] / closed[0] - 1) > 1e-3 or delta == 0.5
    corrected = 0.1 * delta / (math.sqrt(delta**2) + 0.5)
    assert abs(corrected / closed[0] - 1) > 1e-2


@pytest.mark.parametrize("delta", [2.0, -3.0])
def test_fedyogi_has_its_closed_form_for_a_steady_direction(delta):
    """v_t = tau^2 + t (1 - beta_2) Delta^2 as long as it is below Delta^2: additive, where Adam's is geometric."""
    rule = FedYogi(lr=0.1, beta_1=0.9, beta_2=0.9, tau=0.5)
    closed = adaptive_steps(delta, 9, second_moment=lambda t: 0.25 + t * 0.1 * delta**2)
    assert walk(rule, [delta] * 9) == pytest.approx(closed, rel=1e-12)
    adam = walk(FedAdam(lr=0.1, beta_1=0.9, beta_2=0.9, tau=0.5), [delta] * 9)
    assert abs(adam[-1] / closed[-1] - 1) > 1e-3


def test_fedyogis_second_moment_falls_by_at_most_the_square_of_delta():
    """v_t = tau^2 - t (1 - beta_2) Delta^2 as long as it is above Delta^2."""
    rule = FedYogi(lr=0.1, beta_1=0.9, beta_2=0.9, tau=0.5)
    closed = adaptive_steps(0.2, 9, second_moment=lambda t: 0.25 - t * 0.1 * 0.04)
    assert walk(rule, [0.2] * 9) == pytest.approx(closed, rel=1e-12)


def test_yogi_forgets_a_large_round_more_slowly_than_adam():
    """After one long step and many short ones, Adam's second moment is gone; Yogi's falls by Delta^2 a round."""
    deltas = [10.0] + [0.1] * 30
    adam, yogi = (rule(lr=1.0, beta_1=0.0, beta_2=0.5, tau=0.01) for rule in (FedAdam, FedYogi))
    last = [walk(rule, deltas)[-1] - walk(rule, deltas)[-2] for rule in (adam, yogi)]
    assert last[0] > 20 * last[1]


def test_the_second_moment_is_that_of_delta_and_not_of_the_momentum():
    """With turning directions the momentum is short; its square would make the steps long."""
    adapter = one_number()
    rule = FedAdam(beta_1=0.9, beta_2=0.0)
    for delta in (1.0, -1.0, 1.0):
        adapter = rule(adapter, [towards(adapter, delta)])
    assert float(adapter.memory[SECOND_MOMENT][SLOT]) == pytest.approx(1.0)
    assert abs(float(adapter.memory[MOMENTUM][SLOT])) < 0.2


# Memory


@pytest.mark.parametrize("rule", RULES)
def test_the_moments_live_in_the_adapter_and_forgetting_them_changes_the_next_round(federation, rule):
    adapter, updates = federation(LORA_B)
    once = rule(adapter, updates)
    names = {MOMENTUM} if isinstance(rule, FedAvgM) else {MOMENTUM, SECOND_MOMENT}
    assert set(once.memory) == names and "control" not in names
    assert all(once.memory[name].keys() == updates[0].tensors.keys() for name in names)
    twice, forgetful = rule(once, updates), rule(replace(once, memory={}), updates)
    assert twice.fingerprint() != forgetful.fingerprint()
    assert rule(once, updates).fingerprint() == twice.fingerprint()
    assert not adapter.memory


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_that_does_not_train_keeps_its_value_its_moments_and_other_memory(federation, rule):
    adapter, updates = federation(LORA_B, HEAD)
    note = {SLOT: torch.ones(1)}
    once = rule(adapter.remembering("note", note), updates)
    only_head = [replace(u, tensors={s: t for s, t in u.tensors.items() if s.role == HEAD}) for u in updates]
    after = rule(once, only_head)
    for slot in updates[0].tensors:
        if slot.role == LORA_B:
            assert after.tensors[slot] is once.tensors[slot]
            assert after.memory[MOMENTUM][slot] is once.memory[MOMENTUM][slot]
        else:
            assert not torch.equal(after.tensors[slot], once.tensors[slot])
    assert after.memory["note"] is note
    assert not any(slot.role == LORA_A for slot in after.memory[MOMENTUM])


# The cohort


@pytest.mark.parametrize("rule", RULES)
def test_only_the_weighted_mean_of_the_cohort_counts(rule):
    """Two clients at different weights are one client at their mean: moments belong to the server."""
    adapter = rule(one_number(), [towards(one_number(), 1.0)])
    cohort = [towards(adapter, 1.0, weight=1.0), towards(adapter, 5.0, weight=3.0, client_id=1)]
    apart, together = rule(adapter, iter(cohort)), rule(adapter, [towards(adapter, 4.0)])
    assert torch.allclose(apart.tensors[SLOT], together.tensors[SLOT], rtol=1e-12)
    scaled = rule(adapter, [replace(update, weight=7 * update.weight) for update in cohort])
    assert torch.allclose(scaled.tensors[SLOT], apart.tensors[SLOT], rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_result_has_the_dtype_of_the_adapter_and_the_moments_are_float64(federation, rule):
    adapter, updates = federation(LORA_B, dtype=torch.float32)
    after = rule(adapter, updates)
    assert {tensor.dtype for tensor in after.tensors.values()} == {torch.float32}
    assert {tensor.dtype for tensors in after.memory.values() for tensor in tensors.values()} == {torch.float64}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (1.0, -0.5)])
def test_weights_that_are_no_weights_are_refused(federation, rule, weights):
    adapter, updates = federation(LORA_B, weights=weights)
    with pytest.raises(ValueError, match="Expected non-negative weights"):
        rule(adapter, updates)


def test_another_rule_may_make_the_mean(federation):
    adapter, updates = federation(LORA_B, dtype=torch.float32)

    def last_client(adapter: AdapterState, updates) -> AdapterState:
        return adapter.with_tensors(list(updates)[-1].tensors)

    after = FedAvgM(momentum=0.0, inner=last_client)(adapter, updates)
    assert after.fingerprint() == last_client(adapter, updates).fingerprint()


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        (FedAvgM, {"lr": 0.0}),
        (FedAvgM, {"lr": float("inf")}),
        (FedAvgM, {"momentum": 1.0}),
        (FedAvgM, {"momentum": -0.1}),
        (FedAdam, {"beta_1": 1.0}),
        (FedAdam, {"beta_2": float("nan")}),
        (FedAdam, {"tau": 0.0}),
        (FedYogi, {"lr": -1.0}),
        (FedYogi, {"beta_2": 1.5}),
    ],
)
def test_arguments_out_of_range_are_refused(rule, arguments):
    (name,) = arguments
    with pytest.raises(InputError, match=f"Expected {name} "):
        rule(**arguments)


@pytest.mark.parametrize(("name", "rule"), [("fedavgm", FedAvgM), ("fedadam", FedAdam), ("fedyogi", FedYogi)])
def test_the_files_train_and_send_lora_B_and_turn_no_factors(federation, name, rule):
    method = method_of(name)
    adapter, _ = federation()
    block = method.block_schedule(0, adapter)
    assert method.name == name and isinstance(method.aggregate, rule) and method.aggregate.inner is weighted_mean
    assert method.finalise is keep and method.broadcast is trained_block and block == {LORA_B}
    assert num_values(method.broadcast(adapter, block).values()) == 3 * (12 + 9)
