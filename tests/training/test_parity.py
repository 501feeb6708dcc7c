"""The check of a run's first batches stops a broken engine, and no other.

Mutants this file kills: an engine that forgets the scale, a head's bias or some rows, one that credits the next client,
one that reads the first client's tensors, one that gives nan or nothing; a check that compares nothing, one client, or
to any tolerance; a check that is alarmed where rows cancel.
"""

import math
import re
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fedlr.training.parity as shipped
from fedlr.adapters.state import Block
from fedlr.errors import InputError
from fedlr.models.peft_state import adapter_parameters, read_adapter, train_only
from fedlr.models.precision import with_bfloat16_base
from fedlr.rounds.pools.local import sharing_base
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import LossOfLogits, class_losses, cross_entropy, token_losses
from fedlr.training.cohort import Stack
from fedlr.training.fused import ClippedSums, FusedGradients
from fedlr.training.gradients import HookGradients
from tests.training.cohort_runs import engine_over
from tests.training.small_models import (
    A_AND_B,
    B_ONLY,
    BUILDERS,
    EVERYTHING,
    batch,
    examples_of,
    mutant,
    small_model,
)

OWNER = torch.tensor([2, 0, 4, 0, 2, 2, 4, 0, 2, 1])


class Scene:
    """A micro-batch of several clients, an engine, and the check beside it, over one base."""

    def __init__(
        self,
        architecture: str = "bert",
        *,
        block: Block = EVERYTHING,
        engine: type[FusedGradients] = FusedGradients,
        parity: ModuleType = shipped,
        halved: bool = False,
    ) -> None:
        self.loss = token_losses if architecture == "llama_lm" else class_losses
        model = small_model(architecture, targets="all-linear")
        self.model = with_bfloat16_base(model).train() if halved else model
        self.inputs, self.labels = examples_of(architecture, len(OWNER))
        self.adapter = read_adapter(self.model)
        own, generator = self.adapter.select(block), torch.Generator().manual_seed(2)
        starts = [{s: v + 0.1 * torch.randn(v.shape, generator=generator) for s, v in own.items()} for _ in range(5)]
        self.stacks = Stack.of(starts).by_slot()
        self.check = parity.ParityCheck(sharing_base(self.model), loss=self.loss)
        self.engine = engine(self.model, train_only(self.model, block), loss=self.loss)

    def found(self, *, bound: float = 0.5) -> ClippedSums:
        return self.engine.clipped_sums(
            Batch(self.inputs, self.labels), owner=OWNER, stacks=self.stacks, max_grad_norm=bound
        )

    def compare(self, *, bound: float = 0.5, found: ClippedSums | None = None) -> None:
        self.check.compare(
            self.found(bound=bound) if found is None else found,
            Batch(self.inputs, self.labels),
            owner=OWNER,
            adapter=self.adapter.tensors,
            stacks=self.stacks,
            max_grad_norm=bound,
        )


@pytest.mark.parametrize("architecture", BUILDERS)
def test_a_good_engine_passes(architecture: str) -> None:
    block = A_AND_B if architecture == "llama_lm" else EVERYTHING
    for bound in (0.05, math.inf):
        Scene(architecture, block=block).compare(bound=bound)


@pytest.mark.parametrize("architecture", BUILDERS)
def test_a_good_engine_passes_over_a_bfloat16_base(architecture: str) -> None:
    Scene(architecture, block=B_ONLY, halved=True).compare()


FORGETS_SCALE = (".mul_(layer.scale)  # s x A^T", "  # s x A^T")
BROKEN = {
    "forgets the scale": [FORGETS_SCALE],
    "forgets the scale of what goes on": [(".mul_(layer.scale)  # s g B", "  # s g B")],
    "credits the next client": [
        ("torch.mm(weights, self.values, out=out)", "torch.mm(weights.roll(1, 0), self.values, out=out)")
    ],
    "takes the first client's tensors": [("stack.index_select(0, self.owner)", "stack[0]")],
    "forgets a head's bias": [("Rows(sums.clone())", "Rows(sums.clone().zero_())")],
    "sums a part of the rows": [
        ("torch.mm(weights, self.values, out=out)", "torch.mm(weights[:, :-2], self.values[:-2], out=out)")
    ],
    "gives nan": [("torch.mm(weights, self.values, out=out)", "out.fill_(float('nan'))")],
    "gives nothing": [("torch.mm(weights, self.values, out=out)", "out.zero_()")],
}


# In bfloat16 the check is coarse: a part of an eighth of the sum, as the bias of a head, passes.
CASES = [(name, halved) for name in BROKEN for halved in (False, True) if not halved or name != "forgets a head's bias"]


@pytest.mark.parametrize(("name", "halved"), CASES)
def test_a_broken_engine_is_stopped(name: str, halved: bool) -> None:
    scene = Scene(engine=engine_over(*BROKEN[name]), halved=halved)
    with pytest.raises(InputError, match=r"overflow, both are wrong: lower it; else set trainer\.engine=opacus"):
        scene.compare()


def test_an_engine_that_reads_one_clients_tensors_is_stopped_when_they_first_differ() -> None:
    scene = Scene(engine=engine_over(*BROKEN["takes the first client's tensors"]))
    own = scene.stacks
    scene.stacks = {slot: stack[:1].expand_as(stack).clone() for slot, stack in own.items()}
    scene.compare()  # as in the first step of a round: right by chance
    scene.stacks = own
    with pytest.raises(InputError, match="trainer.engine=opacus"):
        scene.compare()


def test_the_message_names_what_to_set_and_holds_no_number() -> None:
    errors = []
    for bound in (0.5, 0.7):
        with pytest.raises(InputError) as error:
            Scene(engine=engine_over(FORGETS_SCALE)).compare(bound=bound)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert not re.search(r"\d", errors[0])
    assert "set trainer.engine=opacus" in errors[0]
    assert "trainer.check_parity=false" in errors[0]


def test_it_compares_once_and_then_costs_nothing() -> None:
    scene = Scene()
    scene.compare()
    nothing = ClippedSums(torch.arange(3), torch.full((3, 7), math.nan))
    scene.compare(found=nothing)
    # Also after an alarm: the run has ended, and threads that are still at work say nothing more.
    scene = Scene(engine=engine_over(FORGETS_SCALE))
    with pytest.raises(InputError):
        scene.compare()
    scene.compare()


def test_it_leaves_the_engine_and_its_model_alone() -> None:
    scene = Scene()
    before = {name: value.clone() for name, value in scene.model.state_dict().items()}
    found = scene.found()
    scene.compare(found=found)
    assert all(torch.equal(scene.model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(scene.found().values, found.values)
    own = scene.check._model
    assert not any(m._forward_hooks or m._backward_hooks for m in own.modules())
    assert all(p.grad is None and not hasattr(p, "_norm_sample") for p in own.parameters())


def check_each_of_the_first_clients_counts(parity: ModuleType) -> None:
    """One client's sum is wrong by a part in a hundred: seen, whichever of the first four it is."""
    for place in range(4):
        scene = Scene(parity=parity)
        found = scene.found()
        found.values[place] *= 1.01
        with pytest.raises(InputError):
            scene.compare(found=found)


def test_each_of_the_first_clients_counts() -> None:
    check_each_of_the_first_clients_counts(shipped)


@pytest.mark.parametrize(
    "change",
    [
        ("[:CLIENTS_COMPARED]", "[:1]"),
        ("mine = owner == client", "mine = owner == owner.min()"),
        ("torch.float32: 1e-3", "torch.float32: 1.0"),
        ("if self._seen_different if different else self._seen:", "if True:"),
    ],
    ids=["one client", "one client's rows", "any tolerance", "never"],
)
def test_a_check_that_sees_less_is_caught(change: tuple[str, str]) -> None:
    parity = mutant(shipped, change)
    with pytest.raises((pytest.fail.Exception, InputError)):
        check_each_of_the_first_clients_counts(parity)
        Scene(parity=parity).compare()


def two_classes(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :2], labels)


def check_rows_that_cancel_are_no_alarm(parity: ModuleType) -> None:
    """One text under both labels of two: the clipped gradients are opposite, and what is left is rounding."""
    model = small_model()
    adapter, own = read_adapter(model), read_adapter(model).select(B_ONLY)
    stacks = Stack.of([own]).by_slot()
    engine = FusedGradients(model, train_only(model, B_ONLY), loss=LossOfLogits(two_classes))
    inputs, labels = batch([[5, 6, 7]] * 2), torch.tensor([0, 1])
    call = {"owner": torch.zeros(2, dtype=torch.long), "stacks": stacks, "max_grad_norm": 0.1}
    found = engine.clipped_sums(Batch(inputs, labels), **call)
    assert 0 < float(found.values.norm()) < 1e-6
    check = parity.ParityCheck(sharing_base(model), loss=LossOfLogits(two_classes))
    check.compare(found, Batch(inputs, labels), adapter=adapter.tensors, **call)


def test_rows_that_cancel_are_no_alarm() -> None:
    check_rows_that_cancel_are_no_alarm(shipped)


def test_a_check_of_the_sum_alone_would_be_alarmed() -> None:
    with pytest.raises(InputError):
        check_rows_that_cancel_are_no_alarm(mutant(shipped, ("sum(float(part.norm()) for part in parts)", "0.0")))


def test_it_works_while_engines_of_other_blocks_are_in_use() -> None:
    scene = Scene(block=B_ONLY)
    other = HookGradients(scene.model, train_only(scene.model, A_AND_B), loss=class_losses)
    scene.compare()
    assert {slot.role for slot, p in adapter_parameters(scene.model).items() if p.requires_grad} == A_AND_B
    other.close()


def test_a_model_that_was_loaded_in_eval_mode_is_compared() -> None:
    """Opacus' hooks see nothing of a module in eval mode, as the head of a saved model is."""
    scene = Scene()
    scene.model.eval()
    scene.check = shipped.ParityCheck(sharing_base(scene.model), loss=scene.loss)
    scene.compare()


@pytest.mark.parametrize("engine", [FusedGradients, engine_over(FORGETS_SCALE)], ids=["good", "broken"])
def test_where_opacus_cannot_run_the_check_is_made_without_it(
    monkeypatch: pytest.MonkeyPatch, engine: type[FusedGradients]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HookGradients, "clipped_sum", fails)
    scene = Scene(engine=engine)
    if engine is FusedGradients:
        scene.compare()
    else:
        with pytest.raises(InputError, match="trainer.engine=opacus"):
            scene.compare()
