"""A run of `layer_mean`: every system it serves trains, is scored, and exported as what it computes.

Mutants this file kills: a server that reads layers over weights into which something was merged; clients or an
evaluator that compute without what was folded; an export that forgets it, or what the start of the tensors adds; an
error that is not in the lines of a run.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate, LoraFactors, Slot
from fedlr.errors import InputError
from fedlr.models.peft_state import base_layers, write_adapter
from fedlr.models.tuners import TUNERS
from fedlr.models.tuners.layer_means import Folded
from fedlr.rounds.pools.local import sharing_base
from fedlr.runs.checkpoint import latest_checkpoint
from fedlr.runs.directory import CHECKPOINTS
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.runtime import make_pool
from fedlr.simulations.simulate import simulate
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, federation, lines, rounds
from tests.simulations.test_tuners_run import logits_of, opened

SYSTEMS = sorted(name for name, entry in TUNERS.items() if entry.layer_mean)
QUICK = ("dora", "hra", "vblora")


def words(system: str, *more: str) -> tuple[str, ...]:
    return ("adapter=tuner", f"adapter.system={system}", "method=layer_mean", "trainer.engine=opacus", *more)


def finished(folder: Path, *overrides: str) -> tuple[Federation, Path, AdapterState]:
    run_dir = simulate(experiment(*overrides, f"tracking.output_dir={folder}"), say=lambda line: None)
    checkpoint = latest_checkpoint(run_dir / CHECKPOINTS, say=print)
    assert checkpoint is not None
    return federation(*overrides), run_dir, checkpoint.state.adapter


def computed(f: Federation, adapter: AdapterState) -> Tensor:
    """The logits of a state as a client or the evaluator computes them."""
    own = sharing_base(f.model)
    try:
        f.side.merge(adapter)
        write_adapter(own, adapter.tensors)
        return logits_of(own)
    finally:
        f.side.merge(f.start.adapter)


def check_run(system: str, folder: Path) -> None:
    f, run_dir, adapter = finished(folder, *words(system))
    metrics = lines(run_dir / "metrics.jsonl")
    assert [row["num_trained"] for row in metrics] == [0, 3, 3]
    assert metrics[0]["aggregation_error"] is None and metrics[0]["aggregation_error_by_layer"] == {}
    cut = system in ("dora", "delora")
    assert all((row["aggregation_error"] > 1e-3) is cut for row in metrics[1:])
    assert all(len(row["aggregation_error_by_layer"]) == 4 for row in metrics[1:])
    folds = isinstance(TUNERS[system].layer_mean, Folded)
    assert bool(adapter.side) is folds and (metrics[2]["bytes_down"] > metrics[1]["bytes_down"]) is folds
    here = computed(f, adapter)
    torch.testing.assert_close(logits_of(opened(f, run_dir / "adapter")), here, rtol=0, atol=1e-5)
    assert float((here - computed(f, f.start.adapter)).abs().max()) > 1e-4


@pytest.mark.parametrize("system", QUICK)
def test_a_private_run_is_exported_as_what_it_computes(system: str, tmp_path: Path) -> None:
    check_run(system, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("system", [name for name in SYSTEMS if name not in QUICK])
def test_a_private_run_of_every_other_system_is_exported_as_what_it_computes(system: str, tmp_path: Path) -> None:
    check_run(system, tmp_path)


def moved(f: Federation, adapter: AdapterState, seed: int) -> Mapping[Slot, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = adapter.select(f.request().shared)
    return {slot: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for slot, tensor in start.items()}


def test_what_an_evaluator_has_merged_does_not_change_the_mean() -> None:
    f = federation(*words("peanut"))
    first = f.method.aggregate(f.start.adapter, [ClientUpdate(0, moved(f, f.start.adapter, 1), 1.0, 0)])
    updates = [ClientUpdate(0, moved(f, first, 2), 1.0, 1)]
    plain = f.method.aggregate(first, updates).fingerprint()
    f.side.merge(first)
    assert f.method.aggregate(first, updates).fingerprint() == plain
    f.side.merge(f.start.adapter)


def trained(f: Federation, side: Mapping[str, LoraFactors]) -> Mapping[Slot, Tensor]:
    with torch_threads(1), closing(make_pool(f.without_privacy(), None)) as pool:
        (update,) = pool.train(replace(f.request(), side=side), [0])
    f.side.merge(f.start.adapter)
    assert isinstance(update, ClientUpdate)
    return update.tensors


@pytest.mark.parametrize("system", ["hra", "oft"])  # gradients by vmap and by copies
def test_clients_train_over_what_was_folded_also_behind_a_cached_prefix(system: str) -> None:
    overrides = words(system, "adapter.layers=[1]")
    f, cached = federation(*overrides), federation(*overrides, "runtime.cache_prefix=true")
    generator = torch.Generator().manual_seed(3)
    lora_A, lora_B = torch.randn(2, 32, generator=generator), 0.1 * torch.randn(32, 2, generator=generator)
    layers = base_layers(f.model)
    side = {path: LoraFactors(lora_A, lora_B) for path in layers}
    found, behind, without = trained(f, side), trained(cached, side), trained(f, {})
    for layer in layers.values():
        layer.weight.data += lora_B @ lora_A
    by_hand = trained(f, {})
    for layer in layers.values():
        layer.weight.data -= lora_B @ lora_A
    for slot, tensor in by_hand.items():
        torch.testing.assert_close(found[slot], tensor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(behind[slot], tensor, rtol=1e-4, atol=1e-5)
    assert any(float((found[slot] - tensor).abs().max()) > 1e-3 for slot, tensor in without.items())


REFUSED = {
    "got vera, which is multilinear; set method=fedavg": words("vera"),
    "got ia3, which is linear; set method=fedavg": words("ia3"),
    "leaves its layers as they are.*set an even adapter.rank": words("hra", "adapter.rank=3"),
    "road_1 or road_2": words("road", "adapter.sizes={variant: road_4, group_size: 8}"),
    "Expected trainer.engine=opacus": words("hra", "trainer.engine=fused"),
    "max_rank to be at least 1": words("hra", "method.aggregate.max_rank=0"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_server_cannot_average_is_refused_before_any_work(message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble(experiment(*REFUSED[message]), seed=0)


def test_with_lora_it_is_flexlora_bit_for_bit(tmp_path: Path) -> None:
    ours, theirs = (rounds(federation(f"method={name}"), tmp_path / name) for name in ("layer_mean", "flexlora"))
    assert ours == theirs
