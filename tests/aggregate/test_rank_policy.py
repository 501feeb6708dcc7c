"""Ranks that the server chooses: the function stays, ranks follow the strength of directions, and nothing else is read.

Mutants this file kills: directions that are dropped where they should be folded; fresh directions whose columns of
lora_B are not zero; fresh rows that are not orthogonal to the kept ones, or the same in every round; the weakest kept
instead of the strongest; a budget that is not kept; a choice between two periods, or of nothing but zeros; what rests
left out of the function, or drawn once for all rounds.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.finalise import random_ranks, rank_policy
from fedlr.methods.finalise.random_ranks import RandomDirections
from fedlr.methods.finalise.rank_policy import CLOCK, RANKS, RankBudget, RankEnergy
from fedlr.methods.layer_choice import StrongestLayers
from tests.training.small_models import mutant

SHAPES = {"layer.0": (12, 20), "layer.1": (3, 20), "layer.2": (16, 9)}  # layer.1 has fewer outputs than ranks
STRONG = {"layer.0": 1.0, "layer.1": 0.1, "layer.2": 6.0}  # what a round adds to a layer
R, SCALE = 4, 0.25
Rule = Callable[[AdapterState], AdapterState]


def start(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    tensors = {Slot("head.weight", HEAD): torch.ones(2, 3, dtype=dtype)}
    for path, (out, into) in SHAPES.items():
        tensors[Slot(path, LORA_A)] = torch.randn(R, into, generator=generator, dtype=torch.float64).to(dtype)
        tensors[Slot(path, LORA_B)] = torch.zeros(out, R, dtype=dtype)
    return AdapterState(tensors, scale=SCALE)


def trained(adapter: AdapterState, round_index: int, strong: dict[str, float] = STRONG) -> AdapterState:
    """One round in which two clients move lora_B, some layers more than others, and the first columns most."""
    generator = torch.Generator().manual_seed(round_index + 1)
    updates = []
    for client in range(2):
        new = {}
        for slot, tensor in adapter.select(frozenset({LORA_B})).items():
            falling_R = strong[slot.path] * 0.5 ** torch.arange(tensor.shape[1])
            new[slot] = tensor + (falling_R * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
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
    whole = adapter.products()[path]
    return adapter.scale * whole.lora_B.double() @ whole.lora_A.double()


def function_stays(rule: Rule, *, num_rounds: int = 7, dtype: torch.dtype = torch.float64) -> list[AdapterState]:
    """Assert that no round of a rule changes the function, the scale, or the head; return the states."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    states = [rule(start(dtype))]
    for round_index in range(num_rounds):
        before = trained(states[-1], round_index)
        states.append(rule(before))
        for path in SHAPES:
            wanted = update_of(before, path)
            assert torch.dist(update_of(states[-1], path), wanted) <= tolerance * wanted.norm(), (round_index, path)
            factors = states[-1].factors()[path]
            assert factors.lora_A.dtype == factors.lora_B.dtype == dtype and factors.lora_A.is_contiguous()
            rows = factors.lora_A.double()
            assert torch.allclose(rows @ rows.T, torch.eye(len(rows)).double(), atol=100 * torch.finfo(dtype).eps)
        assert states[-1].scale == SCALE
        assert torch.equal(states[-1].tensors[Slot("head.weight", HEAD)], torch.ones(2, 3, dtype=dtype))
    assert len({tuple(state.ranks().items()) for state in states}) > 1, "no rank ever changed"
    return states


RULES: dict[str, Rule] = {
    "budget": RankBudget(period=1),
    "growth": RankBudget(period=1, start_share=0.25, share=1.0, ramp_rounds=6, prunes=False),
    "fewer": RankBudget(period=2, start_share=1.0, share=0.3, ramp_rounds=4),
    "energy": RankEnergy(period=2, keep=0.8),
    "prefix": RandomDirections(nested=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_ranks_change_and_the_function_stays(name: str, dtype: torch.dtype) -> None:
    function_stays(RULES[name], dtype=dtype)


FOLDS = "adapter = with_folded(adapter, leaving) if folds else adapter"
ZEROS = "layer.lora_B.new_zeros(len(layer.lora_B), missing)"
MUTANTS = {
    "nothing is folded": (FOLDS, "pass"),
    "the kept are folded": (
        "layer.lora_A[ranks[path] :], layer.lora_B[:, ranks[path] :]",
        "layer.lora_A, layer.lora_B",
    ),
    "the weakest are kept": (
        "layer.lora_A[: ranks[path]], layer.lora_B[:, : ranks[path]]",
        "layer.lora_A[-ranks[path] :], layer.lora_B[:, -ranks[path] :]",
    ),  # fmt: skip
    "fresh columns of ones": (ZEROS, ZEROS.replace("new_zeros(", "new_ones(")),
    "any fresh rows": ("fresh_rows(draws_NK, layer.lora_A, side_MK)", "draws_NK"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_of_ranks_that_changes_the_function_is_seen(name: str) -> None:
    wrong = mutant(rank_policy, MUTANTS[name])
    with pytest.raises(AssertionError):
        function_stays(wrong.RankBudget(period=1))


def test_what_rests_stays_in_the_function_and_trains_again() -> None:
    rule = RandomDirections(share=0.5)
    states = [rule(start())]
    for round_index in range(8):
        before = trained(states[-1], round_index)
        states.append(rule(before))
        for path in SHAPES:
            assert (
                torch.dist(update_of(states[-1], path), update_of(before, path))
                <= 1e-12 * update_of(before, path).norm()
            )
            assert len(states[-1].products()[path].lora_A) == R and states[-1].ranks()[path] == R // 2
    drawn = {tuple(state.side["layer.0"].lora_B.norm(dim=0).argsort().tolist()) for state in states[1:]}
    strongest = [
        bool(state.factors()["layer.0"].lora_B.norm(dim=0).max() > state.side["layer.0"].lora_B.norm(dim=0).max())
        for state in states[1:]
    ]
    assert drawn and set(strongest) == {True, False}, "every round has a draw of its own"
    for wrong in (
        mutant(random_ranks, ("side[path] = _directions(layer, ~chosen_R)", "pass")),
        mutant(random_ranks, ("adapter.products()", "adapter.factors()")),
    ):
        with pytest.raises(AssertionError):
            function_stays(wrong.RandomDirections(nested=True))


def test_a_prefix_is_the_strongest_directions_in_all_layers_alike() -> None:
    states = play(RandomDirections(nested=True), 12)
    for state in states:
        assert len(set(state.ranks().values())) == 1
        for path, side in state.side.items():
            weakest = state.factors()[path].lora_B.norm(dim=0).min()
            assert weakest >= side.lora_B.norm(dim=0).max() - 1e-9
    assert {state.ranks()["layer.0"] for state in states} == {1, 2, 3, 4}


# Budgets.


def test_a_budget_is_kept_and_goes_to_the_strongest_layers() -> None:
    states = play(RankBudget(period=2, share=0.5), 6)
    assert list(states[0].ranks().values()) == [2, 2, 2], "equal while nothing is known"
    for state in states:
        assert sum(state.ranks().values()) == 6 and all(1 <= rank <= R for rank in state.ranks().values())
    assert states[1].ranks() == states[0].ranks() and states[3].ranks() == states[2].ranks(), "every second round"
    last = states[-1].ranks()
    assert last["layer.1"] == 1 and last["layer.2"] == R
    assert any(len(one.side) > 0 for one in states)


def test_a_weak_layer_gives_its_directions_to_a_strong_one() -> None:
    spectra = {"weak": [1.0, 0.1], "strong": [5.0, 4.0]}
    most = {"weak": 4, "strong": 4}
    assert RankBudget(share=0.5).chosen(spectra, most, 2) == {"weak": 1, "strong": 3}
    assert RankBudget(share=0.5).chosen({"weak": [1.0, 1.0], "strong": [1.1, 1.1]}, most, 2) == {"weak": 2, "strong": 2}
    # The estimate of a direction that was never tried falls: 4 * 2 / 3, 4 * 2 / 4.
    assert RankBudget(share=0.75).chosen({"weak": [3.0, 2.1], "strong": [5.0, 4.0]}, most, 2) == {
        "weak": 2,
        "strong": 4,
    }
    assert RankBudget(share=0.625).chosen({"weak": [3.0, 2.7], "strong": [5.0, 4.0]}, most, 2) == {
        "weak": 2,
        "strong": 3,
    }


def test_layers_are_compared_by_what_noise_does_to_a_number() -> None:
    """Singular values of noise grow with sqrt(D): without the division the widest layer would take all."""
    rule, shapes = RankBudget(period=1), {"narrow": (40, 30), "wide": (4000, 30)}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path, (out, into) in shapes.items():
        tensors[Slot(path, LORA_A)] = torch.randn(R, into, generator=generator)
        tensors[Slot(path, LORA_B)] = torch.zeros(out, R)
    first = rule(AdapterState(tensors, 1.0))
    noisy = {s: torch.randn(t.shape, generator=generator) for s, t in first.tensors.items() if s.role == LORA_B}
    assert rule(first.with_tensors(noisy)).ranks() == {"narrow": 2, "wide": 2}


def test_growth_adds_directions_and_never_takes_one() -> None:
    rule = RankBudget(period=1, start_share=0.25, share=1.0, ramp_rounds=6, prunes=False)
    states = play(rule, 8)
    assert [sum(state.ranks().values()) for state in states] == [3, 4, 6, 8, 9, 10, 12, 12, 12]
    for one, other in zip(states, states[1:], strict=False):
        assert all(other.ranks()[path] >= rank for path, rank in one.ranks().items())
    grown = states[2].ranks()
    assert grown["layer.2"] > grown["layer.1"]
    assert not any(state.side for state in states)


@pytest.mark.parametrize("name", [name for name in RULES if name != "prefix"])  # whose ranks are drawn
def test_rounds_that_learnt_nothing_change_no_rank(name: str) -> None:
    rule = RULES[name]
    first = rule(start())
    state = first
    for _ in range(4):
        state = rule(state)
    assert state.ranks() == first.ranks() and not state.side
    assert not any(layer.lora_B.any() for layer in state.factors().values())


# Energy.


def test_a_layer_keeps_the_fewest_directions_that_hold_the_share() -> None:
    rule = RankEnergy(keep=0.9)
    values = {"a": [3.0, 1.0, 0.5], "b": [1.0, 1.0, 1.0], "c": [1.0, 0.0, 0.0], "d": [0.0, 0.0]}
    assert rule.chosen(values, {}, 2) == {"a": 2, "b": 3, "c": 1, "d": 2}
    assert RankEnergy(keep=0.9, min_rank=2).chosen(values, {}, 2) == {"a": 2, "b": 3, "c": 2, "d": 2}
    assert RankEnergy(keep=1.0).chosen(values, {}, 2)["c"] == 1


def test_without_folding_what_is_lost_stays_within_its_bound() -> None:
    rule = RankEnergy(period=1, keep=0.8, folds=False)
    state, lost = rule(start()), 0.0
    for round_index in range(4):
        before = trained(state, round_index)
        state = rule(before)
        for path in SHAPES:
            wanted = update_of(before, path)
            lost = max(lost, float(torch.dist(update_of(state, path), wanted) / wanted.norm()))
    assert 0.01 < lost <= (1 - 0.8) ** 0.5 and not state.side


# What is read, and from where draws come.


@pytest.mark.parametrize("name", RULES)
def test_a_rule_repeats_resumes_and_reads_nothing_but_the_adapter(name: str) -> None:
    rule = RULES[name]
    states = play(rule, 5)
    assert [state.fingerprint() for state in play(rule, 5)] == [state.fingerprint() for state in states]
    resumed = AdapterState(dict(states[3].tensors), SCALE, side=dict(states[3].side), memory=dict(states[3].memory))
    for round_index in (3, 4):
        resumed = rule(trained(resumed, round_index))
    assert resumed.fingerprint() == states[5].fingerprint()
    assert int(states[5].memory[RANKS][CLOCK][0]) == 5


def test_fresh_rows_have_a_draw_of_their_own_in_every_run_round_and_layer() -> None:
    rule = RankBudget(period=1, start_share=0.5, share=1.0, prunes=False)
    fresh = {}
    for seed in (0, 1):
        first = rule(start(seed=seed))
        fresh[seed] = rule(trained(first, 0)).factors()["layer.0"].lora_A[2:]
    assert not torch.allclose(fresh[0], fresh[1])
    one_by_one = play(RankBudget(period=1, start_share=0.25, share=1.0, ramp_rounds=3, prunes=False), 3)
    rows = one_by_one[-1].factors()["layer.0"].lora_A
    assert torch.allclose(rows @ rows.T, torch.eye(R).double(), atol=1e-9), "a repeated draw would be no new direction"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RankBudget(period=0), "Expected period >= 1, got 0"),
        (lambda: RankEnergy(min_rank=0), "Expected min_rank >= 1, got 0"),
        (lambda: RankBudget(share=0.0), "Expected share in"),
        (lambda: RankBudget(start_share=1.1), "Expected start_share in"),
        (lambda: RankBudget(ramp_rounds=0), "ramp_rounds >= 1"),
        (lambda: RankEnergy(keep=float("nan")), "keep in"),
        (lambda: RandomDirections(share=1.5), "share in"),
        (lambda: StrongestLayers(share=0.0), "share in"),
        (lambda: StrongestLayers(explore_every=0), "explore_every >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


# Which layers train.


def test_the_strongest_layers_train_between_explorations_of_all() -> None:
    schedule, adapter = StrongestLayers(share=0.67, explore_every=3), start()
    everything = frozenset({LORA_B})
    assert [schedule(index, adapter) for index in range(4)] == [everything] * 4, "nothing is known of any layer"
    adapter = trained(adapter, 0)
    two = frozenset({Slot("layer.0", LORA_B), Slot("layer.2", LORA_B)})
    assert [schedule(index, adapter) for index in range(7)] == [everything, two, two] * 2 + [everything]
    assert schedule(1, trained(start(), 0, {**STRONG, "layer.1": 99.0})) != two
    assert StrongestLayers(share=0.01)(1, adapter) == frozenset({Slot("layer.2", LORA_B)})


def test_a_layer_of_more_numbers_is_not_the_stronger_one_by_its_noise() -> None:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for path, (out, size) in {"wide": (4000, 1.0), "narrow": (40, 1.5)}.items():
        tensors[Slot(path, LORA_A)] = torch.linalg.qr(torch.randn(30, R, generator=generator)).Q.T
        tensors[Slot(path, LORA_B)] = size * torch.randn(out, R, generator=generator)
    assert StrongestLayers()(1, AdapterState(tensors, 1.0)) == frozenset({Slot("narrow", LORA_B)})


def is_pure(module: ModuleType) -> bool:
    """Whether a budget's choice leaves its argument alone."""
    adapter = trained(module.RankBudget(period=1)(start()), 0)
    before = adapter.fingerprint()
    module.RankBudget(period=1)(adapter)
    return adapter.fingerprint() == before


def test_the_adapter_that_was_given_is_not_changed() -> None:
    assert is_pure(rank_policy)
    grown = replace(start(), memory={})
    assert RankBudget()(grown).memory.keys() == {RANKS} and not grown.memory
