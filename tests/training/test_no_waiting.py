"""The fused engine waits for no device within a micro-batch: it runs where there are shapes and no numbers.

On PyTorch's meta device whatever needs a number on the host (`item`, `nonzero`, `unique`, a copy to the CPU) has none
and raises, where a GPU would be waited for. Mutants that this rejects: an engine that looks for a client's rows there,
or for rows of no weight.
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fedlr.training.fused
import fedlr.training.stacked
from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Block
from fedlr.models.peft_state import train_only
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses
from fedlr.training.cohort import Stack
from fedlr.training.fused import ClippedSums
from tests.training.small_models import examples_of, mutant, small_model

OWNER = torch.tensor([2, 0, 2, 5, 0])  # on the host, as the cohort knows it
BLOCKS: tuple[Block, ...] = (frozenset({LORA_B}), frozenset({LORA_A, LORA_B, HEAD}))


def on_meta(module: nn.Module) -> None:
    """Move a model with the plain tensors that its layers hold beside parameters."""
    module.to("meta")
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, value.to("meta"))
            elif name == "factors":
                setattr(part, name, {role: factor.detach().to("meta") for role, factor in value.items()})


def sums_of_shapes(
    block: Block, *, architecture: str = "bert", fused: ModuleType = fedlr.training.fused
) -> ClippedSums:
    """Run a micro-batch of five rows of three of six clients where there are no numbers."""
    model = small_model(architecture)
    trained = train_only(model, block)
    engine = fused.FusedGradients(model, trained, loss=class_losses)
    stacks = Stack.of([{slot: parameter.detach() for slot, parameter in trained.items()}] * 6).by_slot()
    on_meta(engine._model)
    inputs, labels = examples_of(architecture, len(OWNER))
    inputs = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}  # transformers looks at it
    meta = {slot: rows.to("meta") for slot, rows in stacks.items()}
    found: ClippedSums = engine.clipped_sums(
        Batch(inputs, labels).to(torch.device("meta")), owner=OWNER, stacks=meta, max_grad_norm=0.5
    )
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=["lora_B", "all"])
def test_a_micro_batch_of_many_clients_needs_no_number_on_the_host(block: Block) -> None:
    found = sums_of_shapes(block)
    assert found.values.is_meta and len(found.values) == 3


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("fused", "owner.unique(", "owner.to(device).unique("),
        ("stacked", "own = share[mine, None]", "mine = share.nonzero().squeeze(1); own = share[mine, None]"),
        (
            "stacked",
            "return list(enumerate(shared.places))",
            "return [(int(i), p) for i, p in zip(shared.owner, shared.places)]",
        ),
    ],
)
def test_an_engine_that_waits_is_found_out(module: str, old: str, new: str) -> None:
    if module == "fused":
        broken = mutant(fedlr.training.fused, (old, new))
    else:
        stacked = mutant(fedlr.training.stacked, (old, new))
        broken = mutant(fedlr.training.fused)
        for name in ("Pass", "StackedLinear", "StackedLora"):
            setattr(broken, name, getattr(stacked, name))
    with pytest.raises((NotImplementedError, RuntimeError)):
        sums_of_shapes(BLOCKS[1], fused=broken)
