"""The mean of the clients' layers, factored again, is the mean of the layers of PEFT itself, or says how far it is.

Every formula is held against PEFT's own layer, which is fed the identity, in float64; every round against the dense
mean of such layers.

Mutants this file kills: a product that is transposed; a weight on both factors; a start that is not subtracted; a
client that is lost; a reflection or a rotation the wrong way round; a gain of DoRA's that is averaged as a magnitude;
vectors of DeLoRA's that do not have one norm; an error that is not the one of what was written.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fedlr.adapters.state import LARGEST_VALUE, SHIPPED, AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.methods.aggregate import layer_mean
from fedlr.methods.aggregate.layer_mean import LayerMean
from fedlr.methods.measure.diagnostics import ERRORS
from fedlr.models.peft_state import LAYOUT, read_adapter, write_adapter
from fedlr.models.tuners import TUNERS, deltas, layer_means, own_forms
from fedlr.models.tuners.attach import Layout
from fedlr.models.tuners.blocks import AllBlocks
from fedlr.models.tuners.layer_means import Folded, layers_of
from fedlr.models.tuners.own_forms import equal_diagonal, row_norms
from fedlr.simulations.tuner_measure import measure
from fedlr.simulations.tuner_measure.networks import LinearNetwork
from fedlr.training.float64 import float32_as_float64
from tests.training.small_models import mutant

SYSTEMS = sorted(name for name, entry in TUNERS.items() if entry.layer_mean)
FOLDED = [name for name in SYSTEMS if isinstance(TUNERS[name].layer_mean, Folded)]
CUT = ("dora", "delora")  # their form holds rank R only
WEIGHTS = (1.0, 2.0, 3.0)
Layers = dict[str, Tensor]


def fresh(system: str, **sizes: Any) -> nn.Module:
    """The system on its measuring network in float64, as PEFT starts it."""
    entry = replace(TUNERS[system], sizes={**TUNERS[system].sizes, **sizes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "moved", lambda values, generator: dict(values))
        model = measure.subject(entry).model
    setattr(model, LAYOUT, Layout(system, entry))
    return model


class Transposed(LinearNetwork):
    """The measuring network with the layers of GPT-2, which keep their weight as (K, D)."""

    def __init__(self) -> None:
        super().__init__()
        for name in self.targets:
            layer = getattr(self, name)
            setattr(self, name, Conv1D(layer.out_features, layer.in_features))


def adapted(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def dense(model: nn.Module) -> Layers:
    """The matrix and, as a last column, the offset of every layer."""
    found = {}
    with float32_as_float64():
        for path, layer in adapted(model).items():
            offset = layer(torch.zeros(1, layer.in_features, dtype=torch.float64))
            found[path] = torch.cat([layer(torch.eye(layer.in_features, dtype=torch.float64)) - offset, offset]).T
    return found


def moved(adapter: AdapterState, seed: int, *, spread: float = 0.3, shared: str = "nothing") -> dict[Slot, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    trains = {slot: tensor for slot, tensor in adapter.tensors.items() if slot.role != SHIPPED}
    drawn = {slot: torch.randn(t.shape, generator=generator, dtype=torch.float64) for slot, t in trains.items()}
    return {slot: t + (0 if slot.role.endswith(shared) else spread) * drawn[slot] for slot, t in trains.items()}


class Round:
    """Rounds of one system over its dense layers; what the side holds is added to the frozen weights by hand."""

    def __init__(self, system: str, rule: Any = None, **sizes: Any) -> None:
        self.model = fresh(system, **sizes)
        self.plain = {
            path: layer.get_base_layer().weight.detach().clone() for path, layer in adapted(self.model).items()
        }
        self.rule = (rule or LayerMean()).bound(self.model)
        self.adapter = read_adapter(self.model)

    def at(self, tensors: Mapping[Slot, Tensor], side: Mapping[str, LoraFactors]) -> Layers:
        write_adapter(self.model, tensors)
        for path, layer in adapted(self.model).items():
            base, weight = layer.get_base_layer(), self.plain[path].clone()
            if path in side:
                (weight.T if isinstance(base, Conv1D) else weight).add_(side[path].lora_B @ side[path].lora_A)
            base.weight.data.copy_(weight)
        return dense(self.model)

    def play(self, *, seed: int = 0, shared: str = "nothing") -> float:
        """Return the largest error of a layer, relative to how far the mean is from the layer before."""
        before = self.at(self.adapter.tensors, self.adapter.side)
        updates, mean = [], {path: torch.zeros_like(layer) for path, layer in before.items()}
        for client, weight in enumerate(WEIGHTS):
            tensors = moved(self.adapter, 10 * seed + client, shared=shared)
            updates.append(ClientUpdate(client, tensors, weight, seed))
            for path, layer in self.at(tensors, self.adapter.side).items():
                mean[path] += weight / sum(WEIGHTS) * layer
        self.adapter = self.rule(self.adapter, updates)
        after = self.at(self.adapter.tensors, self.adapter.side)
        return max(float((after[p] - mean[p]).norm() / (mean[p] - before[p]).norm()) for p in after)

    def is_sound(self) -> bool:
        """Play twice: the mean is written back, or the error says how far from it."""
        errors = [(self.play(seed=seed), self.said) for seed in range(2)]
        cut = getattr(self.model, LAYOUT).system in CUT
        return all(error == pytest.approx(said, rel=1e-6) if cut else error < 1e-10 for error, said in errors)

    @property
    def said(self) -> float:
        """The largest error that the rule itself reports."""
        return max(float(error) for error in self.adapter.memory["aggregation_error"].values())


@pytest.mark.parametrize("system", FOLDED)
def test_a_formula_is_the_layer_of_peft(system: str) -> None:
    model = fresh(system)
    before, tensors = dense(model), moved(read_adapter(model), 5)
    layers, mean = layers_of(model), TUNERS[system].layer_mean
    assert isinstance(mean, Folded) and layers.keys() == before.keys()
    write_adapter(model, tensors)
    for path, seen in dense(model).items():
        delta = mean.delta(layers[path], {block: tensors[slot] for block, slot in layers[path].slots.items()})
        weight = adapted(model)[path].get_base_layer().weight.detach()
        torch.testing.assert_close(weight + delta.lora_B @ delta.lora_A, seen[:, :-1], rtol=0, atol=1e-10)
        assert not torch.allclose(seen, before[path], atol=1e-3)


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name not in CUT])
def test_rounds_write_back_the_mean_of_the_layers(system: str) -> None:
    """Also over weights that hold what was folded before; the offset, which RoAd turns too, is part of a layer."""
    r = Round(system)
    for seed in range(3):
        assert r.play(seed=seed) < 1e-10
        assert r.said < 1e-10
    assert bool(r.adapter.side) is (system in FOLDED)


@pytest.mark.parametrize("system", CUT)
def test_a_form_of_rank_r_is_exact_with_one_a_and_else_says_how_far_it_is(system: str) -> None:
    shared = {"dora": "lora_A", "delora": ".A"}[system]
    r = Round(system)
    assert r.play(shared=shared) < 1e-7 and r.said < 1e-7  # row norms of DoRA lose half the digits where W cancels
    error = r.play(seed=1)
    assert error == pytest.approx(r.said, rel=1e-6) and 0.05 < error < 0.8
    assert not r.adapter.side


def test_the_bases_of_psoft_bound_the_rank_of_what_is_folded() -> None:
    r = Round("psoft")
    for seed in range(3):
        r.play(seed=seed)
    assert {len(side.lora_A) for side in r.adapter.side.values()} == {4}
    assert all(
        torch.equal(r.adapter.tensors[slot], tensor) for slot, tensor in read_adapter(fresh("psoft")).tensors.items()
    )


def test_a_cap_on_the_side_costs_what_the_error_says() -> None:
    r = Round("hra", LayerMean(max_rank=5))
    for seed in range(2):
        error = r.play(seed=seed)
        assert 0.01 < error == pytest.approx(r.said, rel=1e-6)
    assert {len(side.lora_A) for side in r.adapter.side.values()} == {5}


@pytest.mark.parametrize(
    ("system", "sizes"),
    [
        ("oft", {"use_cayley_neumann": False}),
        ("oft", {"block_share": True}),
        ("road", {"variant": "road_2"}),
        ("psoft", {"use_cayley_neumann": True}),
        ("psoft", {"ab_svd_init": "pissa_init"}),
        ("peanut", {"act_fn": "tanh", "scaling": 0.5}),
        ("dora", {"lora_alpha": 3, "use_rslora": True}),
        ("vblora", {"topk": 3}),
    ],
    ids=str,
)
def test_other_sizes_of_a_system_are_read_as_well(system: str, sizes: dict[str, Any]) -> None:
    r = Round(system, **sizes)
    error = r.play()
    assert error == pytest.approx(r.said, rel=1e-5) if system == "dora" else error < 1e-10


@pytest.mark.parametrize("system", ["dora", "unilora", "vblora"])
def test_layers_that_keep_their_weight_the_other_way_round_are_read_as_well(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "NETWORKS", {"linear": Transposed})
    assert Round(system).is_sound()


def test_a_client_without_weight_and_one_block_alone_change_nothing_else() -> None:
    r = Round("peanut")
    mine = {slot: t for slot, t in moved(r.adapter, 1).items() if slot.role.endswith(".B")}
    none = {slot: tensor + 7.0 for slot, tensor in mine.items()}
    updates = [ClientUpdate(0, mine, 2.0, 0), ClientUpdate(1, none, 0.0, 0)]
    after = r.rule(r.adapter, updates)
    found, wanted = r.at(after.tensors, after.side), r.at({**r.adapter.tensors, **mine}, {})
    for path, layer in wanted.items():
        torch.testing.assert_close(found[path], layer, rtol=0, atol=1e-10)


def test_nobody_moved_nothing_is_folded() -> None:
    for system in SYSTEMS:
        r = Round(system)
        same = {slot: tensor for slot, tensor in r.adapter.tensors.items() if slot.role != SHIPPED}
        before = r.at(r.adapter.tensors, {})
        after = r.rule(r.adapter, [ClientUpdate(0, same, 1.0, 0), ClientUpdate(1, same, 1.0, 0)])
        for path, layer in r.at(after.tensors, after.side).items():
            torch.testing.assert_close(layer, before[path], rtol=0, atol=1e-10)


@pytest.mark.parametrize("system", FOLDED)
def test_numbers_that_explode_in_a_formula_are_not_sent_down(system: str) -> None:
    r = Round(system)
    wild = {slot: 1e6 * torch.sign(tensor) for slot, tensor in moved(r.adapter, 1).items()}
    after = r.rule(r.adapter, [ClientUpdate(0, wild, 1.0, 0)])
    assert all(float(side.lora_B.abs().max()) <= LARGEST_VALUE for side in after.side.values())
    for slot, error in after.memory[ERRORS].items():
        assert torch.isfinite(error).all() and (slot.path in after.side or float(error) == 1.0)


def test_what_is_merged_into_a_model_later_is_not_seen_by_the_rule() -> None:
    """The rule adds the side itself; a server's evaluator has merged some side, earlier or later, into the model."""
    r, again = Round("hra"), Round("hra")
    r.play()
    updates = [ClientUpdate(0, moved(r.adapter, 3), 1.0, 1)]
    with torch.no_grad():
        for layer in adapted(again.model).values():
            layer.get_base_layer().weight.mul_(3.0)
    assert r.rule(r.adapter, updates).fingerprint() == again.rule(r.adapter, updates).fingerprint()


class Shapes(TorchDispatchMode):
    """Notes who makes a matrix as large as a layer."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes, self.makers = shapes, set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and tuple(made.shape) in self._shapes:
            self.makers.add(function.overloadpacket.__name__)
        return made


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name not in ("oft", "boft")])
def test_no_matrix_of_a_layers_size_is_made_but_its_weights(system: str) -> None:
    r = Round(system, **({} if system == "road" else {"r": 2}))  # so that no stack of factors is as large as a layer
    updates = [ClientUpdate(client, moved(r.adapter, client), 1.0, 0) for client in range(2)]
    sizes = {tuple(weight.shape) for weight in r.plain.values()}
    with Shapes({shape for shape in sizes if shape[0] != shape[1]}) as seen:
        r.rule(r.adapter, updates)
    assert seen.makers <= {"detach", "_to_copy", "slice", "t", "view"}


OLD_SIDE = "weight_DK + self.side.lora_B.double() @ self.side.lora_A.double()"
ROW_NORMS = '"magnitude": gains_D * row_norms(self._layer.weight_DK, inner)'
WRONG = {
    "a rotation the other way round": ("oft", deltas, ("lora_A=Q_KK.T - torch", "lora_A=Q_KK - torch")),
    "a butterfly the other way round": ("boft", deltas, ("torch.cat([Q_KK.T,", "torch.cat([Q_KK,")),
    "reflections in reverse": ("hra", deltas, ("@ U_KR) @ T_RR)", "@ U_KR) @ T_RR.T)")),
    "a core that is transposed": (
        "psoft",
        deltas,
        ("(identity_RR,)).T - identity_RR", "(identity_RR,)) - identity_RR"),
    ),
    "parts of a product that are transposed": (
        "vblora",
        deltas,
        ("lora_B.transpose(1, 2).flatten(0, 1)", "lora_B.reshape(-1, lora_B.shape[1])"),
    ),
    "the scale left out": ("dora", own_forms, ("inner.lora_B / self._scale", "inner.lora_B")),
    "the weights of round 0": ("hra", layer_means, (OLD_SIDE, "weight_DK")),
    "the start not subtracted": ("vblora", layer_means, ("self._sum.add(start, -self._total)", "pass")),
    "a weight on both factors": (
        "unilora",
        layer_means,
        ("self._sum.add(delta, weight)", "self._sum.add(LoraFactors(weight * delta.lora_A, delta.lora_B), weight)"),
    ),
    "magnitudes averaged": (
        "dora",
        own_forms,
        ("self._gains_D += weight * gains_D", 'self._gains_D += weight * values["magnitude"]'),
    ),
    "the norm of W alone": ("dora", own_forms, (ROW_NORMS, ROW_NORMS.replace("inner", "_divided(inner, 1e9)"))),
    "vectors of several norms": ("delora", own_forms, ("equal_diagonal(S_R)\n", "torch.diag(S_R / S_R)\n")),
    "column norms twice": ("delora", own_forms, ("best.lora_A / self._norms_K.clamp(min=1e-30)", "best.lora_A")),
    "angles averaged": ("road", own_forms, ('torch.exp(1j * values["theta"])', '(1 + 1j * values["theta"])')),
    "a client lost": ("psoft", layer_mean, ("for update in updates:", "for update in list(updates)[1:]:")),
    "a side forgotten": (
        "psoft",
        layer_mean,
        ("parts = [fold] if layer.side is None else [layer.side, fold]", "parts = [fold]"),
    ),
}


class Wrong:
    """The rule of a system with one mistake in it."""

    def __init__(self, system: str, module: Any, change: tuple[str, str]) -> None:
        changed, mean = mutant(module, change), TUNERS[system].layer_mean
        self._layers_of, self._rule = layers_of, layer_mean.BoundLayerMean
        if module is deltas:
            assert isinstance(mean, Folded)
            mean = replace(mean, delta=getattr(changed, system))
        elif module is own_forms:
            mean = getattr(changed, mean.__name__)  # type: ignore[union-attr]
        elif module is layer_means:
            assert isinstance(mean, Folded)
            mean, self._layers_of = changed.Folded(mean.delta, mean.reads_base), changed.layers_of
        else:
            self._rule = changed.BoundLayerMean
        self._entry = replace(TUNERS[system], layer_mean=mean)

    def bound(self, model: nn.Module) -> Any:
        return self._rule(self._entry, self._layers_of(model))


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_seen(mistake: str) -> None:
    system = WRONG[mistake][0]
    assert Round(system).is_sound() and not Round(system, Wrong(*WRONG[mistake])).is_sound()


def test_an_orthogonal_matrix_levels_any_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    for values in ([1.0], [2.0, 2.0], [5.0, 0.0, 0.0, 0.0], [1e9, 1.0, 1e-9]):
        S = torch.tensor(values, dtype=torch.float64)
        for one in (S, S * torch.rand(len(S), generator=generator, dtype=torch.float64)):
            H = equal_diagonal(one)
            torch.testing.assert_close(H.T @ H, torch.eye(len(S), dtype=torch.float64))
            torch.testing.assert_close((H.T @ torch.diag(one) @ H).diagonal(), one.mean().expand(len(S)))


def test_row_norms_are_those_of_the_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    W, A, B, gains = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((5, 7), (2, 7), (5, 2), (5,)))
    found = row_norms(W, LoraFactors(A, B), gains_D=gains)
    torch.testing.assert_close(found, (torch.diag(gains) @ W + B @ A).norm(dim=1))


def test_what_cannot_be_averaged_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"adapter.system to be one whose layers .*, got deft, .* set method=fedavg"):
        AllBlocks("deft")
    with pytest.raises(InputError, match="whose layers a server can average, got VeRA"):
        LayerMean().bound(fresh("vera"))
    with pytest.raises(InputError, match="leaves its layers as they are.*even adapter.rank"):
        r = Round("hra", r=3)
        r.rule(r.adapter, [ClientUpdate(0, {}, 1.0, 0)])
    with pytest.raises(InputError, match="road_1 or road_2 to average layers, got road_4"):
        Round("road", variant="road_4").play()
    with pytest.raises(InputError, match="max_rank to be at least 1, or null for exact means, got 0"):
        LayerMean(max_rank=0)
    with pytest.raises(ValueError, match="Expected LoRA, or a rule that is bound"):
        LayerMean()(Round("hra").adapter, [])
    with pytest.raises(ValueError, match="positive, finite sum"):
        Round("hra").rule(Round("hra").adapter, [])
