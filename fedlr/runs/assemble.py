"""From a checked experiment and its tables to a model that is ready for the first round: the same for every runtime.

A simulation gives all its rows, a server the rows that it holds out. Whatever could not run as configured is an error
here, before any work.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlr.config.auto_rates import provisional
from fedlr.config.build import build, build_method, build_task, naming
from fedlr.config.runtime_rules import check_aggregate, check_runtime
from fedlr.config.schema import Experiment
from fedlr.data.table import Table
from fedlr.methods.method import Method
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import read_adapter
from fedlr.models.starts.starts import start_of
from fedlr.models.tuners.attach import attach
from fedlr.privacy.mechanism import Mechanism
from fedlr.rounds.round import ServerState, initial_state, request_of
from fedlr.runs.prepare import check_trainable, frozen_head_note, local_training, reads_features, trained_roles
from fedlr.tasks.examples import Examples
from fedlr.tasks.task import Task
from fedlr.training.local import LocalTraining
from fedlr.training.moves import check_moves


@dataclass(frozen=True)
class Assembled:
    """A base model with its adapter, and the tables as it reads them; nothing has been trained or written."""

    task: Task
    base: BaseModel
    model: AdaptedModel
    method: Method  # for this model's layers
    training: LocalTraining
    start: ServerState
    origin: str | None  # a sentence, where the start was made from public examples
    earlier: Mapping[str, Any] | None  # of the run whose adapter is the start, if one is
    examples: tuple[Examples, ...]  # of each table
    reads_features: bool  # all that trains reads features that no round changes: they can be cached, one row an example
    notes: tuple[str, ...]  # what is to be said aloud before the run


def check_parts(experiment: Experiment) -> Method:
    """Build what needs neither rows nor a model, and check that runtime and method go together.

    Raises:
        InputError: for anything that could not run as configured.
    """
    method = build_method(experiment)
    check_runtime(experiment, method, local_training(provisional(experiment).trainer, method.client).rule)
    return method


def assemble(
    experiment: Experiment,
    tables: Sequence[Table],
    *,
    seed: int,
    mechanism: Mechanism | None,
    weights: tuple[float, ...],
    private_texts: Collection[str] = frozenset(),
) -> Assembled:
    """Load the model, attach the adapter, encode the tables and make the first adapter; no row passes the model.

    Args:
        experiment: with numbers for all that was auto.
        tables: of rows with the same classes.
        seed: of the public randomness.
        mechanism: clip and noise of a private run.
        weights: of each client in the aggregate.
        private_texts: those that a public table must not hold.

    Raises:
        InputError: for anything that could not run as configured.
    """
    e, max_length = experiment, experiment.data.max_length
    task = build_task(e, tables[0].label_names)
    base: BaseModel = build(e.model.section(), "model", label_names=task.output_names(tables[0]), seed=seed)
    with naming("data", "max_length"):
        task.check(base, tables[0], max_length=max_length)
    model = attach(base, e.adapter, seed=seed)
    method = build_method(e).bound(model)
    first = method.block_schedule(0, read_adapter(model))
    check_trainable(model, method.block_schedule.roles, e.trainer, e.adapter, first=first, task=task)
    with naming("data", "max_length"):
        examples = tuple(task.encode(base, table, max_length=max_length) for table in tables)
    begun = start_of(
        e.adapter,
        base,
        model,
        task=task,
        private=e.data.section(),
        max_length=max_length,
        seed=seed,
        private_texts=private_texts,
    )
    start = initial_state(begun.adapter, method)
    check_aggregate(start, method, e, weights=weights)
    first = request_of(start, method, train_head=e.adapter.train_head).block
    bound = None if mechanism is None else mechanism.max_grad_norm
    faint = check_moves(model, start.adapter, first, task=task, max_grad_norm=bound)
    roles = trained_roles(e, method)
    return Assembled(
        task=task,
        base=base,
        model=model,
        method=method,
        training=local_training(e.trainer, method.client, task, num_rounds=e.num_rounds),
        start=start,
        origin=begun.origin,
        earlier=begun.earlier,
        examples=examples,
        reads_features=reads_features(model, roles, start.adapter),
        notes=tuple(note for note in (faint, frozen_head_note(e, base, roles)) if note),
    )
