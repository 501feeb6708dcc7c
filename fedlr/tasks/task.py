"""What a run is about: what a row is, what a model reads of it, one loss per example, and how good it is.

A method (`fedlr.methods`) is one axis of a run, a task the other: every method trains every task. Nothing but the task
knows of labels, tokens or pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from fedlr.data.table import Table
from fedlr.tasks.batch import Batch
from fedlr.tasks.evaluation import Evaluation, Metric
from fedlr.tasks.examples import Examples


class Base(Protocol):
    """What a task asks of a base model (`fedlr.models.network.BaseModel`)."""

    @property
    def network(self) -> Any:
        """Return the network of transformers, with its head."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Return what turns rows into what the network reads: a tokenizer, or the processor of pictures."""
        ...

    @property
    def source(self) -> str:
        """Return what messages call the model."""
        ...


class Task(ABC):
    """One object per run, named by `task` in the configuration."""

    name: str
    metric: Metric

    def output_names(self, table: Table) -> tuple[str, ...]:
        """Return the names of a classification head's outputs, in their order: the classes, where rows have some."""
        return table.label_names

    def declared_outputs(self, data: Mapping[str, Any], label_names: Sequence[str]) -> tuple[str, ...]:
        """Return what `output_names` does, without a table: from the section `data` and the names of the classes."""
        return tuple(label_names)

    @abstractmethod
    def check(self, base: Base, table: Table, *, max_length: int) -> None:
        """Check that a base model reads whatever rows of such a table hold; no row passes it.

        Raises:
            InputError: naming what does not fit, and what to change.
        """

    @abstractmethod
    def encode(self, base: Base, table: Table, *, max_length: int) -> Examples:
        """Return the rows as the model reads them, cut to `max_length`.

        Raises:
            InputError: for a table of another task.
        """

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss per example, (N,), each of its own example alone; it runs the model."""

    @abstractmethod
    def probe(self, model: nn.Module) -> Batch:
        """Return a few constant examples, with targets at which the loss has a gradient."""

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> Any:
        """Return what `evaluation` needs of a micro-batch of held-out examples; nothing is noised."""

    @abstractmethod
    def evaluation(self, found: Sequence[Any]) -> Evaluation:
        """Return how good the answers of all micro-batches are."""

    def of_groups(self, found: Mapping[str, Evaluation]) -> Mapping[str, float]:
        """Return further measures, from the evaluation of each group of the held-out examples; none here."""
        return {}
