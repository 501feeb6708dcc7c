"""From an experiment to the objects of a federation: everything that can fail does so here, before any work."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fedlr.adapters.client_ranks import num_rows_and_columns
from fedlr.adapters.state import num_values
from fedlr.config.auto_rates import arm, provisional, resolved_rates
from fedlr.config.build import build, build_method, naming
from fedlr.config.runtime_rules import check_aggregate, check_runtime
from fedlr.config.schema import Experiment
from fedlr.data.partition import Partition
from fedlr.data.placement import all_texts, num_shared_texts
from fedlr.data.table import LabelledText
from fedlr.methods.method import Method
from fedlr.models.base_delta import SideWeights
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import read_adapter
from fedlr.models.reading import check_reading, read_texts
from fedlr.models.starts.starts import start_of
from fedlr.models.tuners.attach import attach
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget, check_delta
from fedlr.rounds.round import RoundTask, ServerState, initial_state, task_of
from fedlr.runs.prepare import (
    check_trainable,
    frozen_head_note,
    load_examples,
    local_training,
    notes,
    num_rows_of,
    placement,
    private_mechanism,
    reads_features,
    trained_roles,
    with_clients_of,
    working_model,
)
from fedlr.streams import OsRandomness, Randomness, SeededRandomness
from fedlr.tasks.losses import training_loss
from fedlr.tasks.tokenise import Share, TokenisedText
from fedlr.training.local import LocalTraining
from fedlr.training.moves import check_moves
from simulations.client_accuracy import ClientTests, client_tests


@dataclass(frozen=True)
class Federation:
    """Everything a run needs, built and checked; nothing has been trained or written."""

    experiment: Experiment
    seed: int  # of the public randomness: partition, cohorts, starting weights
    base: BaseModel
    model: AdaptedModel  # the whole model: what is exported
    working: nn.Module  # what trains and is evaluated: the model, or the part above its cached prefix
    method: Method
    start: ServerState
    origin: str | None  # a sentence, where the start was made from public examples
    clients: tuple[Share, ...]
    test: TokenisedText
    client_tests: ClientTests | None  # which rows of the test are whose, where the adapter is scored for each client
    label_names: tuple[str, ...]
    has_pairs: bool  # rows are of two texts
    source: str  # what the examples are called, in the ledger and in messages
    data_sha256: str  # of all examples, the held-out ones too
    budget: PrivacyBudget | None
    mechanism: Mechanism | None
    training: LocalTraining
    randomness: Randomness
    weights: tuple[float, ...]  # of each client in the aggregate, before they are normalised
    ranks: tuple[int, ...] | None  # of each client; None: all have the adapter's
    side: SideWeights  # merges what the server folded away into the tensors that all copies of the model share
    taken_as_public: tuple[str, ...]  # what about the data the privacy statement takes for public
    placed_by: tuple[str, ...]  # what besides a row itself decides where it lies, one reason each
    notes: tuple[str, ...]  # what was dropped or cut, said aloud before the run

    @property
    def num_trained_values(self) -> int:
        """How many numbers a client trains in the first round."""
        return num_values(self.start.adapter.select(self.task().block).values())

    def task(self, round_index: int = 0) -> RoundTask:
        """Return what a round asks of clients that start from the first adapter."""
        state = replace(self.start, round_index=round_index)
        return task_of(state, self.method, train_head=self.experiment.adapter.train_head)

    @property
    def caches_features(self) -> bool:
        """Whether a cached text is one row of features: nothing below the head trains."""
        roles = trained_roles(self.experiment, self.method)
        return self.experiment.runtime.cache_prefix and reads_features(self.model, roles, self.start.adapter)

    def without_privacy(self) -> "Federation":
        """Return the same federation without clipping and noise, at a rate for that."""
        return replace(self.at_rate_of("no_privacy_lr"), budget=None, mechanism=None)

    def at_rate_of(self, key: str) -> "Federation":
        """Return the same federation at the rate of another arm, `tracking.no_privacy_lr` or `tracking.alone_lr`."""
        experiment = arm(self.experiment, key)
        if experiment is self.experiment:
            return self
        method = build_method(experiment).bound(self.model)
        return replace(
            self,
            experiment=experiment,
            method=method,
            training=replace(local_training(experiment.trainer, method.client), loss=self.training.loss),
        )


def assemble(experiment: Experiment, *, seed: int, say: Callable[[str], None] = lambda line: None) -> Federation:
    """Return a federation that is ready to train: `prepare`, then all texts pass the frozen layers if that is cached.

    Args:
        experiment: the checked configuration.
        seed: of the public randomness (the configuration's, or one drawn for this run).
        say: told what takes long, once nothing can be wrong any more.

    Raises:
        InputError: for anything that could not run as configured.
    """
    f = prepare(experiment, seed=seed)
    table = f.clients[0].table
    tables = [table, f.test]
    working, (table, test) = working_model(experiment.runtime, f.model, tables, features=f.caches_features, say=say)
    clients = tuple(Share(table, client.rows) for client in f.clients)
    return replace(f, working=working, clients=clients, test=test, side=SideWeights(working))


def prepare(experiment: Experiment, *, seed: int) -> Federation:
    """Load data and model, split, attach the adapter, calibrate the noise, tokenise; no example has passed the model.

    Raises:
        InputError: for anything that could not run as configured.
    """
    method = build_method(experiment)
    check_runtime(experiment, method, local_training(provisional(experiment).trainer, method.client).rule)
    data, held_out = load_examples(experiment, seed=seed)
    partition: Partition = build(
        experiment.partition.section(), "partition", data=data, num_clients=experiment.num_clients, seed=seed
    )
    experiment = with_clients_of(experiment, partition)
    num_shared = num_shared_texts(data, partition.indices)
    placed_by = placement(experiment, partition, num_shared=num_shared)
    num_rows = num_rows_of(experiment, data, held_out)
    experiment = resolved_rates(experiment, num_rows=num_rows, server_step=method.server_step)
    method = build_method(experiment)
    loss = training_loss(experiment.data.label_weights, data.label_names)
    training = replace(local_training(experiment.trainer, method.client), loss=loss)
    tests = client_tests(experiment, method, partition, held_out, seed=seed)
    budget, mechanism = private_mechanism(experiment)
    if budget is not None:
        check_delta(budget.delta, max(len(indices) for indices in partition.indices))

    base: BaseModel = build(experiment.model.section(), "model", label_names=data.label_names, seed=seed)
    with naming("data", "max_length"):
        check_reading(base, max_length=experiment.data.max_length, has_pairs=data.pairs is not None)
    model = attach(base, experiment.adapter, seed=seed)
    method = method.bound(model)
    first = method.block_schedule(0, read_adapter(model))
    check_trainable(model, method.block_schedule.roles, experiment.trainer, experiment.adapter, first=first)
    with naming("data", "max_length"):
        tokenised = read_texts(data, base, max_length=experiment.data.max_length)
        test = read_texts(held_out, base, max_length=experiment.data.max_length)
    begun = start_of(
        experiment.adapter,
        base,
        model,
        private=experiment.data.section(),
        max_length=experiment.data.max_length,
        seed=seed,
        private_texts=all_texts(data) | all_texts(held_out),
    )
    start = initial_state(begun.adapter, method)
    by_size = experiment.weighting == "examples"
    weights = tuple(float(len(indices)) if by_size else 1.0 for indices in partition.indices)
    check_aggregate(start, method, experiment, weights=weights)
    first = task_of(start, method, train_head=experiment.adapter.train_head).block
    faint = check_moves(model, start.adapter, first, max_grad_norm=mechanism.max_grad_norm if mechanism else None)
    return Federation(
        experiment=experiment,
        seed=seed,
        base=base,
        model=model,
        working=model,
        method=method,
        start=start,
        origin=begun.origin,
        clients=tuple(Share(tokenised, rows) for rows in partition.indices),
        test=test,
        client_tests=tests,
        label_names=data.label_names,
        has_pairs=data.pairs is not None,
        source=data.source,
        data_sha256=fingerprint(data, held_out),
        budget=budget,
        mechanism=mechanism,
        training=training,
        randomness=OsRandomness() if experiment.privacy.randomness == "os" else SeededRandomness(seed),
        weights=weights,
        ranks=experiment.adapter.ranks(experiment.num_clients, rows_and_columns=num_rows_and_columns(start.adapter)),
        side=SideWeights(model),
        taken_as_public=partition.taken_as_public,
        placed_by=placed_by,
        notes=(
            *notes(experiment, data, held_out, tokenised, test, placed_by=placed_by, num_shared=num_shared),
            *left_out_note(partition, data.source),
            *(note for note in (faint, frozen_head_note(experiment, base, trained_roles(experiment, method))) if note),
        ),
    )


def left_out_note(partition: Partition, source: str) -> list[str]:
    """Say how many clients were too small."""
    num = partition.num_left_out
    return [f"{num} clients of {source} have less than partition.min_rows rows and are left out"] if num else []


def fingerprint(*parts: LabelledText) -> str:
    """Return the SHA-256 of texts, labels and groups, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        pairs = () if part.pairs is None else (part.pairs,)
        for row in zip(part.texts, part.labels.tolist(), part.groups or (None,) * len(part), *pairs, strict=True):
            digest.update(repr(row).encode())
        digest.update(repr(part.label_names).encode())
    return digest.hexdigest()


def describe(federation: Federation) -> dict[str, Any]:
    """Return what partition.json says: sizes and label counts where the data are public, else that they are not."""
    if not federation.experiment.data.public:
        return {"public": False}
    num_labels = len(federation.label_names)
    clients = [
        {
            "client_id": client_id,
            "num_examples": len(client),
            "label_counts": np.bincount(client.labels, minlength=num_labels).tolist(),
        }
        for client_id, client in enumerate(federation.clients)
    ]
    return {"public": True, "labels": list(federation.label_names), "clients": clients}
