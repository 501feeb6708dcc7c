"""FedSVD is FFA-LoRA with a fixed orthonormal lora_A, step by step, under (DP-)SGD; not under AdamW.

Properties (11) and (14), on a two-layer LoRA network in plain torch, float64: 6 unlike clients, 3 a round,
a few DP-SGD steps each, per-example clipping that really clips, and the library's own mean, re-factorisation
and orthonormal rows.

Coupling. After a re-factorisation lora_A is Q A0 with Q orthogonal (R, R), so the same delta_W has lora_B Q^T
and its gradient is that of the fixed arm times Q^T. The Gaussian noise z of the fixed arm becomes z Q^T, of
the same law: with it both arms must take the same path, not only paths of the same distribution.
Legend: D out_features, K in_features, R rank, N examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.optim import SGD, AdamW, Optimizer

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.method import Finaliser, OrthonormalRows, SvdRefactor, keep

SHAPES = {"layer.0": (10, 8), "layer.1": (3, 10)}  # (D, K); in the second, D < R
RANK, SCALE = 4, 2.0
NUM_CLIENTS, COHORT_SIZE, NUM_ROUNDS, NUM_STEPS, BATCH = 6, 3, 12, 4, 16
FLOAT = torch.float64


@dataclass(frozen=True)
class Arm:
    """One federation. `coupled` rotates the noise from the initial basis of lora_A into the current one."""

    finalise: Finaliser
    optimizer: Callable[[list[Tensor]], Optimizer] = partial(SGD, lr=0.5)
    noise_multiplier: float = 0.5
    max_grad_norm: float = 0.4
    per_tensor_clipping: bool = False
    coupled: bool = True
    keeps_optimizer_state: bool = False  # per client, from one of its rounds to the next


@dataclass(frozen=True)
class Trace:
    """After every round delta_W by layer and the adapter; over all steps the share of clipped examples."""

    delta_W: list[dict[str, Tensor]]
    adapters: list[AdapterState]
    clipped: float


def normal(*key: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape))


BASE = {path: normal(1, index, shape=shape) / 2 for index, (path, shape) in enumerate(SHAPES.items())}


def initial_adapter() -> AdapterState:
    """lora_B = 0 and a lora_A whose rows are neither orthogonal nor of norm 1."""
    tensors = {}
    for index, (path, (out, into)) in enumerate(SHAPES.items()):
        tensors[Slot(path, LORA_A)] = normal(2, index, shape=(RANK, into)) / into**0.5
        tensors[Slot(path, LORA_B)] = torch.zeros(out, RANK, dtype=FLOAT)
    return AdapterState(tensors, SCALE)


def client_data(client_id: int) -> tuple[Tensor, Tensor]:
    """Unlike clients: every one has its own shift of the inputs and its own favourite label."""
    x = normal(3, client_id, shape=(40, 8)) + normal(4, client_id, shape=(8,))
    favourite = torch.nn.functional.one_hot(torch.tensor(client_id % 3), 3)
    scores = x @ normal(5, shape=(8, 3)) + 2 * favourite + normal(6, client_id, shape=(40, 3))
    return x, scores.argmax(dim=1)


def example_loss(lora_B: dict[str, Tensor], lora_A: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    W = {path: BASE[path] + SCALE * lora_B[path] @ lora_A[path] for path in SHAPES}
    return torch.nn.functional.cross_entropy(W["layer.1"] @ torch.tanh(W["layer.0"] @ x), y)


def train(
    arm: Arm,
    adapter: AdapterState,
    basis: Mapping[str, Tensor],
    round_index: int,
    client_id: int,
    memory: dict,
) -> tuple[ClientUpdate, float]:
    """DP-SGD on lora_B; returns the update and the share of clipped examples."""
    lora_A = {path: layer.lora_A for path, layer in adapter.factors().items()}
    lora_B = {path: layer.lora_B.clone() for path, layer in adapter.factors().items()}
    optimizer = arm.optimizer(list(lora_B.values()))
    if arm.keeps_optimizer_state and client_id in memory:
        optimizer.load_state_dict(memory[client_id])
    (x, y), num_clipped = client_data(client_id), 0
    for step in range(NUM_STEPS):
        rows = np.random.default_rng((7, round_index, client_id, step)).choice(len(x), BATCH, replace=False)
        grads = vmap(grad(example_loss), in_dims=(None, None, 0, 0))(lora_B, lora_A, x[rows], y[rows])
        norms = {path: g.flatten(1).norm(dim=1) for path, g in grads.items()}  # (N,)
        if not arm.per_tensor_clipping:
            joint = torch.stack(list(norms.values())).norm(dim=0)
            norms = dict.fromkeys(norms, joint)
        for index, (path, g) in enumerate(grads.items()):
            factor = (arm.max_grad_norm / norms[path]).clamp(max=1)
            num_clipped += int((factor < 1).sum())
            noise = normal(8, round_index, client_id, step, index, shape=tuple(lora_B[path].shape))
            if arm.coupled:
                noise = noise @ (basis[path] @ lora_A[path].T)  # z Q^T, with lora_A = Q basis
            noise = arm.noise_multiplier * arm.max_grad_norm * noise
            lora_B[path].grad = (torch.einsum("n,ndr->dr", factor, g) + noise) / BATCH
        optimizer.step()
    memory[client_id] = optimizer.state_dict()
    tensors = {Slot(path, LORA_B): tensor for path, tensor in lora_B.items()}
    share = num_clipped / (NUM_STEPS * BATCH * len(SHAPES))
    return ClientUpdate(client_id, tensors, weight=1.0 + client_id, base_round=round_index), share


def federate(arm: Arm, adapter: AdapterState) -> Trace:
    basis = {path: layer.lora_A for path, layer in adapter.factors().items()}
    memory: dict = {}
    trace, shares = Trace([], [], 0.0), []
    for round_index in range(NUM_ROUNDS):
        cohort = np.random.default_rng((9, round_index)).choice(NUM_CLIENTS, COHORT_SIZE, replace=False)
        trained = [train(arm, adapter, basis, round_index, int(k), memory) for k in sorted(cohort)]
        shares += [share for _, share in trained]
        adapter = arm.finalise(weighted_mean(adapter, [update for update, _ in trained]))
        products = {path: SCALE * f.lora_B @ f.lora_A for path, f in adapter.factors().items()}
        trace.delta_W.append(products)
        trace.adapters.append(adapter)
    return replace(trace, clipped=float(np.mean(shares)))


def distance(one: Trace, other: Trace) -> float:
    """The largest relative difference in delta_W over all rounds and layers."""
    pairs = zip(one.delta_W, other.delta_W, strict=True)
    return max(float(torch.dist(a[path], b[path]) / b[path].norm()) for a, b in pairs for path in SHAPES)


def fedsvd_against_fixed_orthonormal(**settings) -> tuple[float, Trace, Trace]:
    """Both arms from the same orthonormal lora_A."""
    start = OrthonormalRows()(initial_adapter())
    fedsvd = federate(Arm(SvdRefactor(), **settings), start)
    ffa = federate(Arm(OrthonormalRows(), **settings), start)
    return distance(fedsvd, ffa), fedsvd, ffa


ADAMW = partial(AdamW, lr=0.05)
MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.5])
def test_fedsvd_equals_a_fixed_orthonormal_A_under_sgd(noise_multiplier):  # (11)
    difference, fedsvd, ffa = fedsvd_against_fixed_orthonormal(noise_multiplier=noise_multiplier)
    assert difference < 1e-10  # asked for: 1e-6
    assert 0.1 < fedsvd.clipped < 0.95 and fedsvd.clipped == ffa.clipped


def test_the_two_arms_do_have_different_factors():
    """The identity is no triviality: the factors of the two arms are far apart while delta_W is the same."""
    _, fedsvd, ffa = fedsvd_against_fixed_orthonormal()
    for path in SHAPES:
        moved, fixed = (trace.adapters[-1].factors()[path] for trace in (fedsvd, ffa))
        assert torch.dist(moved.lora_A, fixed.lora_A) > 1
        assert torch.dist(moved.lora_B, fixed.lora_B) > 0.1 * fixed.lora_B.norm()


def test_the_row_space_of_fedsvd_never_moves():
    _, fedsvd, ffa = fedsvd_against_fixed_orthonormal()
    for adapter in fedsvd.adapters:
        for path in SHAPES:
            new, old = adapter.factors()[path].lora_A, ffa.adapters[0].factors()[path].lora_A
            assert torch.dist(new.T @ new, old.T @ old) < 1e-12


def test_a_fixed_orthonormal_A_stays_bit_for_bit():
    _, _, ffa = fedsvd_against_fixed_orthonormal()
    start = OrthonormalRows()(initial_adapter())
    for path in SHAPES:
        assert torch.equal(ffa.adapters[-1].factors()[path].lora_A, start.factors()[path].lora_A)


def test_the_identity_holds_with_a_momentum_that_is_reset_every_round():
    assert fedsvd_against_fixed_orthonormal(optimizer=MOMENTUM)[0] < 1e-10


def test_the_identity_holds_with_one_clip_norm_a_lora_B():
    """A rotation keeps the norm of every layer's gradient, so clipping by layer commutes with it too."""
    assert fedsvd_against_fixed_orthonormal(per_tensor_clipping=True, max_grad_norm=0.2)[0] < 1e-10


@pytest.mark.parametrize("noise_multiplier", [0.0, 0.5])
def test_the_identity_breaks_under_adamw(noise_multiplier):  # (11): it scales every coordinate by itself
    difference, _, _ = fedsvd_against_fixed_orthonormal(optimizer=ADAMW, noise_multiplier=noise_multiplier)
    assert difference > 0.01


def test_the_identity_breaks_with_a_momentum_that_outlives_the_refactor():
    """The buffer is in the basis of the round before."""
    difference, _, _ = fedsvd_against_fixed_orthonormal(
        optimizer=MOMENTUM, noise_multiplier=0.0, keeps_optimizer_state=True
    )
    assert difference > 0.01


def test_the_coupling_can_fail():
    """The same draws without the rotation: the same law, another path. So the noise does reach delta_W."""
    assert fedsvd_against_fixed_orthonormal(coupled=False)[0] > 0.01


def test_the_identity_needs_the_orthonormal_start():
    """Against FFA-LoRA from the initial lora_A as it is drawn, FedSVD differs: by scale and conditioning."""
    start = initial_adapter()
    settings = {"noise_multiplier": 0.0}
    fedsvd = federate(Arm(SvdRefactor(), **settings), start)
    assert distance(fedsvd, federate(Arm(keep, **settings), start)) > 0.01


@pytest.mark.parametrize("c", [3**-0.5, 2.0])
def test_the_scale_of_a_fixed_A_is_a_change_of_lr_and_clip_norm(c):  # (14)
    """FFA(A = c Q, lr, C) is FFA(A = Q, lr c^2, C / c): a comparison at one (lr, C) is not scale-matched."""
    orthonormal = OrthonormalRows()(initial_adapter())
    scaled = orthonormal.with_tensors({s: c * t for s, t in orthonormal.tensors.items() if s.role == LORA_A})
    lr, max_grad_norm = 0.5, 0.4
    one = Arm(keep, partial(SGD, lr=lr), max_grad_norm=max_grad_norm, coupled=False)
    other = Arm(keep, partial(SGD, lr=lr * c**2), max_grad_norm=max_grad_norm / c, coupled=False)
    matched = federate(other, orthonormal)
    assert distance(federate(one, scaled), matched) < 1e-10
    assert distance(federate(one, orthonormal), matched) > 0.01
    assert 0.1 < matched.clipped < 0.99
