"""Which model of a run is released, and when a run stops, by scores on validation rows.

Both are functions of the run's lines alone, so a run that goes on after a kill decides as one that nobody killed. The
start is nobody's model, and never released. Of equal scores the lower loss is better, then the earlier round.

Privacy. The scores read released models and validation rows. Where no client trains on those rows, choosing a model is
post-processing: no epsilon. Stopping is more delicate: the epsilon of the rounds that were asked would be a number that
what they released has chosen, and no bound at its delta. What holds is the epsilon of all rounds that were announced,
so a run that stops charges those that it does not ask (`fedlr.simulations.choosing`): that spares time, not privacy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlr.config.schema import Experiment
from fedlr.runs.outcome import finite
from fedlr.tasks.evaluation import Evaluation, Metric

BEST, LAST, MEAN = "best", "last", "mean of last"
VALIDATION = "validation"  # in a line of metrics.jsonl


@dataclass(frozen=True)
class Selection:
    """How a run chooses among its models.

    Args:
        metric: by which.
        release: "last", or "best".
        patience: scored rounds without a better one, after which the run stops; None: it never does.
        average_last: models in a mean.
    """

    metric: Metric
    release: str = LAST
    patience: int | None = None
    average_last: int = 1

    @classmethod
    def of(cls, experiment: Experiment, metric: Metric) -> "Selection":
        """Return what an experiment asks for."""
        return cls(metric, experiment.release, experiment.patience, experiment.average_last)

    @property
    def is_active(self) -> bool:
        """Whether it reads validation rows at all."""
        return self.release == BEST or self.patience is not None

    def line(self, evaluation: Evaluation) -> dict[str, float | None]:
        """Return the score of a state on the validation rows, as a line of metrics.jsonl has it.

        >>> from fedlr.tasks.evaluation import ACCURACY
        >>> Selection(ACCURACY).line(Evaluation(0.5, 0.7))
        {'accuracy': 0.5, 'loss': 0.7}
        """
        return {self.metric.name: finite(evaluation.headline(self.metric)), "loss": finite(evaluation.loss)}

    def best(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Return the best of the lines so far; None before the first round that was scored."""
        scored = [row for row in rows if row["rounds_completed"] and row.get(VALIDATION)]
        return max(scored, key=self._rank, default=None)  # of several the first

    def is_over(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the run stops after these lines."""
        best = self.best(rows)
        if self.patience is None or best is None:
            return False
        since = [row for row in rows if row.get(VALIDATION) and row["rounds_completed"] > best["rounds_completed"]]
        return len(since) >= self.patience

    def released(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the line of the model that is released."""
        best = self.best(rows) if self.release == BEST else None
        return rows[-1] if best is None else best

    def record(
        self, rows: Sequence[Mapping[str, Any]], *, num_rounds: int, num_validation: int | None = None
    ) -> dict[str, Any]:
        """Return what summary.json says of it."""
        row = self.released(rows)
        mean = MEAN if self.average_last > 1 else LAST
        return {
            "model": BEST if self.release == BEST else mean,
            "rounds_completed": row["rounds_completed"],
            "num_averaged": min(self.average_last, max(1, row["rounds_completed"])),
            "num_rounds": rows[-1]["rounds_completed"],
            "stopped_early": rows[-1]["rounds_completed"] < num_rounds,
            "num_validation": num_validation if self.is_active else None,
            VALIDATION: row.get(VALIDATION),
        }

    def _rank(self, row: Mapping[str, Any]) -> tuple[float, float]:
        score, loss = row[VALIDATION][self.metric.name], row[VALIDATION]["loss"]
        sign = 1.0 if self.metric.higher_is_better else -1.0
        return -math.inf if score is None else sign * score, -math.inf if loss is None else -loss


def told(record: Mapping[str, Any]) -> str:
    """Say which model was released, as a sentence without its full stop.

    >>> told({"model": "best", "rounds_completed": 7, "num_averaged": 1, "num_rounds": 20, "num_validation": 300})
    'the model of round 7 of 20 is released, the best on 300 validation rows'
    """
    of = f"round {record['rounds_completed']} of {record['num_rounds']}"
    averaged = f", a mean of {record['num_averaged']} models," if record["num_averaged"] > 1 else ""
    if record["model"] == BEST:
        return f"the model of {of}{averaged} is released, the best on {record['num_validation']:,} validation rows"
    if record["model"] == MEAN:
        return f"the mean of the last {record['num_averaged']} models is released, up to {of}"
    return f"the model of {of} is released, the last"
