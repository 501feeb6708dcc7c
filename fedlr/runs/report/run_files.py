"""The files of a run directory as typed values: the only input of a report."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlr.errors import InputError
from fedlr.errors.messages import shown
from fedlr.privacy.units import CLIENT
from fedlr.runs.plain_yaml import plain_yaml
from fedlr.runs.report.audit_text import AuditResult, read_audit
from fedlr.runs.report.client_accuracy import OfClient, read_client_accuracy
from fedlr.runs.report.contact_sheet import SheetRow, read_contact_sheet
from fedlr.runs.report.evaluation_text import Evaluated, read_evaluations
from fedlr.runs.report.of_selection import released_of, validation_of
from fedlr.runs.report.records import (
    LARGEST,
    Record,
    as_record,
    optional_record,
    read_lines,
    read_plain_yaml,
    read_record,
    read_text,
)
from fedlr.runs.verdict import Verdict
from fedlr.tasks.class_scores import MOST_CLASSES
from fedlr.tasks.evaluation import ACCURACY, Metric

SCORES = ("balanced_accuracy", "macro_f1", "mcc", "auc", "ece")  # of a state, beside accuracy and loss


@dataclass(frozen=True)
class State:
    """One line of metrics.jsonl: the federation after `rounds_completed` rounds."""

    rounds_completed: int
    is_scored: bool  # else accuracy and score are not a number
    accuracy: float
    score: float  # the headline: accuracy, or what else `Summary.metric` names
    loss: float | None
    validation: Mapping[str, float | None]  # headline and loss on validation rows, where a model is chosen by them
    scores: Mapping[str, float]  # by name, of `SCORES`; those that the file has
    confusion: tuple[tuple[int, ...], ...] | None
    epsilon_max: float | None
    epsilon_median: float | None
    epsilon_min: float | None
    aggregation_error: float | None
    error_by_layer: Mapping[str, float]
    singular_values: Mapping[str, tuple[float, ...]]
    bytes_up: int
    bytes_down: int
    noise_to_signal: float | None
    codec_error: float | None  # None: no codec, or not known
    num_trained: int | None  # None: not stated
    reasons: Mapping[str, float]  # of the clients without a usable update, with their counts
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Asked:
    """One line of clients.jsonl: a client that was asked in a round, and what came of it."""

    round_index: int
    client_id: int
    status: str
    reason: str | None
    epsilon: float | None


@dataclass(frozen=True)
class Summary:
    """summary.json."""

    name: str
    method: str
    privacy: str
    seed: int | None  # None: randomness of the operating system
    num_rounds: int
    num_clients: int
    cohort_size: int
    start_accuracy: float
    final_accuracy: float
    metric: Metric  # whose values the scores are
    start_score: float
    final_score: float
    final_loss: float | None
    epsilon_max: float | None
    delta: float | None
    adapter_sha256: str
    num_trained_parameters: int
    bytes_up: int
    bytes_down: int
    seconds: float
    problem: str | None  # why the whole run was for nothing
    released: Mapping[str, object]  # which model it is (fedlr.runs.selection); empty: not stated, the last
    verdict: Verdict | None  # None: not stated
    label_names: tuple[str, ...]  # of the classes; empty: not stated

    @property
    def is_private(self) -> bool:
        """Whether the run asked for differential privacy."""
        return self.privacy != "none"


@dataclass(frozen=True)
class Partition:
    """partition.json of a run whose data are declared public: label counts by client id."""

    labels: tuple[str, ...]
    label_counts: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Alone:
    """One client of baselines/alone.json: what it reaches without the others."""

    client_id: int
    accuracy: float
    score: float
    epsilon: float | None
    own_accuracy: float | None  # on held-out rows of its own; None: not told
    num_updates: int | None  # that could be used; None: not stated


@dataclass(frozen=True)
class Run:
    """Everything that a report may show. None or empty: the file is absent (the partition: or withheld)."""

    summary: Summary
    states: Sequence[State]
    asked: Sequence[Asked]
    statement: Mapping[str, object]
    config: str
    versions: Mapping[str, object]
    budget_epsilon: float | None
    partition: Partition | None
    partition_withheld: bool
    no_privacy: Sequence[State]
    centralised: Sequence[State]
    alone: Sequence[Alone]
    alone_privacy: str | None
    adapter_config: Mapping[str, object]
    client_accuracy: Sequence[OfClient] = ()
    card: str = ""  # the model card beside the adapter
    asked_config: str = ""  # the configuration as it was asked for
    contact_sheet: Sequence[SheetRow] = ()
    audit: AuditResult | None = None  # of `fedlr audit RUN_DIR`

    @property
    def hides_clients(self) -> bool:
        """Whether nothing is told of single clients: the statement is of whole clients, or has them beside rows."""
        return self.statement.get("unit") == CLIENT.text or "client_unit" in self.statement

    evaluations: Sequence[Evaluated] = ()  # of `fedlr evaluate RUN_DIR`


def read_run(run_dir: Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: a required file is missing or broken; the message names it.
    """
    config = read_text(run_dir / "config.yaml")
    statement = read_record(run_dir / "privacy.json").values
    partition = optional_record(run_dir / "partition.json")
    alone = optional_record(run_dir / "baselines" / "alone.json")
    adapter = optional_record(run_dir / "adapter" / "adapter_config.json")
    own = optional_record(run_dir / "client_accuracy.json")
    more = ("contact_sheet.json", "audit.json", "evaluation.json")
    sheet, audit, evaluations = (optional_record(run_dir / name) for name in more)
    card, asked_config = run_dir / "adapter" / "README.md", run_dir / "asked.yaml"
    baseline, together = (run_dir / "baselines" / arm / "metrics.jsonl" for arm in ("no_privacy", "centralised"))
    summary = _summary(read_record(run_dir / "summary.json"))
    return Run(
        summary=summary,
        states=_states(run_dir / "metrics.jsonl", summary.metric),
        asked=[_asked(row) for row in read_lines(run_dir / "clients.jsonl")],
        statement=statement,
        config=config,
        versions=read_record(run_dir / "versions.json").values,
        budget_epsilon=_budget_epsilon(statement, config, str(run_dir / "config.yaml")),
        partition=_partition(partition) if partition else None,
        partition_withheld=partition is not None and partition.values.get("public") is not True,
        no_privacy=_states(baseline, summary.metric) if baseline.exists() else [],
        centralised=_states(together, summary.metric) if together.exists() else [],
        alone=sorted(map(_alone, alone.records("clients")), key=lambda one: one.client_id) if alone else [],
        alone_privacy=alone.text("privacy") if alone else None,
        adapter_config=adapter.values if adapter else {},
        client_accuracy=read_client_accuracy(own) if own else (),
        contact_sheet=read_contact_sheet(sheet, alone) if sheet else (),
        card=read_text(card) if card.exists() else "",
        asked_config=read_plain_yaml(asked_config) if asked_config.exists() else "",
        audit=read_audit(audit) if audit else None,
        evaluations=read_evaluations(evaluations) if evaluations else (),
    )


def check_rows(metrics: Sequence[Mapping[str, object]], clients: Sequence[Mapping[str, object]], *, where: str) -> None:
    """Refuse lines of metrics.jsonl and of clients.jsonl that a report could not read.

    Raises:
        InputError: which names the file, the line and the key.
    """
    for number, row in enumerate(metrics, start=1):
        record = Record(row, f"{where}/metrics.jsonl line {number}")
        _state(record)
        for key in ("bytes_up", "bytes_down", "num_trained"):  # which the summary adds up
            if key != "num_trained" or record.get(key) is not None:  # None: it is told to nobody
                record.count(key, most=int(LARGEST))
        record.optional_number("loss", may_diverge=True)
        for key in ("loss", "epsilon_max"):
            record.get(key)
    for number, row in enumerate(clients, start=1):
        _asked(Record(row, f"{where}/clients.jsonl line {number}"))


def spent_by_client(run: Run) -> dict[int, float]:
    """Return the largest epsilon that clients.jsonl states for each client, 0 if it was never asked."""
    spent = dict.fromkeys(range(run.summary.num_clients), 0.0)
    for row in run.asked:
        spent[row.client_id] = max(spent.get(row.client_id, 0.0), row.epsilon or 0.0)
    return dict(sorted(spent.items()))


def _states(path: Path, metric: Metric) -> list[State]:
    states = [_state(row, metric) for row in read_lines(path)]
    rounds = [state.rounds_completed for state in states]
    if rounds[:1] != [0] or rounds != sorted(set(rounds)):
        raise InputError(f"Expected rounds_completed to rise from 0 in {path}, got {rounds[:8]}")
    if not states[0].is_scored:
        raise InputError(f"Expected an accuracy in the first line of {path}, got null: a run scores its start")
    return states


def _state(row: Record, metric: Metric = ACCURACY) -> State:
    measures = row.nested("measures") if row.values.get("measures") else row
    told = measures if metric.name in measures.values else row
    score = told.optional_number(metric.name, may_diverge=True)
    accuracy = None if row.get("accuracy") is None else row.number("accuracy")
    return State(
        rounds_completed=row.count("rounds_completed"),
        is_scored=accuracy is not None,
        accuracy=math.nan if accuracy is None else accuracy,
        score=math.nan if score is None else score,
        loss=row.optional_number("loss", may_diverge=True),
        validation=validation_of(row, metric),
        scores={name: row.number(name) for name in SCORES if row.values.get(name) is not None},
        confusion=_confusion(row),
        epsilon_max=row.optional_number("epsilon_max", may_diverge=True),
        epsilon_median=row.optional_number("epsilon_median", may_diverge=True),
        epsilon_min=row.optional_number("epsilon_min", may_diverge=True),
        aggregation_error=_error(row),
        error_by_layer=row.numbers("aggregation_error_by_layer", may_diverge=True),
        singular_values=row.number_lists("singular_values"),
        bytes_up=int(row.optional_number("bytes_up") or 0),
        bytes_down=int(row.optional_number("bytes_down") or 0),
        noise_to_signal=row.optional_number("noise_to_signal", may_diverge=True),
        codec_error=row.optional_number("codec_error", may_diverge=True),
        num_trained=None if row.values.get("num_trained") is None else row.integer("num_trained"),
        reasons=row.numbers("reasons"),
        seconds=row.numbers("seconds"),
    )


def _confusion(row: Record) -> tuple[tuple[int, ...], ...] | None:
    if row.values.get("confusion") is None:
        return None
    lines = [as_record({"row": line}, f"{row.where}, confusion").integers("row") for line in row.items("confusion")]
    if not 1 <= len(lines) <= MOST_CLASSES or any(len(line) != len(lines) or min(line) < 0 for line in lines):
        raise InputError(f"Expected a square of counts for 'confusion' in {row.where}, got another form")
    return tuple(lines)


def _verdict(row: Record) -> Verdict | None:
    if row.values.get("verdict") is None:
        return None
    told = row.nested("verdict")
    low, high = _two(told, "interval")
    return Verdict(
        word=told.text("word"),
        why=told.text("why"),
        seen=told.text("seen"),
        advice=tuple(str(text) for text in told.items("advice")),
        interval=(low, high),
        num_rows=told.count("num_rows"),
        majority_label=told.text("majority_label"),
        majority_share=told.number("majority_share"),
        chance=told.number("chance"),
        start_loss=told.optional_number("start_loss"),
        final_loss=told.optional_number("final_loss"),
        noise_to_signal=told.optional_number("noise_to_signal"),
    )


def _two(row: Record, key: str) -> tuple[float, float]:
    found = [as_record({key: item}, row.where).number(key) for item in row.items(key)]
    if len(found) != 2:
        raise InputError(f"Expected two numbers for {key!r} in {row.where}, got {len(found)}")
    return found[0], found[1]


def _error(row: Record) -> float | None:
    """Return the aggregation error; the first line has made no aggregation yet ({} or 0)."""
    return (
        None
        if row.values.get("aggregation_error") == {}
        else row.optional_number("aggregation_error", may_diverge=True)
    )


def _asked(row: Record) -> Asked:
    reason = row.values.get("reason")
    return Asked(
        round_index=row.count("round_index"),
        client_id=row.count("client_id"),
        status=row.text("status"),
        reason=None if reason is None else str(reason),
        epsilon=row.optional_number("epsilon", may_diverge=True),
    )


def _metric(row: Record) -> Metric:
    """Return what the scores are of; runs of before there was a choice have accuracies."""
    if row.values.get("metric") is None:
        return ACCURACY
    told = row.nested("metric")
    if not re.fullmatch(r"[a-z0-9_]{1,40}", told.text("name")):
        raise InputError(f"Expected the name of a score for 'metric' in {row.where}, got {shown(told.text('name'))}")
    return Metric(told.text("name"), told.get("higher_is_better") is True, told.get("is_share") is True)


def _summary(row: Record) -> Summary:
    metric = _metric(row)
    return Summary(
        name=row.text("name"),
        method=row.text("method"),
        privacy=row.text("privacy"),
        seed=None if row.get("seed") is None else row.integer("seed"),
        num_rounds=row.count("num_rounds"),
        num_clients=row.count("num_clients"),
        cohort_size=row.count("cohort_size"),
        start_accuracy=row.number("start_accuracy"),
        final_accuracy=row.number("final_accuracy"),
        metric=metric,
        start_score=row.number("start_score" if "start_score" in row.values else "start_accuracy"),
        final_score=row.number("final_score" if "final_score" in row.values else "final_accuracy", may_diverge=True),
        final_loss=row.optional_number("final_loss", may_diverge=True),
        epsilon_max=row.optional_number("epsilon_max", may_diverge=True),
        delta=row.optional_number("delta"),
        adapter_sha256=row.text("adapter_sha256"),
        num_trained_parameters=row.integer("num_trained_parameters"),
        bytes_up=row.integer("bytes_up"),
        bytes_down=row.integer("bytes_down"),
        seconds=row.number("seconds"),
        problem=None if row.values.get("problem") is None else row.text("problem"),
        released=released_of(row),
        verdict=_verdict(row),
        label_names=tuple(map(str, row.items("label_names"))) if row.values.get("label_names") is not None else (),
    )


def _partition(row: Record) -> Partition | None:
    if row.values.get("public") is not True:
        return None
    labels = tuple(str(label) for label in row.items("labels"))
    counts = row.label_counts()
    for client_id, label_counts in counts.items():
        if len(label_counts) != len(labels):
            raise InputError(
                f"Expected {len(labels)} counts of client {client_id} in {row.where}, got {len(label_counts)}"
            )
    return Partition(labels, dict(sorted(counts.items())))


def _alone(row: Record) -> Alone:
    num_updates = None if row.values.get("num_updates") is None else row.count("num_updates")
    return Alone(
        row.count("client_id"),
        row.number("accuracy"),
        row.number("score" if "score" in row.values else "accuracy", may_diverge=True),
        row.optional_number("epsilon", may_diverge=True),
        row.optional_number("own_accuracy"),
        num_updates,
    )


def _budget_epsilon(statement: Mapping[str, object], config: str, where: str) -> float | None:
    """Return the epsilon that each client allows: `budget` of privacy.json, else `privacy` of config.yaml."""
    try:
        parsed = plain_yaml(config)
    except ValueError as error:
        raise InputError(f"{where} is not valid YAML: {error}") from error
    for section in (statement.get("budget"), parsed.get("privacy") if isinstance(parsed, dict) else None):
        epsilon = section.get("epsilon") if isinstance(section, dict) else None
        if isinstance(epsilon, int | float):
            return Record({"epsilon": epsilon}, where).number("epsilon")
    return None
