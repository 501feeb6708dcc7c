"""Any system of the registry trains in a simulation by configuration alone, privately or not, or is refused by name.

Mutants this file kills: an engine that does not clip, or clips to twice the bound; a round that trains, sends or moves
a block that the mean would bias; a default block that never moves; bases of a decomposition that are left out of the
export, or differ between copies of a model; a diagnostic of LoRA's that is reported as an exact zero for other systems.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from fedlr.adapters.state import HEAD, SHIPPED, ClientUpdate, Slot, num_bytes, roles_of
from fedlr.config.build import build
from fedlr.errors import InputError
from fedlr.models.peft_state import write_adapter
from fedlr.models.tuners import TUNERS
from fedlr.models.tuners.attach import NOT_IN_RUNS
from fedlr.models.tuners.blocks import ExactBlocks, RotatingBlocks
from fedlr.rounds.pools.local import Worker, sharing_base
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.runtime import make_pool
from fedlr.simulations.simulate import simulate
from fedlr.tasks.probe import probe_inputs
from fedlr.training.gradients import clipped_row_sums
from fedlr.training.local import sum_over
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, federation, leave_state_behind, lines, rounds

FEDAVG = ("method=fedavg", "trainer.engine=opacus")
# Linear by hooks, by vmap and by copies; multilinear by vmap and by copies; nonlinear with an exact block.
SYSTEMS = ("lora_xs", "ia3", "fourierft", "vera", "loha", "dora")
EXTRA = {"lokr": ["adapter.rank=1"], "ln_tuning": ["adapter.target_modules=[LayerNorm]"]}
BIASED = "method.block_schedule.allow_biased=true"


def words(system: str, *more: str) -> tuple[str, ...]:
    return ("adapter=tuner", f"adapter.system={system}", *FEDAVG, *EXTRA.get(system, []), *more)


@contextmanager
def other_machine() -> Iterator[None]:
    """Turn the signs of every decomposition, which are free."""
    svd_lowrank, svd = torch.svd_lowrank, torch.linalg.svd

    def turned_lowrank(*given: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = svd_lowrank(*given, **named)
        return -U, S, -V

    def turned(*given: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = svd(*given, **named)
        return -U, S, -Vh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", turned)
        patch.setattr(torch, "svd_lowrank", turned_lowrank)
        patch.setattr(peft.tuners.psoft.layer, "svd_lowrank", turned_lowrank)
        yield


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**probe_inputs(model)).logits
    return logits


def opened(f: Federation, folder: Path) -> PeftModel:
    """The exported adapter as anybody opens it: on the base model, another seed, another machine."""
    base = build(f.experiment.model.section(), "model", label_names=f.label_names, seed=f.seed).network
    with other_machine(), torch.random.fork_rng():
        torch.manual_seed(99)
        return PeftModel.from_pretrained(base, str(folder))


def finished(folder: Path, *overrides: str) -> tuple[Federation, Path]:
    """Run an experiment to its report, and return its federation and directory."""
    run = simulate(experiment(*overrides, f"tracking.output_dir={folder}"), say=lambda line: None)
    return federation(*overrides), run


@pytest.mark.parametrize(
    ("system", "privacy"),
    [(system, "dp") for system in SYSTEMS]
    + [("lora_xs", "none")]
    + [pytest.param(system, "none", marks=pytest.mark.slow) for system in SYSTEMS if system != "lora_xs"],
)
def test_a_run_completes_and_leaves_an_adapter_that_plain_peft_opens(system: str, privacy: str, tmp_path: Path) -> None:
    f, run = finished(tmp_path, *words(system, f"privacy={privacy}"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    trained = f.start.adapter.select(f.request().block)
    metrics = lines(run / "metrics.jsonl")
    assert all(row["num_trained"] == 3 for row in metrics[1:])
    assert {row["bytes_up"] for row in metrics[1:]} == {3 * num_bytes(trained.values())}
    assert {row["bytes_down"] for row in metrics[1:]} == {3 * num_bytes(trained.values())}
    assert all(row["aggregation_error"] is None and row["singular_values"] == {} for row in metrics)
    assert summary["adapter_sha256"] != f.start.adapter.fingerprint()
    assert summary["num_trained_parameters"] * 4 == num_bytes(trained.values())
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    assert TUNERS[system].title in (run / "adapter" / "README.md").read_text(encoding="utf-8")
    there = logits_of(opened(f, run / "adapter"))
    assert not torch.equal(there, logits_of(sharing_base(f.model))), "training has moved the logits"


@pytest.mark.parametrize("system", [*SYSTEMS, "psoft"])
def test_the_export_has_the_logits_of_the_state(system: str, tmp_path: Path) -> None:
    check_export(system, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("system", [n for n in TUNERS if n not in (*NOT_IN_RUNS, *SYSTEMS, "lora", "psoft")])
def test_every_other_system_that_is_not_refused_exports_its_logits(system: str, tmp_path: Path) -> None:
    check_export(system, tmp_path)


def check_export(system: str, folder: Path) -> None:
    biased = [] if TUNERS[system].exact_alone() and system != "delora" else [BIASED]
    f = federation(*words(system, "privacy=none", *biased))
    generator = torch.Generator().manual_seed(1)
    moved = {
        slot: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for slot, tensor in f.start.adapter.select(f.request().block).items()
    }
    state = replace(f.start, adapter=f.start.adapter.with_tensors(moved))
    leave_state_behind(f, folder, state)
    own = sharing_base(f.model)
    before = logits_of(own)
    write_adapter(own, state.adapter.tensors)
    here, there = logits_of(own), logits_of(opened(f, folder / "adapter"))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)
    assert float((here - before).abs().max()) > 1e-5, "the logits do depend on what trains"


@pytest.mark.parametrize("system", ["lora_xs", "loha"])
def test_two_runs_are_equal_bit_for_bit_whatever_the_number_of_workers(system: str, tmp_path: Path) -> None:
    def play(folder: str, *more: str) -> Any:
        with torch_threads(1):
            f = assemble(experiment(*words(system, *more)), seed=0)
        return rounds(f, tmp_path / folder)

    first = play("one")
    assert first == play("again")
    assert first[0] == play("threads", "runtime.num_workers=2")[0]
    assert first[0] != play("another", "adapter.target_modules=[query]")[0]


@pytest.mark.parametrize("system", ["lora_xs", "vera", "fourierft"])
def test_behind_a_cached_prefix_a_system_trains_to_the_same_values(system: str) -> None:
    def trained(*more: str) -> dict[Slot, Tensor]:
        f = federation(*words(system, "adapter.layers=[1]", *more))
        public = f.without_privacy()
        with torch_threads(1), closing(make_pool(public, None)) as pool:
            (update,) = pool.train(f.request(), [0])
        assert isinstance(update, ClientUpdate)
        return dict(update.tensors)

    whole, upper = trained(), trained("runtime.cache_prefix=true")
    assert whole.keys() == upper.keys()
    for slot, tensor in whole.items():
        torch.testing.assert_close(upper[slot], tensor, rtol=1e-4, atol=1e-5)


def largest_sum(f: Federation, *, mode: str = "hooks", max_grad_norm: float) -> float:
    """The largest norm of a clipped sum over one row, of a client at a start that is no special point."""
    worker = Worker(sharing_base(f.model), mode)
    generator = torch.Generator().manual_seed(2)
    block = f.request().block
    moved = {
        slot: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for slot, tensor in f.start.adapter.select(block).items()
    }
    trained, gradients = worker.start_from(f.start.adapter.with_tensors(moved), block)
    assert f.mechanism is not None
    mechanism = replace(f.mechanism, max_grad_norm=max_grad_norm)
    share = f.clients[0]
    norms = []
    for row in share.rows[:6]:
        total = sum_over(
            gradients,
            share.table,
            share.rows[share.rows == row],
            training=f.training,
            mechanism=mechanism,
            trained=trained,
        )
        norms.append(math.sqrt(sum(float(value.double().square().sum()) for value in total.values())))
    worker.close()
    return max(norms)


@pytest.mark.parametrize("mode", ["hooks", "loop"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_no_row_moves_a_clipped_sum_by_more_than_the_bound(system: str, mode: str) -> None:
    f = federation(*words(system))
    unclipped = largest_sum(f, mode=mode, max_grad_norm=1e6)
    bound = unclipped / 3
    assert largest_sum(f, mode=mode, max_grad_norm=bound) == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("factor", [2.0, 1e9], ids=["twice the bound", "no clipping"])
def test_an_engine_that_clips_too_little_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_little(samples: Mapping[Slot, Tensor], *, max_grad_norm: float) -> dict[Slot, Tensor]:
        return clipped_row_sums(samples, max_grad_norm=factor * max_grad_norm)

    f = federation(*words("vera"))
    bound = largest_sum(f, max_grad_norm=1e6) / 3
    monkeypatch.setattr("fedlr.training.copies.clipped_row_sums", too_little)
    assert largest_sum(f, max_grad_norm=bound) > 1.5 * bound


def test_an_engine_whose_sums_are_not_the_loops_is_refused_before_any_row_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mixed(samples: Mapping[Slot, Tensor], *, max_grad_norm: float) -> dict[Slot, Tensor]:
        mean = {slot: rows.mean(dim=0, keepdim=True).expand_as(rows).clone() for slot, rows in samples.items()}
        return clipped_row_sums(mean, max_grad_norm=max_grad_norm)

    monkeypatch.setattr("fedlr.training.copies.clipped_row_sums", mixed)
    with pytest.raises(InputError, match="those of single examples"):
        assemble(experiment(*words("vera")), seed=0)


@pytest.mark.parametrize(("system", "rotating"), [("vera", False), ("loha", True)])
def test_the_blocks_that_do_not_train_stay_as_they_were(system: str, rotating: bool, tmp_path: Path) -> None:
    method = ["method=fedavg_rotating"] if rotating else []
    f, run = finished(tmp_path, *words(system, *method, "privacy=none", "num_rounds=2"))
    opened_tensors = dict(opened(f, run / "adapter").named_parameters())
    moved = {
        slot.role
        for slot, tensor in f.start.adapter.tensors.items()
        if slot.role != HEAD and not torch.equal(opened_tensors[slot.path], tensor)
    }
    roles = list(f.method.block_schedule.roles)
    assert moved == set(roles[:2]) and len(moved) == (2 if rotating else 1)
    assert [roles_of(f.request(index).block) for index in (0, 1)] == [{roles[0]}, {roles[rotating]}]
    down = lines(run / "metrics.jsonl")[1]["bytes_down"] / 3
    all_bytes = num_bytes(t for slot, t in f.start.adapter.tensors.items() if slot.role != HEAD)
    assert (down == all_bytes) is rotating


def test_which_blocks_train_follows_from_the_form() -> None:
    assert ExactBlocks("ia3").roles == {"ia3.scales"}
    assert ExactBlocks("vera").roles == {"vera.lambda_b"}
    assert ExactBlocks("vera", block="lambda_d").roles == {"vera.lambda_d"}
    assert ExactBlocks("vera", allow_biased=True).roles == {"vera.lambda_b", "vera.lambda_d"}
    assert ExactBlocks("dora").roles == {"dora.magnitude"}, "exact alone in a nonlinear system"
    assert ExactBlocks("dora", block="lora_B", allow_biased=True).roles == {"dora.lora_B"}
    assert ExactBlocks("lora").roles == {"lora_B"} and ExactBlocks("lora", allow_biased=True).roles == {
        "lora_A",
        "lora_B",
    }
    assert RotatingBlocks("lora").roles == ("lora_B", "lora_A")
    assert len(list(RotatingBlocks("loha").roles)) == 4


@pytest.mark.parametrize("name", [n for n, t in TUNERS.items() if n not in NOT_IN_RUNS and t.form == "multilinear"])
def test_the_default_block_of_every_multilinear_system_has_a_gradient(name: str) -> None:
    f = federation(*words(name))
    assert f.request().block == frozenset(f.method.block_schedule.roles)


def test_with_fedavg_lora_is_ffa_lora_bit_for_bit(tmp_path: Path) -> None:
    ours, theirs = (rounds(federation(f"method={name}"), tmp_path / name) for name in ("fedavg", "ffa_lora"))
    assert ours == theirs
    rotating, rolora = (rounds(federation(f"method={name}"), tmp_path / name) for name in ("fedavg_rotating", "rolora"))
    assert rotating[0] == rolora[0]


REFUSED = {
    "HRA is nonlinear, so the layer of the mean": words("hra"),
    "DoRA .* is nonlinear": words("dora", "method.block_schedule.block=lora_B"),
    "VeRA is multilinear|block to be one of lambda_b, lambda_d": words("vera", "method.block_schedule.block=lambda_c"),
    "has two exact blocks|two exact blocks or more": words("ia3", "method=fedavg_rotating"),
    "block with a gradient at the start, got vera.lambda_d": words("vera", "method.block_schedule.block=lambda_d"),
    "Expected vera, got 'verra'": words("verra"),
    "'osf': it edits gradients": words("osf"),
    "'eva': it is LoRA with another start; set adapter=lora": words("eva"),
    "'kasa': it changes the base": words("kasa"),
    "'frod': its saved folder": words("frod"),
    "method=fedavg or fedavg_rotating .* got fedsvd": words("vera", "method=fedsvd"),
    "method=fedavg or fedavg_rotating .* got flora": words("vera", "method=flora"),
    "got fedavg: it is made": words("vera", "method.broadcast=full_adapter"),
    "trainer.engine=opacus .* got fused": words("vera", "trainer.engine=fused"),
    "trainer.after_noise=none": words(
        "vera",
        "trainer.after_noise={_target_: scaled_gradient, reg: 0.1}",
    ),
    "grad_sample_mode=hooks or loop .* got ghost": words("vera", "trainer.grad_sample_mode=ghost"),
    "runtime.base_dtype=float32": words("vera", "runtime.base_dtype=bfloat16"),
    "runtime.num_processes=1": words("vera", "runtime.num_processes=2"),
    "adapter.init_lora_weights=True": words("vera", "adapter.init_lora_weights=gaussian"),
    "adapter.client_ranks=None|mixed ranks": words("vera", "adapter.client_ranks=[2,4]"),
    "keys of VeraConfig, such as d_initial": words("vera", "adapter.sizes={d_init: 3}"),
    "adapter.rank to set the rank": words("vera", "adapter.sizes={r: 3}"),
    "keys of VeraConfig": words("vera", "adapter.sizes={projection_prng_key: 3}"),
    "block size should be a factor": words("c3a", "adapter.sizes={block_size: 5}"),
    "lokr_w2.default besides": words("lokr", "adapter.rank=4"),
    "name layers of tiny-random": words("vera", "adapter.target_modules=[qery]"),
    "dropout 0": words("vera", "adapter.sizes={vera_dropout: 0.1}"),
    "adapter.sizes=.* for adapter.system=lora": (*FEDAVG, "adapter.sizes={r: 3}"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(message: str) -> None:
    with pytest.raises(InputError, match=message):
        assemble(experiment(*REFUSED[message]), seed=0)


def test_a_system_must_be_named() -> None:
    with pytest.raises(InputError, match="Expected a value for adapter.system"):
        experiment("adapter=tuner", *FEDAVG)


def test_bases_of_a_decomposition_are_given_once_and_are_the_same_in_every_copy() -> None:
    f = federation(*words("lora_xs"))
    shipped = f.start.adapter.select(frozenset({SHIPPED}))
    assert num_bytes(shipped.values()) == 4 * 4 * 4 * (32 + 32), "A and B of rank 4 on four layers"
    assert not set(shipped) & (set(f.request().broadcast) | set(f.start.adapter.select(f.request().shared)))
    model = sharing_base(f.model)
    write_adapter(model, f.start.adapter.tensors)
    turned = f.start.adapter.with_tensors({slot: -tensor for slot, tensor in shipped.items()})
    assert turned.fingerprint() != f.start.adapter.fingerprint()
    with pytest.raises(ValueError, match="that were shipped, got others"):
        write_adapter(model, turned.tensors)


def test_the_tensors_of_a_system_are_never_taken_for_loras() -> None:
    adapter = federation(*words("dora", BIASED)).start.adapter
    assert {"dora.lora_A", "dora.lora_B"} < {slot.role for slot in adapter.tensors}
    assert adapter.factors() == {} == adapter.products()
