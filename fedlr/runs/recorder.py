"""What a run writes about itself: one line a state, one line a client asked, and a summary.

Formats are in docs/files.md. Times stand apart under `seconds`: all other values repeat with the seed.
"""

import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fedlr.config.auto_rates import schedule_of
from fedlr.config.schema import Experiment
from fedlr.methods.method import Method
from fedlr.methods.rate_schedule import CONSTANT
from fedlr.rounds.round import RoundDiagnostics, ServerState
from fedlr.runs.loss_verdict import judge_loss
from fedlr.runs.outcome import finite, problem_of
from fedlr.runs.selection import Selection
from fedlr.runs.verdict import HeldOut, Recipe, Result, Verdict, gathered_noise, judge, noise_of_rounds
from fedlr.tasks.evaluation import ACCURACY, Evaluation, Metric

NEVER_ASKED = ("offline", "not_sent")
# By the unit, and by whether clients have a budget of their own: runs of different ones are not compared.
_OF_UNIT = {
    ("example", True): "dp",
    ("person", True): "dp of persons",
    ("client", False): "dp of clients",
    ("client", True): "dp of rows and of clients",
}


def is_scored(round_index: int, *, every: int, num_rounds: int) -> bool:
    """Return whether the state after so many rounds is scored: the start, every few rounds, and the last.

    >>> [n for n in range(6) if is_scored(n, every=2, num_rounds=5)]
    [0, 2, 4, 5]
    """
    return round_index % every == 0 or round_index == num_rounds


def metrics_row(
    state: ServerState,
    evaluation: Evaluation | None,
    *,
    spent: Collection[float],
    spent_on_clients: float | None = None,
    diagnostics: RoundDiagnostics | None = None,
    evaluate_s: float,
    noise_sd: float | None = None,
    is_last: bool = False,
    validation: Mapping[str, float | None] | None = None,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the line of metrics.jsonl for a state, and for the round that led to it.

    `evaluation` is None of a state that is not scored (`is_scored`): accuracy and loss are null, others absent.
    `rates` are the factors of the round's learning rates (`fedlr.config.schedules.rates_after`), where they change.
    `validation` is its score on validation rows, where a model is chosen by them (`fedlr.runs.selection`).
    `spent` is the epsilon of every enrolled client, empty without a budget of its own; `spent_on_clients` that of the
    client unit, which is the headline where there is no other; `noise_sd` the standard deviation of the noise in one
    number of a client's update, where it is known (`fedlr.training.noise`). A state that may be the released one has a
    confusion matrix: `is_last`. Of a secret round nothing tells who took part.
    """
    d = diagnostics
    of_clients = {} if spent_on_clients is None else {"epsilon_client": spent_on_clients}
    spent = spent or of_clients.values()
    is_secret = d is not None and d.is_secret
    errors = d.aggregation_error if d else {}
    # Of other systems than LoRA perhaps not: None, and no exact 0.0.
    is_measured = not is_secret and bool(errors or state.adapter.factors())
    statuses = [dropout.status for dropout in d.dropouts] if d else []
    noise_now = noise_sd if of_clients else _at(noise_sd, rates)  # the server's is the same at any rate of clients
    train_s, aggregate_s = (d.train_s, d.aggregate_s) if d else (0.0, 0.0)
    return {
        "rounds_completed": state.round_index,
        **scores_of(evaluation, is_last=is_last),
        **({} if validation is None else {"validation": dict(validation)}),
        "epsilon_max": max(spent) if spent else None,
        "epsilon_median": statistics.median(spent) if spent else None,
        "epsilon_min": min(spent) if spent else None,
        **of_clients,
        "num_trained": None if is_secret else len(d.trained) if d else 0,
        "num_refused": None if is_secret else statuses.count("refused"),
        "num_rejected": None if is_secret else statuses.count("rejected"),
        "reasons": dict(sorted(Counter(dropout.reason for dropout in d.dropouts).items())) if d else {},
        "aggregation_error": (statistics.fmean(errors.values()) if errors else 0.0) if is_measured else None,
        "aggregation_error_sd": (max(d.aggregation_error_sd.values(), default=0.0) if d else 0.0)
        if is_measured
        else None,
        "aggregation_error_by_layer": dict(errors),
        "singular_values": dict(d.singular_values) if d else {},
        **({} if rates is None else {"rates": dict(rates)}),
        "noise_to_signal": d.change.noise_to_signal(noise_now) if d and d.change else None,
        "bytes_up": d.bytes_up if d else 0,
        "bytes_down": d.bytes_down if d else 0,
        **codec_columns(d),
        "seconds": {
            "train": train_s,
            "aggregate": aggregate_s,
            "evaluate": evaluate_s,
            "round": train_s + aggregate_s + evaluate_s,
        },
    }


def codec_columns(diagnostics: RoundDiagnostics | None) -> dict[str, Any]:
    """Return what a codec added to the updates of a round; nothing where there was none, or where it is not known."""
    error = diagnostics.codec_error if diagnostics else None
    return (
        {}
        if error is None
        else {
            "codec_error": finite(error.update),
            "codec_error_of_mean": None if error.mean is None else finite(error.mean),
        }
    )


def _at(noise_sd: float | None, rates: Mapping[str, float] | None) -> float | None:
    """Return the noise of an update at the clients' rate of its round: SGD is linear in it."""
    return noise_sd if noise_sd is None or rates is None else noise_sd * rates["clients"]


def scores_of(evaluation: Evaluation | None, *, is_last: bool) -> dict[str, Any]:
    """Return how good a state is, as a line of metrics.jsonl has it; one that was not scored has null."""
    if evaluation is None:
        return {"accuracy": None, "loss": None}
    found: dict[str, Any] = {"accuracy": evaluation.accuracy, "loss": finite(evaluation.loss)}
    if evaluation.scores is not None:
        told = asdict(evaluation.scores)
        found |= {**told, "confusion": told["confusion"] if is_last else None}
    if evaluation.measures:
        found["measures"] = {name: finite(value) for name, value in evaluation.measures.items()}
    return found


def score_of(row: Mapping[str, Any], metric: Metric) -> float | None:
    """Return the headline of a line of metrics.jsonl; None where it is not finite."""
    found: float | None = row.get("measures", row).get(metric.name, row.get(metric.name))
    return found


def score_text(row: Mapping[str, Any], metric: Metric) -> str:
    """Write the headline of a line of metrics.jsonl, with its name; one that is not finite has no number.

    >>> score_text({"accuracy": 0.8125}, ACCURACY)
    'accuracy 0.812'
    """
    value = score_of(row, metric)
    return f"{metric.name} {'not finite' if value is None else metric.text(value)}"


def held_out_labels(labels: np.ndarray, label_names: Sequence[str]) -> HeldOut:
    """Return how often each label occurs in the rows that the server evaluates on, or how many rows there are."""
    if not label_names:
        return HeldOut({}, num_unlabelled=len(labels))
    counts = np.bincount(labels, minlength=len(label_names)).tolist()
    return HeldOut(dict(zip(label_names, counts, strict=True)))


def recipe_of(experiment: Experiment, *, head_is_drawn: bool, noise_sd: float | None = None) -> Recipe:
    """Return what of a configuration decides whether it can learn.

    `head_is_drawn` says that the base model brings no classification head of its own; `noise_sd` as in `metrics_row`.
    """
    e, model = experiment, experiment.model.section()
    if e.privacy.client_epsilon is not None:  # the server adds the noise, whatever the clients' rates are
        e = e.model_copy(update={"trainer": e.trainer.model_copy(update={"lr_schedule": CONSTANT, "warmup_rounds": 0})})
    pooling, lr = model.get("pooling", "mean"), e.trainer.optimizer.section().get("lr")
    is_mean = isinstance(pooling, str) and (pooling == "auto" or "mean" in pooling)
    return Recipe(
        has_random_head=head_is_drawn and not e.adapter.train_head,
        pooling=None if is_mean else f"the first token (model.pooling={'null' if pooling is None else pooling})",
        num_rounds=e.num_rounds,
        lr=lr if isinstance(lr, float | int) else None,
        gathered_noise=gathered_noise(
            noise_sd, rounds=schedule_of(e, (0.0, 1.0)).accumulated_rounds(), cohort_size=e.cohort_size
        ),
        has_label_weights=bool(e.data.label_weights),
        of_clients=e.privacy.client_epsilon is not None and e.privacy.epsilon is None,
    )


def client_rows(
    diagnostics: RoundDiagnostics,
    *,
    spent: Mapping[int, float],
    round_index: int,
    num_steps: int,
    participations: Mapping[int, int],
    seconds: Mapping[int, float] | None,
) -> Iterator[dict[str, Any]]:
    """Yield the lines of clients.jsonl for a round, in client order.

    `spent` is epsilon by client, empty without privacy; `seconds` None where a client's time, which depends on its
    data, is not to be told.
    """
    trained = frozenset(diagnostics.trained)
    dropouts = {dropout.client_id: dropout for dropout in diagnostics.dropouts}
    for client_id in diagnostics.cohort:
        # A second update of a client that was used is an event of the round, and no fate of the client.
        dropout = None if client_id in trained else dropouts[client_id]
        refused = dropout is not None and dropout.status == "refused"
        yield {
            "round_index": round_index,
            "client_id": client_id,
            "status": dropout.status if dropout else "trained",
            "reason": dropout.reason if dropout else None,
            "num_steps": 0 if refused or (dropout and dropout.reason in NEVER_ASKED) else num_steps,
            "participations": participations[client_id],
            "rank": diagnostics.ranks.get(client_id),
            "epsilon": spent.get(client_id),
            "seconds": None if seconds is None else 0.0 if refused else seconds[client_id],
        }


def summarise(
    experiment: Experiment,
    start: ServerState,
    state: ServerState,
    rows: Sequence[Mapping[str, Any]],
    *,
    method: Method,
    seed: int,
    num_trained_values: int,
    seconds: float,
    held_out: HeldOut,
    head_is_drawn: bool = True,
    noise_sd: float | None = None,
    client_delta: float | None = None,
    metric: Metric = ACCURACY,
    num_validation: int | None = None,
) -> dict[str, Any]:
    """Return summary.json from the metrics of all rounds: what came of them, whether the model learned, and why not.

    `state` is the released one, and the scores are those of its line.
    """
    e, first, selection = experiment, rows[0], Selection.of(experiment, metric)
    last = selection.released(rows)
    is_private, is_of_rows = e.privacy.is_private, e.privacy.epsilon is not None
    of_clients = (
        {} if client_delta is None else {"epsilon_client": rows[-1]["epsilon_client"], "delta_client": client_delta}
    )
    problem = problem_of(start.adapter, state.adapter, rows, keeps=bool(method.personal), released=last)
    recipe = recipe_of(e, head_is_drawn=head_is_drawn, noise_sd=noise_sd)
    verdict = verdict_of(rows, last, recipe, held_out=held_out, metric=metric, problem=problem)
    return {
        "name": e.name,
        "method": method.name,
        "privacy": _OF_UNIT[e.privacy.unit, is_of_rows] if is_private else "none",
        "seed": seed,
        "num_rounds": e.num_rounds,
        "num_clients": e.num_clients,
        "cohort_size": e.cohort_size,
        "start_accuracy": first["accuracy"],
        "final_accuracy": last["accuracy"],
        "final_loss": last["loss"],
        "metric": asdict(metric),
        "start_score": score_of(first, metric),
        "final_score": score_of(last, metric),
        "measures": last.get("measures", {}),
        "released": selection.record(rows, num_rounds=e.num_rounds, num_validation=num_validation),
        "epsilon_max": rows[-1]["epsilon_max"],
        "delta": e.privacy.delta if is_of_rows else client_delta,
        **({"unit": e.privacy.unit} if e.privacy.unit != "example" else {}),
        **of_clients,
        "adapter_sha256": state.adapter.fingerprint(),
        "num_trained_parameters": num_trained_values,
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "problem": problem,
        "verdict": verdict.record(),
        "label_names": list(held_out.label_counts),
        "seconds": seconds,
    }


def verdict_of(
    rows: Sequence[Mapping[str, Any]],
    last: Mapping[str, Any],
    recipe: Recipe,
    *,
    held_out: HeldOut,
    metric: Metric,
    problem: str | None,
) -> Verdict:
    """Return whether the model learned: by its accuracy where rows have labels, else by its loss.

    `rows` are the lines of metrics.jsonl, `last` the one of the state that is released.
    """
    first = rows[0]
    outcome = Result(
        start_accuracy=first["accuracy"],
        final_accuracy=last["accuracy"],
        start_loss=first["loss"],
        final_loss=last["loss"],
        noise_to_signal=noise_of_rounds(rows),
        confusion=last.get("confusion"),
        problem=problem,
    )
    if held_out.label_counts:
        return judge(held_out, outcome, recipe)
    measures, before = last.get("measures", {}), first.get("measures", {})
    return judge_loss(held_out, outcome, recipe, metric=metric, first=before, last=measures)
