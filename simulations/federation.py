"""From an experiment to the objects of a federation: everything that can fail does so here, before any work."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from fedlr.adapters.client_ranks import num_rows_and_columns
from fedlr.adapters.state import num_values
from fedlr.config.auto_rates import arm, resolved_rates
from fedlr.config.build import build, build_method
from fedlr.config.schema import Experiment, Target
from fedlr.data.partition import Partition
from fedlr.data.persons import capped
from fedlr.data.placement import all_texts, num_shared_texts
from fedlr.data.table import Table
from fedlr.methods.codecs.codec import NONE
from fedlr.methods.method import Method
from fedlr.models.base_delta import SideWeights
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget, check_delta
from fedlr.rounds.round import RoundRequest, ServerState, request_of
from fedlr.runs.assemble import assemble as assemble_parts
from fedlr.runs.assemble import check_parts
from fedlr.runs.prepare import (
    local_training,
    notes,
    placement,
    private_mechanism,
    with_clients_of,
    with_library,
    with_whole_path,
    working_model,
)
from fedlr.runs.tables import load_tables, num_rows_of
from fedlr.runs.units import client_mechanism, loud_count_notes, unit_notes
from fedlr.simulations.client_accuracy import ClientTests, client_tests
from fedlr.streams import OsRandomness, Randomness, SeededRandomness
from fedlr.tasks.examples import Examples, Share
from fedlr.tasks.task import Task
from fedlr.training.local import LocalTraining

MOST_DESCRIBED = 1_000  # clients with a line of their own in partition.json


@dataclass(frozen=True)
class Federation:
    """Everything a run needs, built and checked; nothing has been trained or written."""

    experiment: Experiment
    seed: int  # of the public randomness: partition, cohorts, starting weights
    task: Task
    base: BaseModel
    model: AdaptedModel  # the whole model: what is exported
    working: nn.Module  # what trains and is evaluated: the model, or the part above its cached prefix
    method: Method
    start: ServerState
    origin: str | None  # a sentence, where the start was made from public examples
    earlier: Mapping[str, Any] | None  # of the run whose adapter is the start, if one is
    clients: tuple[Share, ...]
    test: Examples
    validation: Examples | None  # by which a model is chosen; None: none is
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
    reads_features: bool  # all that trains reads features that no round changes
    taken_as_public: tuple[str, ...]  # what about the data the privacy statement takes for public
    placed_by: tuple[str, ...]  # what besides a row itself decides where it lies, one reason each
    notes: tuple[str, ...]  # what was dropped or cut, said aloud before the run
    client_budget: PrivacyBudget | None = None  # of the client unit; None: whole clients are not hidden
    client_mechanism: Mechanism | None = None

    @property
    def num_trained_values(self) -> int:
        """How many numbers a client trains in the first round."""
        return num_values(self.start.adapter.select(self.request().block).values())

    def request(self, round_index: int = 0) -> RoundRequest:
        """Return what a round asks of clients that start from the first adapter."""
        state = replace(self.start, round_index=round_index)
        return request_of(state, self.method, train_head=self.experiment.adapter.train_head)

    @property
    def caches_features(self) -> bool:
        """Whether a cached text is one row of features: nothing below the head trains."""
        return self.experiment.runtime.cache_prefix and self.reads_features

    def without_privacy(self) -> "Federation":
        """Return the same federation without clipping and noise, at a rate for that."""
        none: dict[str, Any] = {"budget": None, "mechanism": None, "client_budget": None, "client_mechanism": None}
        return replace(self.at_rate_of("no_privacy_lr"), **none)

    def centralised(self) -> "Federation":
        """Return one client with the rows of all, without privacy: what could be learned if nothing were apart."""
        f = self.without_privacy()
        e = f.experiment
        divisor = f.training.divisor * e.num_clients
        one = {"num_clients": 1, "cohort_size": 1}
        trainer = e.trainer.model_copy(update={"divisor": divisor})
        privacy = e.privacy.model_copy(update={"max_participations": None})
        if privacy.unit == "client":  # of which one alone cannot hide
            none = {"client_epsilon": None, "client_delta": None, "client_noise_multiplier": None}
            privacy = privacy.model_copy(update={"unit": "example", **none})
        rows = np.sort(np.concatenate([client.rows for client in f.clients]))
        return replace(
            f,
            experiment=e.model_copy(
                update={**one, "trainer": trainer, "privacy": privacy, "codec": Target(_target_=NONE)}
            ),
            method=f.method.of_one_client(),
            clients=(Share(f.clients[0].table, rows),),
            client_tests=None,
            training=replace(f.training, divisor=divisor),
            weights=(1.0,),
            ranks=None,
        )

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
            training=local_training(experiment.trainer, method.client, self.task, num_rounds=experiment.num_rounds),
        )

    def over(self, num_rounds: int) -> "Federation":
        """Return the same federation with learning rates that run their course over another number of rounds."""
        if (rates := self.training.rates).is_constant and self.method.server_rates.is_constant:
            return self
        method = replace(self.method, server_rates=self.method.server_rates.over(num_rounds))
        return replace(self, method=method, training=replace(self.training, rates=rates.over(num_rounds)))


def assemble(
    experiment: Experiment,
    *,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    calibrated: Mechanism | None = None,
) -> Federation:
    """Return a federation that is ready to train: `prepare`, then all texts pass the frozen layers if that is cached.

    Args:
        experiment: the checked configuration.
        seed: of the public randomness (the configuration's, or one drawn for this run).
        say: told what takes long, once nothing can be wrong any more.
        calibrated: the mechanism that this experiment has where a process of the run found it; None: it is found here.

    Raises:
        InputError: for anything that could not run as configured.
    """
    return past_frozen_layers(prepare(experiment, seed=seed, calibrated=calibrated), say=say)


def past_frozen_layers(f: Federation, *, say: Callable[[str], None]) -> Federation:
    """Return a prepared federation whose texts have passed the frozen layers, where those are cached."""
    table = f.clients[0].table
    tables = [table, f.test, *filter(None, [f.validation])]
    working, passed = working_model(f.experiment.runtime, f.model, tables, features=f.caches_features, say=say)
    table, test, *validation = passed
    clients = tuple(Share(table, client.rows) for client in f.clients)
    return replace(
        f,
        working=working,
        clients=clients,
        test=test,
        validation=validation[0] if validation else None,
        side=SideWeights(working),
    )


def prepare(experiment: Experiment, *, seed: int, calibrated: Mechanism | None = None) -> Federation:
    """Load data and model, split, attach the adapter, calibrate the noise, encode; no example has passed the model.

    Raises:
        InputError: for anything that could not run as configured.
    """
    method = check_parts(experiment)
    experiment = with_whole_path(with_library(experiment))
    data, held_out, validation = load_tables(experiment, seed=seed)
    tables = (data, held_out) if validation is None else (data, held_out, validation)
    experiment, partition, num_shared = dealt(experiment, data, seed=seed)
    placed_by = placement(experiment, partition, num_shared=num_shared)
    num_rows = num_rows_of(experiment, data, held_out)
    experiment = resolved_rates(experiment, num_rows=num_rows, server_step=method.server_step)
    tests = client_tests(experiment, method, partition, held_out, seed=seed)
    budget, mechanism = private_mechanism(experiment, calibrated)
    client_budget, of_clients = client_mechanism(experiment)
    if budget is not None:
        check_delta(budget.delta, max(len(indices) for indices in partition.indices))
    weights = weights_of(experiment, partition)
    parts = assemble_parts(
        experiment,
        tables,
        seed=seed,
        mechanism=mechanism,
        weights=weights,
        private_texts=frozenset().union(*map(all_texts, tables)),
    )
    encoded, test, *rest = parts.examples
    sizes = num_rows_and_columns(parts.start.adapter)
    return Federation(
        experiment=experiment,
        seed=seed,
        task=parts.task,
        base=parts.base,
        model=parts.model,
        working=parts.model,
        method=parts.method,
        start=parts.start,
        origin=parts.origin,
        earlier=parts.earlier,
        clients=tuple(Share(encoded, rows) for rows in partition.indices),
        test=test,
        validation=rest[0] if rest else None,
        client_tests=tests,
        label_names=data.label_names,
        has_pairs=getattr(data, "pairs", None) is not None,
        source=data.source,
        data_sha256=fingerprint(*tables),
        budget=budget,
        mechanism=mechanism,
        training=parts.training,
        randomness=randomness_of(experiment, parts.earlier, seed=seed),
        weights=weights,
        ranks=experiment.adapter.ranks(experiment.num_clients, rows_and_columns=sizes),
        side=SideWeights(parts.model),
        reads_features=parts.reads_features,
        taken_as_public=partition.taken_as_public,
        placed_by=placed_by,
        notes=(
            *notes(experiment, data, held_out, encoded, test, placed_by=placed_by, num_shared=num_shared),
            *left_out_note(partition, data.source),
            *parts.notes,
            *unit_notes(experiment),
            *loud_count_notes(of_clients),
        ),
        client_budget=client_budget,
        client_mechanism=of_clients,
    )


def dealt(experiment: Experiment, data: Table, *, seed: int) -> tuple[Experiment, Partition, int]:
    """Deal the training rows out to clients.

    Returns:
        The experiment with as many clients as there are, who holds which rows, and how many texts lie at several.
    """
    partition: Partition = build(
        experiment.partition.section(), "partition", data=data, num_clients=experiment.num_clients, seed=seed
    )
    experiment = with_clients_of(experiment, partition)
    if experiment.privacy.unit != "person":
        return experiment, partition, num_shared_texts(data, partition.indices)
    assert (most := experiment.privacy.rows_per_person) is not None
    capped_rows = capped(data, partition.indices, most=most, seed=seed)
    return experiment, replace(partition, indices=capped_rows), 0  # equal texts of two persons may lie apart


def weights_of(experiment: Experiment, partition: Partition) -> tuple[float, ...]:
    """Return the weight of each client in the aggregate: its number of rows, or one."""
    by_size = experiment.weighting == "examples"
    return tuple(float(len(rows)) if by_size else 1.0 for rows in partition.indices)


def randomness_of(experiment: Experiment, earlier: Mapping[str, Any] | None, *, seed: int) -> Randomness:
    """Return where batches and noise are drawn from.

    A seeded run that begins with the adapter of an earlier one has streams of its own: with those of the same seed both
    would add the same noise, and their releases would not compose as the statement says.
    """
    if experiment.privacy.randomness == "os":
        return OsRandomness()
    if earlier is None:
        return SeededRandomness(seed)
    digest = hashlib.sha256(f"{seed} {earlier['adapter_sha256']}".encode()).digest()
    return SeededRandomness(int.from_bytes(digest[:4]))


def left_out_note(partition: Partition, source: str) -> list[str]:
    """Say how many clients were too small."""
    num = partition.num_left_out
    return [f"{num} clients of {source} have less than partition.min_rows rows and are left out"] if num else []


def fingerprint(*parts: Table) -> str:
    """Return the SHA-256 of rows, labels, groups and persons, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        for row, label, group in zip(part.row_texts(), part.targets(), part.groups or (None,) * len(part), strict=True):
            digest.update(repr((row[0], label, group, *row[1:])).encode())
        digest.update(repr(part.label_names).encode())
        if (persons := getattr(part, "persons", None)) is not None:
            digest.update(repr(persons).encode())
    return digest.hexdigest()


def describe(federation: Federation) -> dict[str, Any]:
    """Return what partition.json says: sizes and label counts where the data are public, else that they are not.

    Of many clients the counts alone, in client order: a tenth of the bytes.
    """
    if not federation.experiment.data.public:
        return {"public": False}
    labels = list(federation.label_names) or ["rows"]  # of a task without classes: how many there are
    counts = [np.bincount(client.labels, minlength=len(labels)).tolist() for client in federation.clients]
    if len(counts) > MOST_DESCRIBED:
        return {"public": True, "labels": labels, "label_counts": counts}
    clients = [
        {
            "client_id": client_id,
            "num_examples": sum(label_counts),
            "label_counts": label_counts,
        }
        for client_id, label_counts in enumerate(counts)
    ]
    return {"public": True, "labels": labels, "clients": clients}
