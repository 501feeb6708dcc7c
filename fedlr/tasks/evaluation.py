"""How good a model is on held-out rows, whatever the task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fedlr.tasks.class_scores import Scores, mean_scores


@dataclass(frozen=True)
class Metric:
    """The number of a task that stands first in every table.

    Args:
        name: of a field of `Evaluation`, or of one of its measures.
        higher_is_better: which way is better.
        is_share: whether it lies in [0, 1] and is written in percent.
    """

    name: str
    higher_is_better: bool
    is_share: bool

    @property
    def heading(self) -> str:
        """Return how it is called at the head of a column or a picture.

        >>> MICRO_F1.heading, ACCURACY.heading
        ('Micro-F1', 'Accuracy')
        """
        name = {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "auc": "ROC area"}.get(self.name, self.name)
        return name[:1].upper() + name[1:].replace("_", " ")

    def text(self, value: float) -> str:
        """Write a value for a terminal.

        >>> ACCURACY.text(0.8125), Metric("perplexity", higher_is_better=False, is_share=False).text(62.41)
        ('0.812', '62.4')
        """
        size = 0.0 if self.is_share else abs(value)
        decimals = next((number for number, below in ((3, 1.0), (2, 10.0), (1, 100.0)) if size < below), 0)
        return f"{value:,.{decimals}f}"


MICRO_F1 = Metric("micro_f1", higher_is_better=True, is_share=True)
ACCURACY = Metric("accuracy", higher_is_better=True, is_share=True)


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out examples.

    Args:
        accuracy: in [0, 1], of classes the share that is named right, of texts the share of next tokens.
        loss: in nats, the mean over examples.
        scores: of classes, what else is told of the answers.
        measures: further numbers of a task, by name.
    """

    accuracy: float
    loss: float
    scores: Scores | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    def headline(self, metric: Metric) -> float:
        """Return the number that a task names first.

        >>> Evaluation(0.5, 0.7).headline(ACCURACY)
        0.5
        """
        return self.measures[metric.name] if metric.name in self.measures else float(getattr(self, metric.name))


def entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy of a yes or no of each probability, in nats: the least mean loss of one answer for all rows.

    >>> [round(float(x), 4) for x in entropy(np.array([0.0, 0.5, 1.0]))]
    [0.0, 0.6931, 0.0]
    """
    inside = np.clip(shares, 1e-300, 1.0)
    outside = np.clip(1.0 - np.asarray(shares), 1e-300, 1.0)
    found: NDArray[np.float64] = -(shares * np.log(inside) + (1.0 - shares) * np.log(outside)) + 0.0
    return found


def mean_evaluation(found: Sequence[Evaluation]) -> Evaluation:
    """Return the mean over several models.

    >>> mean_evaluation([Evaluation(0.5, 1.0), Evaluation(1.0, 0.0)])
    Evaluation(accuracy=0.75, loss=0.5, scores=None, measures={})
    """
    told = [one.scores for one in found if one.scores is not None]
    return Evaluation(
        fmean(one.accuracy for one in found),
        fmean(one.loss for one in found),
        mean_scores(told) if len(told) == len(found) else None,
        {name: fmean(one.measures[name] for one in found) for name in found[0].measures},
    )
