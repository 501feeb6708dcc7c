"""Layers whose rank the server changes, through everything that reads an adapter: engines, noise, bytes, disk, export.

Both pools are compared, because they share no training code. Mutants killed: noise of the shapes that clients enrolled
with; a model, an engine or a server that keeps the ranks of the start; an export without the layers' own ranks.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import fedlr.models.export as export_module
import fedlr.models.peft_state as adapter_module
import fedlr.training.cohort as cohort_module
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, LoraFactors, Slot, given_ranks, num_bytes
from fedlr.config.build import build_method
from fedlr.config.runtime_rules import check_aggregate, check_method
from fedlr.errors import InputError
from fedlr.methods.aggregate.server_optimizer import FedAvgM
from fedlr.models.base_delta import SideWeights
from fedlr.models.network import tiny_random
from fedlr.models.peft_state import read_adapter
from fedlr.rounds.evaluate import evaluate
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import sharing_base
from fedlr.rounds.round import RoundDiagnostics, ServerState, request_of, run_round
from fedlr.runs.checkpoint import checkpoint_path
from fedlr.runs.directory import CHECKPOINTS, LEDGER, METRICS
from fedlr.runs.verified_folder import remove_sealed
from fedlr.simulations.choosing import evaluator_of
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool
from fedlr.simulations.simulate import run_rounds
from fedlr.tasks.text_classification import TextClassification
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, federation, lines, open_ledger, quiet, rounds
from tests.training.small_models import mutant

OPACUS = "trainer.engine=opacus"
SGD = (
    "trainer=sgd",
    "trainer.num_steps=3",
    "trainer.sample_rate=0.3",
    "trainer.divisor=4",
    "trainer.optimizer.lr=0.1",
    "num_rounds=4",
)
ENERGY = ("method=rank_energy", "method.finalise.keep=0.6", "method.finalise.period=1")
METHODS = {
    "rank_budget": ("method=rank_budget", "method.finalise.period=1"),
    "rank_growth": ("method=rank_growth",),
    "rank_energy": ENERGY,
    "drop_lora": ("method=drop_lora",),
    "dylora": ("method=dylora",),
    "selective_layers": ("method=selective_layers",),
}
FAST = ("rank_growth", "dylora")


def play(f: Federation, folder: Path, *, num_rounds: int = 4) -> tuple[list[ServerState], list[RoundDiagnostics]]:
    """Train a few rounds, all clients in each; return the states, the first one first, and what was said of rounds."""
    folder.mkdir(exist_ok=True)
    states, said = [f.start], []
    with closing(make_pool(f, create_ledger(f, folder / "ledger.jsonl"))) as pool:
        for _ in range(num_rounds):
            state, diagnostics = run_round(states[-1], [0, 1, 2], pool=pool, method=f.method)
            assert list(diagnostics.trained) == [0, 1, 2], diagnostics.dropouts
            states.append(state)
            said.append(diagnostics)
    return states, said


def functions(adapter: AdapterState) -> dict[str, torch.Tensor]:
    return {path: whole.lora_B.double() @ whole.lora_A.double() for path, whole in adapter.products().items()}


def other_ranks(adapter: AdapterState, *, seed: int = 0) -> AdapterState:
    """The layers of an adapter with ranks 1, 2, 3, ... and values of a training."""
    generator, new = torch.Generator().manual_seed(seed), {}
    for index, (path, layer) in enumerate(adapter.factors().items()):
        rank = 1 + index % len(layer.lora_A)
        lora_B = torch.randn(len(layer.lora_B), rank, generator=generator)
        new[path] = LoraFactors(torch.linalg.qr(layer.lora_A.T).Q.T[:rank].contiguous(), lora_B)
    return adapter.with_factors(new)


@pytest.mark.parametrize("privacy", ["dp", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in METHODS])
def test_together_and_one_by_one_give_the_same_numbers(tmp_path: Path, name: str, privacy: str) -> None:
    """Functions are compared: an SVD of nearly equal singular values may turn factors."""
    overrides = (*METHODS[name], f"privacy={privacy}", *SGD)
    together, said = play(federation(*overrides), tmp_path / "together")
    alone, _ = play(federation(*overrides, OPACUS), tmp_path / "alone")
    for one, other in zip(together, alone, strict=True):
        assert one.adapter.ranks() == other.adapter.ranks()
        for path, product in functions(one.adapter).items():
            torch.testing.assert_close(functions(other.adapter)[path], product, rtol=0, atol=5e-6)
    for state, diagnostics in zip(together, said, strict=False):
        task = request_of(state, build_method(experiment(*overrides)))
        assert diagnostics.bytes_up == 3 * num_bytes(state.adapter.select(task.shared).values())
        assert diagnostics.bytes_down == 3 * task.num_bytes()


@pytest.mark.parametrize("name", ["rank_growth", "rank_energy", "dylora"])
def test_bytes_follow_the_ranks(tmp_path: Path, name: str) -> None:
    states, said = play(federation(*METHODS[name], "privacy=none", *SGD), tmp_path)
    totals = [sum(state.adapter.ranks().values()) for state in states[:-1]]
    assert len(set(totals)) > 1
    sizes = {len(layer.lora_B) for layer in states[0].adapter.factors().values()}
    assert [one.bytes_up for one in said] == [3 * 4 * total * size for total in totals for size in sizes]


# The noise.


def noise_shapes(cohort: object, f: Federation, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the shapes of all noise that is drawn for one client, one step, over layers of different ranks."""
    shapes: list[tuple[int, ...]] = []
    real = cohort.gaussian_noise

    def watched(shape: tuple[int, ...], **given: object) -> torch.Tensor:
        shapes.append(tuple(shape))
        return real(shape, **given)

    monkeypatch.setattr(cohort, "gaussian_noise", watched)
    monkeypatch.setattr("fedlr.rounds.pools.fused.train_cohort", cohort.train_cohort)
    monkeypatch.setattr("fedlr.rounds.pools.fused.Stack", cohort.Stack)
    state = ServerState(other_ranks(f.start.adapter))
    with closing(make_pool(f, create_ledger(f, folder / "ledger.jsonl"))) as pool:
        assert list(run_round(state, [0], pool=pool, method=f.method)[1].trained) == [0]
    return shapes


def test_noise_has_exactly_the_shapes_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = federation(*METHODS["rank_budget"], "trainer.num_steps=1")
    ranks = other_ranks(f.start.adapter).ranks()
    wanted = [(len(layer.lora_B), ranks[path]) for path, layer in f.start.adapter.factors().items()]
    assert len(set(ranks.values())) > 1
    assert noise_shapes(cohort_module, f, tmp_path, monkeypatch) == wanted


def test_more_noise_than_trains_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = federation(*METHODS["rank_budget"], "trainer.num_steps=1")
    line = "own += gaussian_noise(own.shape, std=std, generator=generators[client]).to(own.device)"
    wasteful = line.replace("own.shape", "(len(own), 4)").replace(".to(own", "[:, : own.shape[1]].to(own")
    shapes = noise_shapes(mutant(cohort_module, (line, wasteful)), f, tmp_path, monkeypatch)
    ranks = other_ranks(f.start.adapter).ranks()
    assert shapes != [(len(layer.lora_B), ranks[path]) for path, layer in f.start.adapter.factors().items()]


def test_the_check_against_opacus_is_made_over_the_ranks_of_the_moment(tmp_path: Path) -> None:
    """A scale that the engine forgets on layers of their own rank alone is found in the first round that has them."""
    f = federation(*METHODS["rank_budget"], *SGD)
    state = ServerState(other_ranks(f.start.adapter))
    for forgets in (False, True):
        ledger = create_ledger(f, tmp_path / f"{forgets}.jsonl")
        with closing(make_pool(f, ledger)) as pool:
            if forgets:
                worker = pool._workers.get()
                adapter = f.start.adapter.overlaid(request_of(state, f.method).broadcast)
                engine = worker.engine(adapter, request_of(state, f.method).block)
                for module in engine._model.modules():
                    if hasattr(module, "scale") and hasattr(module, "slots"):
                        module.scale *= 1.0 if len(module.factors[LORA_A]) == 4 else 1.5
                worker._adapter = None
                pool._workers.put(worker)
                with pytest.raises(InputError, match="clipped sums that Opacus computes"):
                    run_round(state, [0, 1], pool=pool, method=f.method)
            else:
                run_round(state, [0, 1], pool=pool, method=f.method)


# The model.


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(4, 100, (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("name", [name for name in METHODS if name != "selective_layers"])
def test_a_change_of_ranks_changes_no_logit(tmp_path: Path, name: str) -> None:
    """With the side merged, before the finaliser and after it; and the model takes any ranks, in any order."""
    f = assemble(experiment(*METHODS[name], "privacy=none", *SGD), seed=0)
    model = sharing_base(f.working)
    side, adapter, changed = SideWeights(model), f.start.adapter, 0
    for index in range(5):
        generator = torch.Generator().manual_seed(index)
        moved = {
            s: t + torch.randn(t.shape, generator=generator) for s, t in adapter.select(frozenset({LORA_B})).items()
        }
        trained = adapter.with_tensors(moved)
        found = []
        for one in (trained, f.method.finalise(trained)):
            side.merge(one)
            adapter_module.write_adapter(model, one.tensors)
            found.append(logits(model))
            assert read_adapter(model).ranks() == one.ranks()
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
        changed += one.ranks() != adapter.ranks() or bool(one.side)
        adapter = one
    assert changed


def test_a_model_takes_no_more_than_the_rank_it_was_made_with() -> None:
    f = federation(*METHODS["rank_budget"])
    model = sharing_base(f.working)
    (path, *_), most = f.start.adapter.ranks(), f.experiment.adapter.rank
    layer = f.start.adapter.factors()[path]
    before = adapter_module.adapter_parameters(model)
    for rank in (most, 1, most + 1):
        tensors = {
            Slot(path, LORA_A): torch.ones(rank, layer.lora_A.shape[1]),
            Slot(path, LORA_B): torch.ones(len(layer.lora_B), rank),
        }
        if rank > most:
            with pytest.raises(ValueError, match="Expected a tensor that the model has"):
                adapter_module.write_adapter(model, tensors)
        else:
            adapter_module.write_adapter(model, tensors)
    assert {slot: id(p) for slot, p in adapter_module.adapter_parameters(model).items()} == {
        slot: id(p) for slot, p in before.items()
    }


@pytest.mark.parametrize("ranks", [(2, 1), (0, 0), (2, None)])
def test_factors_that_disagree_on_the_rank_are_refused_before_anybody_is_charged(
    tmp_path: Path, ranks: tuple[int, int | None]
) -> None:
    f = federation(*METHODS["rank_growth"])
    task = request_of(f.start, f.method)
    path = next(iter(f.start.adapter.factors()))
    layer = f.start.adapter.factors()[path]
    wrong = {**task.broadcast, Slot(path, LORA_A): torch.ones(ranks[0], layer.lora_A.shape[1])}
    if ranks[1] is not None:
        wrong[Slot(path, LORA_B)] = torch.ones(len(layer.lora_B), ranks[1])
    else:
        del wrong[Slot(path, LORA_B)]
    assert path not in given_ranks(wrong)
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    with (
        closing(make_pool(f, ledger)) as pool,
        pytest.raises(ValueError, match="Expected a tensor that the adapter has"),
    ):
        list(pool.train(replace(task, broadcast=wrong), [0]))
    assert ledger.participations(0) == 0


def test_what_is_evaluated_has_the_ranks_of_its_round() -> None:
    f = federation(*METHODS["rank_budget"])
    evaluator, model = evaluator_of(f), sharing_base(f.working)
    for adapter in (other_ranks(f.start.adapter), f.start.adapter, other_ranks(f.start.adapter, seed=1)):
        score, _ = evaluator.score(ServerState(adapter))
        adapter_module.write_adapter(model, adapter.tensors)
        with torch_threads(1):
            assert score.loss == pytest.approx(evaluate(model, f.test, task=TextClassification()).loss, rel=1e-5)


# The disk.


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in METHODS])
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    f = federation(*METHODS[name], *SGD)
    whole = rounds(f, tmp_path / "run")
    for round_index in (3, 4):
        remove_sealed(checkpoint_path(tmp_path / "run" / CHECKPOINTS, round_index))
    with torch_threads(1):
        ledger = open_ledger(tmp_path / "run" / LEDGER, f)
        state, *_ = run_rounds(f, tmp_path / "run", ledger=ledger, progress=quiet(f.experiment))
    assert (state.adapter.fingerprint(), lines(tmp_path / "run" / METRICS)) == whole[:2]


@pytest.mark.parametrize("with_side", [False, True])
def test_plain_peft_opens_layers_of_different_ranks_with_the_same_logits(tmp_path: Path, with_side: bool) -> None:
    opens_with_equal_logits(export_module, tmp_path, with_side=with_side)


def opens_with_equal_logits(module: object, folder: Path, *, with_side: bool) -> None:
    f = assemble(experiment(*METHODS["rank_budget"], "adapter.lora_alpha=6"), seed=0)
    tiny_random(label_names=f.label_names, seed=0).network.save_pretrained(folder / "base")
    adapter = other_ranks(f.start.adapter)
    if with_side:
        sides = {path: LoraFactors(torch.randn(2, x.lora_A.shape[1]), torch.randn(len(x.lora_B), 2))
                 for path, x in adapter.factors().items()}  # fmt: skip
        adapter = replace(adapter, side=sides)
    model = sharing_base(f.model)
    SideWeights(model).merge(adapter)  # the base of f.model as well
    adapter_module.write_adapter(model, adapter.tensors)
    ours = logits(model)
    card = {"name": "a run", "method": "rank_budget", "base": f.base, "max_length": 32}
    statement = {"statement": "none", "not_covered": []}
    module.export_adapter(sharing_base(f.model), adapter, folder / "adapter", statement=statement, **card)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=len(f.label_names))
    opened = PeftModel.from_pretrained(fresh, str(folder / "adapter"))
    torch.testing.assert_close(logits(opened), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(opened.merge_and_unload()), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        ("if adapter.side or any(rank != layers[path].r[ADAPTER_NAME] for path, rank in adapter.ranks().items()):",
         "if adapter.side:"),
        ("adapter.scale * rank", "adapter.scale"),
    ],
)  # fmt: skip
def test_an_export_without_the_layers_own_ranks_is_seen(tmp_path: Path, wrong: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        opens_with_equal_logits(mutant(export_module, wrong), tmp_path, with_side=False)


# What is refused.


def test_an_update_of_the_rank_of_an_earlier_round_is_rejected_by_name(tmp_path: Path) -> None:
    f = federation(*METHODS["rank_growth"], *SGD)

    class Late:
        """The first client answers with tensors of the ranks it enrolled with."""

        def __init__(self, pool: FusedPool) -> None:
            self.pool = pool

        def train(self, task, cohort):
            for update in self.pool.train(task, cohort):
                old = f.start.adapter.select(task.shared)
                yield replace(update, tensors=old) if update.client_id == 0 else update

    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        state, _ = run_round(f.start, [0, 1], pool=pool, method=f.method)
        _, diagnostics = run_round(state, [0, 1], pool=Late(pool), method=f.method)
    assert [(drop.client_id, drop.reason) for drop in diagnostics.dropouts] == [(0, "wrong_shape")]
    assert diagnostics.trained == (1,)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("adapter.client_ranks=[1,2]",), "Expected a method that aggregates mixed ranks for adapter.client_ranks"),
        (("runtime.base_dtype=bfloat16",), "Expected runtime.base_dtype=float32"),
        (("adapter=vera",), "Expected method=fedavg or fedavg_rotating"),
    ],
)
def test_what_cannot_follow_is_refused_by_name(overrides: tuple[str, ...], said: str) -> None:
    e = experiment("method=rank_budget", *overrides)
    with pytest.raises(InputError, match=said) as refused:
        check_method(e, build_method(e))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        ("scaffold", ("+method.dynamic_ranks=true",), "keep nothing"),
        ("flexlora", ("+method.dynamic_ranks=true",), "mixed_ranks=false"),
        ("rank_budget", ("method.broadcast=trained_block",), "full_adapter"),
    ],
)
def test_what_has_the_rank_of_its_round_is_not_kept_by_clients(base: str, changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_method(experiment(f"method={base}", *changes))


def test_a_server_that_remembers_tensors_has_no_dynamic_ranks() -> None:
    f = federation("method=rank_budget")
    wrong = replace(f.method, aggregate=FedAvgM())
    with pytest.raises(InputError, match="remembers no tensors with method.dynamic_ranks"):
        check_aggregate(f.start, wrong, f.experiment, weights=(1.0,) * 4)
    check_aggregate(f.start, f.method, f.experiment, weights=(1.0,) * 4)


def test_a_rule_that_changes_ranks_without_saying_so_is_refused(tmp_path: Path) -> None:
    f = federation("method=rank_growth")
    f = replace(f, method=replace(f.method, dynamic_ranks=False))
    with closing(make_pool(f, create_ledger(f, tmp_path / "ledger.jsonl"))) as pool:
        with pytest.raises(InputError, match="method.dynamic_ranks=true for method=rank_growth"):
            run_round(f.start, [0, 1], pool=pool, method=f.method)
