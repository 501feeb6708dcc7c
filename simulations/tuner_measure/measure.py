"""Two figures of a tuner: what averaging its tensors costs, and whether its gradients are of one example each.

Exactness: three clients move the trained tensors at random from a common start, frozen parts shared, in float64.

    error = || f(mean of theta_k) - mean of f(theta_k) || / || mean of f(theta_k) - f(theta_0) ||

f being the functions of all adapted layers. Zero: the mean of the tensors is the ideal aggregate. Near one: the bias is
as large as the update.

Gradients: the largest difference between the per-example gradients of the tuner's path and a loop over single examples
through `backward`, relative to the largest entry of the tensor. The clipped sums of the path, which are float32, are
compared too.

Both are properties of formulas, so a small network shows them; magnitudes do not carry over.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlr.adapters.state import Slot
from fedlr.models.starts.tuner_starts import PublicBatch
from fedlr.models.tuners.build import build, load_parts, shipped_parts, trained_parameters
from fedlr.models.tuners.entry import Tuner
from fedlr.simulations.tuner_measure.networks import NETWORKS, NUM_TASKS, examples, probe
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import class_losses, losses_of
from fedlr.training.float64 import float32_as_float64, in_float64
from fedlr.training.tuner_gradients import ENGINES, rows

NUM_CLIENTS, NUM_EXAMPLES = 3, 4
SPREAD = 0.3  # standard deviation of every move: far from zero, where all formulas look linear
EXACT, BIASED = 1e-10, 1e-3  # an error below the one is rounding, above the other is not
SAME_GRADIENTS = 1e-5
ALL_BLOCKS = "all blocks"

Values = Mapping[Slot, Tensor]


@dataclass(frozen=True)
class Figures:
    """What was measured of one tuner."""

    exactness: Mapping[str, float]  # by block that trains alone, and ALL_BLOCKS
    gradients: float  # largest relative difference of a per-example gradient
    clipped_sums: float  # largest difference of a clipped sum, in units of the bound
    together: float  # largest relative difference of the batch's gradient from the sum of its rows
    num_trained: int
    num_shipped: int


@dataclass(frozen=True)
class Subject:
    """A tuner on its measuring network, at a common start that is no special point."""

    tuner: Tuner
    model: nn.Module
    trained: Mapping[Slot, nn.Parameter]
    batch: Batch
    task: Mapping[str, Tensor]  # inputs besides x, of one probe

    def function(self) -> Tensor:
        """Return the outputs of all layers, each on the probe."""
        with torch.no_grad(), float32_as_float64():
            output: Tensor = self.model(x=probe(self.tuner.network), apart=True, **self.task).logits
        return output


def subject(tuner: Tuner, *, seed: int = 0, client: bool = False) -> Subject:
    """Build a tuner on its network, in float64.

    Args:
        seed: of everything that PEFT draws; the frozen network is the same for all seeds.
        client: as a client builds it, from its own generator and without public data.
    """
    generator = torch.Generator().manual_seed(1)
    inputs, labels = examples(tuner.network, NUM_EXAMPLES, generator)
    narrow = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    public = PublicBatch(Batch(narrow, labels), class_losses)
    kind = NETWORKS[tuner.network]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = kind()
        torch.manual_seed(seed)
        targets = {} if "target_modules" in tuner.sizes else {"target_modules": list(kind.targets)}
        model = build(network, tuner, public=public, client=client, **targets)
    in_float64(model)
    task = {}
    if tuner.reads_task:
        inputs = {**inputs, "task_ids": torch.arange(NUM_EXAMPLES) % NUM_TASKS}
        task = {"task_ids": torch.zeros(1, dtype=torch.long)}
    made = Subject(tuner, model, trained_parameters(model, tuner), Batch(inputs, labels), task)
    write(made.trained, moved(read(made.trained), torch.Generator().manual_seed(2)))
    return made


def read(trained: Mapping[Slot, nn.Parameter]) -> dict[Slot, Tensor]:
    """Return copies of the trained tensors."""
    return {slot: parameter.detach().clone() for slot, parameter in trained.items()}


def write(trained: Mapping[Slot, nn.Parameter], values: Values) -> None:
    """Overwrite the trained tensors."""
    with torch.no_grad():
        for slot, value in values.items():
            trained[slot].copy_(value)


def moved(values: Values, generator: torch.Generator) -> dict[Slot, Tensor]:
    """Return the tensors, each entry moved at random."""
    return {
        slot: value + SPREAD * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for slot, value in values.items()
    }


def exactness_error(made: Subject, blocks: frozenset[str]) -> float:
    """Return the error of averaging while `blocks` train and the others stay at the common start."""
    start = read(made.trained)
    generator = torch.Generator().manual_seed(3)
    clients = []
    for _ in range(NUM_CLIENTS):
        new = moved(start, generator)
        clients.append({slot: new[slot] if slot.role in blocks else start[slot] for slot in start})
    mean = {slot: torch.stack([values[slot] for values in clients]).mean(dim=0) for slot in start}

    def function_at(values: Values) -> Tensor:
        write(made.trained, values)
        return made.function()

    try:
        before = function_at(start)
        ideal = torch.stack([function_at(values) for values in clients]).mean(dim=0)
        error = (function_at(mean) - ideal).norm() / (ideal - before).norm()
    finally:
        write(made.trained, start)
    return float(error)


def exactness(made: Subject) -> dict[str, float]:
    """Return the error of all blocks together, and of each block alone where there are several."""
    blocks = sorted(made.tuner.blocks)
    errors = {ALL_BLOCKS: exactness_error(made, frozenset(blocks))}
    return errors | ({block: exactness_error(made, frozenset({block})) for block in blocks} if len(blocks) > 1 else {})


def reference_rows(made: Subject) -> dict[Slot, Tensor]:
    """Return the gradient of each example, (N, ...) a slot, each from a model that sees nothing else."""
    found: dict[Slot, list[Tensor]] = {slot: [] for slot in made.trained}
    for row in range(NUM_EXAMPLES):
        made.model.zero_grad(set_to_none=True)
        with float32_as_float64():
            losses_of(made.model, class_losses, made.batch.one(row)).sum().backward()
        for slot, parameter in made.trained.items():
            if parameter.grad is None:
                raise ValueError(f"Expected every trained tensor of {made.tuner.title} to have a gradient, got none")
            found[slot].append(parameter.grad.to_dense().clone())
    made.model.zero_grad(set_to_none=True)
    return {slot: torch.stack(tensors) for slot, tensors in found.items()}


def row_difference(made: Subject, expected: Values) -> float:
    """Return how far the per-example gradients of the tuner's path are from `expected`, relative to each tensor."""
    with float32_as_float64():
        found = rows(made.tuner, made.model, made.trained, made.batch, loss=class_losses)
    return max(largest_difference(of_engine, expected) for of_engine in found)


def largest_difference(found: Values, expected: Values) -> float:
    """Return the largest difference of any tensor, relative to its largest entry; infinity if a tensor is missing."""
    if found.keys() != expected.keys() or any(found[s].shape != expected[s].shape for s in expected):
        return math.inf
    differences = [(found[s] - expected[s]).abs().max() / expected[s].abs().max() for s in expected]
    return float(torch.stack(differences).nan_to_num(nan=math.inf).max())


def batch_difference(made: Subject, expected: Values) -> float:
    """Return how far the gradient of the summed loss of all examples is from the sum of `expected`.

    Where examples interact, in the forward pass or in a hook, the rows do not add up.
    """
    with float32_as_float64():
        total = losses_of(made.model, class_losses, made.batch).sum()
        found = torch.autograd.grad(total, list(made.trained.values()))
    sums = {slot: row.sum(dim=0) for slot, row in expected.items()}
    largest = {slot: expected[slot].abs().max() for slot in sums}  # a sum may cancel
    differences = [(g - sums[slot]).abs().max() / largest[slot] for slot, g in zip(made.trained, found, strict=True)]
    return float(torch.stack(differences).nan_to_num(nan=math.inf).max())


def clipped_sum_difference(made: Subject, expected: Values) -> float:
    """Return how far the engine's clipped sum is from that of `expected`, in units of the bound.

    The bound is the median norm: some rows are clipped and some are not.
    """
    norms = torch.stack([row.flatten(1).norm(dim=1) for row in expected.values()]).norm(dim=0)
    bound = float(norms[norms > 0].median())
    weights = (bound / norms).clamp(max=1.0)
    sums = {slot: torch.tensordot(weights, row, dims=1) for slot, row in expected.items()}
    largest = 0.0
    for kind in ENGINES[made.tuner.path]:
        way = kind(made.model, made.trained, loss=class_losses)
        try:
            found = way.clipped_sum(made.batch, max_grad_norm=bound)
        finally:
            way.close()
        largest = max(largest, *(float((found[slot] - sums[slot]).abs().max()) / bound for slot in sums))
    return largest


def client_error(server: Subject, *, seed: int, parts: Mapping[str, Tensor]) -> float:
    """Return how wrong the layers of a client with another seed are, once it has the trained tensors and `parts`.

    Relative to what the trained tensors change at all.
    """
    client = subject(server.tuner, seed=seed, client=True)
    load_parts(client.model, parts)
    write(client.trained, read(server.trained))
    start = read(server.trained)
    expected = server.function()
    write(server.trained, moved(start, torch.Generator().manual_seed(4)))
    change = (server.function() - expected).norm()
    write(server.trained, start)
    return float((client.function() - expected).norm() / change)


def measure(tuner: Tuner) -> Figures:
    """Measure one tuner."""
    made = subject(tuner)
    expected = reference_rows(made)
    return Figures(
        exactness=exactness(made),
        gradients=row_difference(made, expected),
        clipped_sums=clipped_sum_difference(made, expected),
        together=batch_difference(made, expected),
        num_trained=sum(parameter.numel() for parameter in made.trained.values()),
        num_shipped=sum(tensor.numel() for tensor in shipped_parts(made.model, tuner).values()),
    )


def disagreements(tuner: Tuner, figures: Figures) -> list[str]:
    """Return what the figures say against the entry, one line each; nothing if they agree."""
    found = []
    for block, error in figures.exactness.items():
        exact = tuner.form == "linear" if block == ALL_BLOCKS else block in tuner.exact_alone()
        if not (error < EXACT if exact else error > BIASED):
            kind = "exact" if exact else "biased"
            found.append(f"{tuner.title}: declared {kind} with {block}, got an error of {error:.1e}")
    if not figures.gradients < SAME_GRADIENTS:
        found.append(f"{tuner.title}: per-example gradients by {tuner.path} are off by {figures.gradients:.1e}")
    if not figures.clipped_sums < SAME_GRADIENTS:
        found.append(f"{tuner.title}: clipped sums by {tuner.path} are off by {figures.clipped_sums:.1e} of the bound")
    if not figures.together < SAME_GRADIENTS:
        found.append(f"{tuner.title}: examples change each other's gradients by {figures.together:.1e}")
    return found
