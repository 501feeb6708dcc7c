"""Renewal of lora_A's rows: the function stays, the row space moves, the reach grows, and FedSVD's does none of it.

Mutants this file kills: a fold that scales its product once more; one that forgets an earlier side; fresh rows with
columns of lora_B that are not zero; rows drawn without taking out the kept ones, or the folded ones; a renewal that
replaces strong rows and keeps the weak; a re-factorisation in its place, which never leaves the first row space; draws
that are the same for all layers, rounds or seeds; a clock that starts anew when a run is resumed.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.finalise import renewal
from fedlr.methods.finalise.renewal import Renewal, fresh_rows, split_by_strength, stacked
from fedlr.methods.method import SvdRefactor

SHAPES = {"layer.0": (12, 20), "layer.1": (3, 20), "layer.2": (16, 9)}  # layer.1 has fewer outputs than ranks
R, SCALE = 4, 0.25
Rule = Callable[[AdapterState], AdapterState]


def start(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    tensors = {Slot("head.weight", HEAD): torch.ones(2, 3, dtype=dtype)}
    for path, (out, into) in SHAPES.items():
        tensors[Slot(path, LORA_A)] = torch.randn(R, into, generator=generator, dtype=torch.float64).to(dtype)
        tensors[Slot(path, LORA_B)] = torch.zeros(out, R, dtype=dtype)
    return AdapterState(tensors, scale=SCALE)


def trained(adapter: AdapterState, round_index: int) -> AdapterState:
    """One round in which two clients move lora_B, more along some columns than along others."""
    generator = torch.Generator().manual_seed(round_index + 1)
    strength_R = torch.tensor([3.0, 1.0, 0.3, 0.1])
    updates = []
    for client in range(2):
        new = {}
        for slot, tensor in adapter.select(frozenset({LORA_B})).items():
            new[slot] = tensor + (strength_R * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        updates.append(ClientUpdate(client, new, 1.0 + client, round_index))
    return weighted_mean(adapter, updates)


def play(rule: Rule, num_rounds: int, adapter: AdapterState | None = None) -> list[AdapterState]:
    """Return the finalised adapters: the start, then one a round."""
    states = [rule(start() if adapter is None else adapter)]
    for round_index in range(num_rounds):
        states.append(rule(trained(states[-1], round_index)))
    return states


def update_of(adapter: AdapterState, path: str) -> Tensor:
    """Return what a layer adds to its base weight, as `AdapterState` defines it."""
    layer = adapter.factors()[path]
    total = layer.lora_B.double() @ layer.lora_A.double()
    if path in adapter.side:
        total = total + adapter.side[path].lora_B.double() @ adapter.side[path].lora_A.double()
    return adapter.scale * total


def projector(rows: Tensor) -> Tensor:
    basis = torch.linalg.qr(rows.double().T).Q
    return basis @ basis.T


def moved(one: AdapterState, other: AdapterState, path: str) -> float:
    return float(torch.dist(*(projector(adapter.factors()[path].lora_A) for adapter in (one, other))))


def all_rows(adapter: AdapterState, path: str) -> Tensor:
    side = [adapter.side[path].lora_A] if path in adapter.side else []
    return torch.cat([adapter.factors()[path].lora_A, *side]).double()


def check_function_stays(rule: Rule, *, tolerance: float = 1e-12) -> None:
    before = trained(play(rule, 3)[-1], 3)
    after = rule(before)
    for path in SHAPES:
        assert torch.dist(update_of(after, path), update_of(before, path)) <= tolerance * update_of(before, path).norm()
    assert after.scale == before.scale
    assert torch.equal(after.tensors[Slot("head.weight", HEAD)], before.tensors[Slot("head.weight", HEAD)])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 1.0])
def test_a_renewal_changes_no_function(keep: float) -> None:
    check_function_stays(Renewal(period=1, keep=keep))
    check_function_stays(Renewal(period=2, keep=keep))


def test_in_float32_too_and_the_dtype_stays() -> None:
    states = play(Renewal(period=1), 4, start(dtype=torch.float32))
    before, after = trained(states[-1], 4), Renewal(period=1)(trained(states[-1], 4))
    for path in SHAPES:
        assert torch.dist(update_of(after, path), update_of(before, path)) <= 1e-6 * update_of(before, path).norm()
        assert after.side[path].lora_A.dtype == after.factors()[path].lora_B.dtype == torch.float32
        rows = all_rows(after, path)[:R]
        assert torch.allclose(rows @ rows.T, torch.eye(R).double(), atol=1e-5)


def test_the_rows_are_orthonormal_from_round_0_on() -> None:
    for adapter in play(Renewal(period=2), 6):
        for layer in adapter.factors().values():
            assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(R).double(), atol=1e-12)


def check_row_space_moves(rule: Rule) -> None:
    states = play(rule, 4)
    for path in SHAPES:
        assert moved(states[1], states[4], path) > 0.5


def test_the_row_space_moves() -> None:
    check_row_space_moves(Renewal(period=2))


def test_a_re_factorisation_never_moves_it() -> None:
    states = play(SvdRefactor(), 4)
    assert max(moved(states[0], state, path) for state in states for path in SHAPES) < 1e-10
    with pytest.raises(AssertionError):
        check_row_space_moves(SvdRefactor())


def test_only_every_period_th_round_renews() -> None:
    states = play(Renewal(period=3), 7)
    turns = [moved(one, other, "layer.0") > 0.1 for one, other in zip(states, states[1:], strict=False)]
    assert turns == [False, False, True, False, False, True, False]
    for one, other in zip(states, states[1:], strict=False):
        same = torch.equal(one.factors()["layer.0"].lora_A, other.factors()["layer.0"].lora_A)
        assert same == (moved(one, other, "layer.0") < 0.1), "between renewals the bits stay"


def test_rows_of_the_adapter_and_of_the_side_are_orthonormal_and_grow_in_number() -> None:
    ranks = []
    for adapter in play(Renewal(period=1, keep=0.9), 3):
        rows = all_rows(adapter, "layer.0")
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)).double(), atol=1e-10)
        ranks.append(int(torch.linalg.matrix_rank(rows)))
    assert ranks == sorted(set(ranks)) and ranks[0] == R and ranks[-1] >= R + 3
    total = update_of(trained(adapter, 9), "layer.0")
    assert int(torch.linalg.matrix_rank(total, rtol=1e-9)) > R, "an adapter alone has rank R at most"


def test_strong_rows_stay_first_and_weak_ones_go() -> None:
    before = trained(play(Renewal(period=2, keep=0.5), 1)[-1], 1)
    after = Renewal(period=2, keep=0.5)(before)
    U, S, Vh = torch.linalg.svd(update_of(before, "layer.0"), full_matrices=False)
    shares = S.square().cumsum(0) / S.square().sum()
    num_kept = int((shares < 0.5).sum()) + 1
    layer, side = after.factors()["layer.0"], after.side["layer.0"]
    assert 0 < num_kept < R and len(side.lora_A) == R - num_kept
    assert torch.allclose(projector(layer.lora_A[:num_kept]), projector(Vh[:num_kept]), atol=1e-10)
    assert torch.allclose(projector(side.lora_A), projector(Vh[num_kept:R]), atol=1e-10)
    assert not layer.lora_B[:, num_kept:].any(), "fresh directions start without noise"
    assert layer.lora_B[:, :num_kept].any(dim=0).all()


@pytest.mark.parametrize(("keep", "num_kept"), [(0.0, 0), (0.1, 1), (0.5, 1), (0.85, 2), (1.0, 3)])
def test_a_share_of_the_energy_chooses_the_rows(keep: float, num_kept: int) -> None:
    svd = LoraFactors(torch.eye(4), torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0])))  # energies 9, 4, 1, 1
    strong, weak = split_by_strength(svd, keep=keep)
    assert (len(strong.lora_A), len(weak.lora_A)) == (num_kept, 4 - num_kept), "one row at least is renewed"
    assert torch.equal(strong.lora_B @ strong.lora_A + weak.lora_B @ weak.lora_A, svd.lora_B)


def test_a_layer_that_learnt_nothing_is_left_alone() -> None:
    rule = Renewal(period=1)
    before = rule(start())
    one = Slot("layer.0", LORA_B)
    after = rule(before.with_tensors({one: torch.ones_like(before.tensors[one])}))
    assert set(after.side) == {"layer.0"}
    for path in ("layer.1", "layer.2"):
        assert torch.equal(after.factors()[path].lora_A, before.factors()[path].lora_A)


def test_when_every_direction_had_its_turn_the_turns_start_anew() -> None:
    states = play(Renewal(period=1, keep=0.0), 12)
    for round_index, (one, other) in enumerate(zip(states, states[1:], strict=False)):
        rows = other.factors()["layer.2"].lora_A
        assert torch.allclose(rows @ rows.T, torch.eye(R).double(), atol=1e-10)
        assert moved(one, other, "layer.2") > 0.1
        before = trained(one, round_index)
        assert torch.allclose(update_of(other, "layer.2"), update_of(before, "layer.2"), rtol=0, atol=1e-10)
    assert len(states[-1].side["layer.2"].lora_A) == 9, "a side of rank K holds everything"


def test_as_many_rows_as_inputs_stay_a_whole_basis() -> None:
    wide = AdapterState({Slot("l", LORA_A): torch.eye(3), Slot("l", LORA_B): torch.zeros(5, 3)}, scale=1.0)
    rule = Renewal(period=1)
    before = rule(wide)
    before = before.with_tensors({Slot("l", LORA_B): torch.arange(15.0).reshape(5, 3)})
    after = rule(before)
    rows = after.factors()["l"].lora_A
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(update_of(after, "l"), update_of(before, "l"), atol=1e-5)


def test_a_run_repeats_its_rows_and_another_seed_has_others() -> None:
    one, same, other = play(Renewal(), 6), play(Renewal(), 6), play(Renewal(), 6, start(seed=1))
    assert one[-1].fingerprint() == same[-1].fingerprint()
    fresh = [states[5].factors()["layer.0"].lora_A[-1] for states in (one, other)]
    assert abs(float(fresh[0] @ fresh[1])) < 0.99


def test_layers_rounds_and_seeds_have_draws_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watch(draws: Tensor, kept: Tensor, side: Tensor) -> Tensor:
        seen.append(draws)
        return fresh_rows(draws, kept, side)

    monkeypatch.setattr(renewal, "fresh_rows", watch)
    for seed in (0, 1):
        play(Renewal(period=1), 2, start(seed=seed))
    assert len({float(draws[0, 0]) for draws in seen}) == len(seen) == 4 * len(SHAPES)


def test_a_resumed_run_renews_when_the_whole_one_does() -> None:
    whole = play(Renewal(period=3), 4)
    state = whole[2]
    for round_index in (2, 3):
        state = Renewal(period=3)(trained(state, round_index))
    assert state.fingerprint() == whole[4].fingerprint()
    assert moved(whole[2], whole[3], "layer.0") > 0.1


def test_a_side_that_is_there_is_added_to() -> None:
    rule = Renewal(period=1)
    before = rule(start())
    old = LoraFactors(torch.eye(1, 20).double(), torch.ones(12, 1).double())
    before = trained(replace(before, side={"layer.0": old, "elsewhere": old}), 0)
    after = rule(before)
    assert torch.dist(update_of(after, "layer.0"), update_of(before, "layer.0")) < 1e-12
    assert torch.equal(after.side["elsewhere"].lora_B, old.lora_B)


def scales_again(before: AdapterState, after: AdapterState) -> AdapterState:
    side = {path: LoraFactors(f.lora_A, before.scale * f.lora_B) for path, f in after.side.items()}
    return replace(after, side=side)


def forgets_the_side(before: AdapterState, after: AdapterState) -> AdapterState:
    old = {path: len(f.lora_A) for path, f in before.side.items()}
    side = {p: LoraFactors(f.lora_A[old.get(p, 0) :], f.lora_B[:, old.get(p, 0) :]) for p, f in after.side.items()}
    return replace(after, side=side)


def noise_in_fresh_columns(before: AdapterState, after: AdapterState) -> AdapterState:
    layers = after.factors().items()
    return after.with_factors({p: LoraFactors(f.lora_A, f.lora_B + 0.1 * (f.lora_B == 0)) for p, f in layers})


@pytest.mark.parametrize("mutate", [scales_again, forgets_the_side, noise_in_fresh_columns])
def test_a_wrong_fold_is_found(mutate: Callable[[AdapterState, AdapterState], AdapterState]) -> None:
    rule = Renewal(period=1, keep=0.5)

    def mutant(adapter: AdapterState) -> AdapterState:
        return mutate(adapter, rule(adapter))

    with pytest.raises(AssertionError):
        check_function_stays(mutant)


def test_stacked_products_add_up_also_beyond_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [LoraFactors(torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)) for _ in "abc"]
    total = stacked(stacked(parts[0], parts[1]), parts[2])
    expected = sum(part.lora_B @ part.lora_A for part in parts)
    assert total.lora_A.shape == (7, 7)
    assert torch.allclose(total.lora_B @ total.lora_A, expected, atol=1e-5)


def test_fresh_rows_are_orthogonal_to_what_they_avoid() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(10, 6, generator=generator)).Q.T
    draws = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    fresh = fresh_rows(draws, rows[:2], rows[2:])
    assert torch.allclose(fresh @ fresh.T, torch.eye(3).double(), atol=1e-12)
    assert (fresh @ rows.double().T).abs().max() < 1e-12
    crowded = fresh_rows(draws, rows[:2], torch.eye(10))
    assert (crowded @ rows[:2].double().T).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"period": 0}, "period >= 1, got 0"), ({"keep": -0.1}, "keep in"), ({"keep": 1.5}, "keep in"),
     ({"keep": float("nan")}, "keep in")],
)  # fmt: skip
def test_wrong_arguments_are_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Renewal(**wrong)
