"""SCAFFOLD against algorithm 1 (option II) as a plain loop over clients, and what it is for: the right optimum.

Mutants this file kills (in the code: signs of c and of c_k, c left out of the change, |S|/N left out, lr or num_steps
left out, control of personal tensors; here as loops that must differ): the sign of the control term; a control made
from the sum instead of the mean; weights counted in c.
"""

from dataclasses import replace

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.client_rules.rule import LocalPoint
from fedlr.methods.client_rules.scaffold import CONTROL, ScaffoldClient, ScaffoldServer
from tests.client_rules.points import (
    ROLES,
    SHAPES,
    C,
    changes_nothing_it_is_given,
    close,
    draw,
    of_client,
    point_of,
    same,
    serves_clients_apart,
)

SGD = "torch.optim.SGD"
LR, STEPS, N = 0.05, 6, 5
# Client k's loss is h_k / 2 * ||theta - a_k||^2: unlike in curvature, so that averages of local steps miss the optimum.
CURVATURES = (0.2, 1.0, 2.0, 4.0, 8.0)


def initial(*roles: str) -> AdapterState:
    return AdapterState(draw(*roles, num_clients=None, seed=50), scale=1.0)


def targets() -> list:
    return [draw(*ROLES, num_clients=None, seed=100 + client) for client in range(N)]


def play(adapter, cohorts, *, client_rule, server, personal=()):
    """Run rounds on the quadratic losses, all clients of a cohort as one group; return the adapter and every c_k."""
    kept, goals = {client: {} for client in range(N)}, targets()
    trained = adapter.tensors.keys()
    for round_index, cohort in enumerate(cohorts):
        start = {slot: torch.stack([adapter.tensors[slot]] * len(cohort)) for slot in trained}
        memory = {
            slot: torch.stack([kept[client].get(slot, torch.zeros(SHAPES[slot]).double()) for client in cohort])
            for slot in trained
        }
        control = adapter.memory.get(CONTROL, {})
        values = dict(start)
        for step in range(STEPS):
            point = LocalPoint(step, STEPS, values, start, {}, control, memory)
            gradient = {
                slot: torch.stack([CURVATURES[k] * (values[slot][i] - goals[k][slot]) for i, k in enumerate(cohort)])
                for slot in trained
            }
            values = {slot: values[slot] - LR * g for slot, g in client_rule(gradient, point).items()}
        new = client_rule.remember(LocalPoint(STEPS, STEPS, values, start, {}, control, memory))
        for i, client in enumerate(cohort):
            kept[client].update(of_client(new, i))
        updates = [
            ClientUpdate(client, {s: t[i] for s, t in values.items() if s.role not in personal}, 1.0, round_index)
            for i, client in enumerate(cohort)
        ]
        adapter = server(adapter, iter(updates))
    return adapter, kept


def by_the_paper(adapter, cohorts):
    """Algorithm 1, option II, client by client and step by step."""
    x, goals = dict(adapter.tensors), targets()
    c = {slot: torch.zeros_like(t) for slot, t in x.items()}
    c_k = [dict(c) for _ in range(N)]
    for cohort in cohorts:
        ends, changes = [], []
        for k in cohort:
            y = dict(x)
            for _ in range(STEPS):
                y = {s: y[s] - LR * (CURVATURES[k] * (y[s] - goals[k][s]) - c_k[k][s] + c[s]) for s in y}
            after = {s: c_k[k][s] - c[s] + (x[s] - y[s]) / (STEPS * LR) for s in y}
            changes.append({s: after[s] - c_k[k][s] for s in y})
            ends.append(y)
            c_k[k] = after
        x = {s: x[s] + sum(y[s] - x[s] for y in ends) / len(cohort) for s in x}
        c = {s: c[s] + len(cohort) / N * sum(change[s] for change in changes) / len(cohort) for s in x}
    return x, c, c_k


COHORTS = [(0, 1, 2), (2, 4), (0, 3, 4), (1,), (0, 1, 2, 3, 4), (1, 3)]
CLIENT, SERVER = ScaffoldClient(lr=LR, optimizer=SGD), ScaffoldServer(lr=LR, num_steps=STEPS, num_clients=N)


def test_rounds_are_those_of_the_paper_without_its_second_upload():
    after, kept = play(initial(*ROLES), COHORTS, client_rule=CLIENT, server=SERVER)
    x, c, c_k = by_the_paper(initial(*ROLES), COHORTS)
    assert close(after.tensors, x)
    assert close(after.memory[CONTROL], c)
    assert all(close(kept[k], c_k[k]) for k in range(N))


def test_the_control_is_the_mean_of_what_all_clients_keep():
    after, kept = play(initial(LORA_B), COHORTS, client_rule=CLIENT, server=SERVER)
    for slot, c in after.memory[CONTROL].items():
        assert torch.allclose(c, sum(kept[k][slot] for k in range(N)) / N, atol=1e-12)


def test_what_a_client_keeps_is_the_mean_of_its_noised_gradients():
    point, gradients = point_of(*ROLES, control=True, num_steps=3), [draw(*ROLES, seed=s) for s in (7, 8, 9)]
    values = dict(point.start)
    for step, gradient in enumerate(gradients):
        changed = CLIENT(gradient, replace(point, step=step, values=values))
        values = {slot: values[slot] - LR * changed[slot] for slot in values}
    kept = CLIENT.remember(replace(point, step=3, values=values))
    assert close(kept, {slot: sum(g[slot] for g in gradients) / 3 for slot in point.values})


def optimum() -> dict:
    goals = targets()
    return {s: sum(h * goals[k][s] for k, h in enumerate(CURVATURES)) / sum(CURVATURES) for s in goals[0]}


def distance(left, right) -> float:
    return max(float((left[slot] - right[slot]).abs().max()) for slot in left)


class WrongSign(ScaffoldClient):
    """Mutant: gradient - c + c_k."""

    def __call__(self, gradient, point):
        return {slot: 2 * gradient[slot] - value for slot, value in super().__call__(gradient, point).items()}


def test_scaffold_finds_the_optimum_that_plain_averages_miss():
    everybody = [tuple(range(N))] * 150
    found, _ = play(initial(*ROLES), everybody, client_rule=CLIENT, server=SERVER)
    plain, _ = play(initial(*ROLES), everybody, client_rule=CLIENT, server=weighted_mean)  # no control, no correction
    assert distance(found.tensors, optimum()) < 1e-8
    assert distance(plain.tensors, optimum()) > 0.05


def test_the_other_sign_of_the_control_misses_the_optimum():
    wrong, _ = play(
        initial(*ROLES), [tuple(range(N))] * 150, client_rule=WrongSign(lr=LR, optimizer=SGD), server=SERVER
    )
    assert not distance(wrong.tensors, optimum()) < 0.05


def test_corrections_of_a_whole_federation_add_up_to_zero():
    after, kept = play(initial(LORA_B), COHORTS, client_rule=CLIENT, server=SERVER)
    memory = {slot: torch.stack([kept[k][slot] for k in range(N)]) for slot in after.tensors}
    zero = {slot: torch.zeros_like(value) for slot, value in memory.items()}
    corrections = CLIENT(zero, LocalPoint(0, STEPS, zero, zero, {}, after.memory[CONTROL], memory))
    for correction in corrections.values():
        assert correction.abs().max() > 0.01
        assert torch.allclose(correction.sum(dim=0), torch.zeros(()).double(), atol=1e-12)


def test_the_first_round_is_plain():
    gradient = draw(*ROLES)
    assert same(CLIENT(gradient, point_of(*ROLES)), gradient)


def test_a_client_that_never_took_part_has_no_control_of_its_own():
    gradient, point = draw(LORA_B), replace(point_of(LORA_B, control=True), memory={})
    changed = CLIENT(gradient, point)
    assert close(changed, {slot: value + point.control[slot] for slot, value in gradient.items()})


def test_personal_tensors_are_not_controlled():
    # Mutant: a control of all that trains would need the personal tensors in the updates.
    after, kept = play(initial(*ROLES), COHORTS, client_rule=CLIENT, server=SERVER, personal=(LORA_B,))
    assert {slot.role for slot in after.memory[CONTROL]} == {LORA_A, HEAD}
    point = replace(point_of(*ROLES, control=True), control=after.memory[CONTROL])
    gradient = draw(*ROLES)
    for slot, changed in CLIENT(gradient, point).items():
        assert torch.equal(changed, gradient[slot]) == (slot.role == LORA_B)


def test_a_tensor_that_rests_in_a_round_keeps_its_control():
    adapter, _ = play(initial(*ROLES), COHORTS[:2], client_rule=CLIENT, server=SERVER)
    update = ClientUpdate(0, {slot: t + 1 for slot, t in adapter.tensors.items() if slot.role == LORA_B}, 1.0, 2)
    after = SERVER(adapter, [update])
    assert after.memory[CONTROL].keys() == adapter.memory[CONTROL].keys()
    for slot, control in after.memory[CONTROL].items():
        assert torch.equal(control, adapter.memory[CONTROL][slot]) == (slot.role != LORA_B)


def test_the_model_is_the_weighted_mean_and_other_memory_is_kept():
    adapter = initial(*ROLES).remembering("momentum", draw(LORA_B, num_clients=None))
    updates = [ClientUpdate(k, draw(LORA_B, num_clients=None, seed=k), 2.0, 0) for k in range(3)]
    after = SERVER(adapter, iter(updates))
    assert same(after.tensors, weighted_mean(adapter, updates).tensors)
    assert after.memory["momentum"] is adapter.memory["momentum"]
    assert CONTROL not in adapter.memory


def test_the_control_of_a_coarse_adapter_is_float32():
    coarse = {slot: tensor.bfloat16() for slot, tensor in draw(LORA_B, num_clients=None).items()}
    after = SERVER(AdapterState(coarse, scale=1.0), [ClientUpdate(0, coarse, 1.0, 0)])
    assert {tensor.dtype for tensor in after.tensors.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in after.memory[CONTROL].values()} == {torch.float32}


def test_arguments_are_left_alone_and_clients_apart():
    gradient, point = draw(*ROLES), point_of(*ROLES, control=True)
    assert changes_nothing_it_is_given(CLIENT, gradient, point)
    assert serves_clients_apart(CLIENT, gradient, point)
    assert len(point.values) == len(SHAPES) and C > 1


def test_weights_by_size_are_refused():
    updates = [ClientUpdate(k, draw(LORA_B, num_clients=None), 1.0 + k, 0) for k in range(2)]
    with pytest.raises(InputError, match="Expected weighting=uniform for SCAFFOLD"):
        SERVER(initial(*ROLES), iter(updates))


def test_more_updates_than_clients_are_refused():
    updates = [ClientUpdate(k, draw(LORA_B, num_clients=None), 1.0, 0) for k in range(N + 1)]
    with pytest.raises(ValueError, match="Expected at most num_clients=5 updates, got 6"):
        SERVER(initial(*ROLES), iter(updates))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "torch.optim.AdamW"},
        {"momentum": 0.9},
        {"weight_decay": 0.01},
    ],
)
def test_another_optimizer_than_plain_sgd_is_refused(options):
    with pytest.raises(InputError, match="Expected trainer.optimizer.* for SCAFFOLD"):
        ScaffoldClient(**{"lr": LR, "optimizer": SGD, **options})


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"num_steps": 0}, {"num_clients": 0}, {"lr": float("nan")}])
def test_arguments_that_are_not_positive_are_refused(wrong):
    with pytest.raises(InputError, match="to be positive and finite"):
        ScaffoldServer(**{"lr": LR, "num_steps": STEPS, "num_clients": N, **wrong})
