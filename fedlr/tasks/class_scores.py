"""How good a classifier's answers are, in the numbers that a referee asks for beside accuracy and loss.

They agree with scikit-learn's where it defines them (`tests/test_scores.py`), which is no dependency for five formulas.

Legend: N examples, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15  # of the calibration error, of equal width
MOST_CLASSES = 100  # beyond which neither a confusion matrix nor an area under curves is worth its size

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What answers are worth; None where a number is not defined, or not computed.

    Args:
        balanced_accuracy: mean over the classes that occur of the share of their examples that is found (recall).
        macro_f1: mean of F1 over the classes that occur or are answered.
        mcc: Matthews' correlation in [-1, 1], of several classes by Gorodkin (2004); 0 for one constant answer.
        auc: area under the ROC curve, the chance that an example of a class is ranked above one of no such class; of
            more than two classes the mean of one against the rest, over the classes that occur. None of one class,
            of more than 100, and where an output is not finite.
        ece: expected calibration error (Guo et al. 2017), 15 bins of equal width: how far the model's own confidence
            is from its accuracy. None where an output is not finite.
        confusion: examples by true class (rows) and answer (columns); None beyond 100 classes.
    """

    balanced_accuracy: float
    macro_f1: float
    mcc: float
    auc: float | None
    ece: float | None
    confusion: tuple[tuple[int, ...], ...] | None


def scores(labels: Labels, answers: Labels, confidences: Floats, shares: Floats | None, *, num_classes: int) -> Scores:
    """Score answers.

    Args:
        labels: (N,) true classes, N at least 1.
        answers: (N,) the classes that the model names.
        confidences: (N,) the probability that it gives its answer.
        shares: (N, K) the probability of every class; None: the area under curves is not computed.
        num_classes: K.
    """
    true = np.bincount(labels, minlength=num_classes).astype(float)
    named = np.bincount(answers, minlength=num_classes).astype(float)
    found = np.bincount(labels[labels == answers], minlength=num_classes).astype(float)
    return Scores(
        balanced_accuracy=float((found[true > 0] / true[true > 0]).mean()),
        macro_f1=float((2 * found[true + named > 0] / (true + named)[true + named > 0]).mean()),
        mcc=_matthews(true, named, float(found.sum())),
        auc=None if shares is None else area_under_curves(labels, shares),
        ece=calibration_error(labels == answers, confidences),
        confusion=_confusion(labels, answers, num_classes) if num_classes <= MOST_CLASSES else None,
    )


def area_under_curves(labels: Labels, shares: Floats) -> float | None:
    """Return the area under the ROC curve by ranks, ties counted half; see `Scores.auc`.

    >>> area_under_curves(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]]))
    0.75
    """
    if not np.isfinite(shares).all():
        return None
    classes = [1] if shares.shape[1] == 2 else range(shares.shape[1])
    areas = [_area(labels == k, shares[:, k]) for k in classes]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None


def calibration_error(is_right: NDArray[np.bool_], confidences: Floats) -> float | None:
    """Return the mean distance of accuracy from confidence over bins, weighted by their examples; see `Scores.ece`.

    >>> round(calibration_error(np.array([True, False]), np.array([0.9, 0.9])), 3)
    0.4
    """
    if not np.isfinite(confidences).all():
        return None
    bins = np.clip(np.ceil(confidences * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gaps = np.bincount(bins, weights=is_right - confidences, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def mean_scores(found: Sequence[Scores]) -> Scores:
    """Return the mean over several models of one task; their confusion matrices are added up."""
    matrices = [one.confusion for one in found if one.confusion is not None]
    added = np.sum(matrices, axis=0).tolist() if len(matrices) == len(found) else None
    return Scores(
        balanced_accuracy=math.fsum(one.balanced_accuracy for one in found) / len(found),
        macro_f1=math.fsum(one.macro_f1 for one in found) / len(found),
        mcc=math.fsum(one.mcc for one in found) / len(found),
        auc=_mean_of_all([one.auc for one in found]),
        ece=_mean_of_all([one.ece for one in found]),
        confusion=None if added is None else tuple(map(tuple, added)),
    )


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _matthews(true: Floats, named: Floats, hits: float) -> float:
    total = float(true.sum())
    spread = (total**2 - float(true @ true)) * (total**2 - float(named @ named))
    return (hits * total - float(true @ named)) / math.sqrt(spread) if spread > 0 else 0.0


def _confusion(labels: Labels, answers: Labels, num_classes: int) -> tuple[tuple[int, ...], ...]:
    counts = np.bincount(labels * num_classes + answers, minlength=num_classes**2)
    return tuple(map(tuple, counts.reshape(num_classes, num_classes).tolist()))


def _area(is_of_class: NDArray[np.bool_], shares: Floats) -> float | None:
    """Return the chance that an example of the class has the larger share: the rank sum of Mann and Whitney (1947)."""
    num_of_class = int(is_of_class.sum())
    num_others = len(is_of_class) - num_of_class
    if not num_of_class or not num_others:
        return None
    _, places, counts = np.unique(shares, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # of ties the mean, from 1
    above = float(ranks[is_of_class].sum()) - num_of_class * (num_of_class + 1) / 2
    return above / (num_of_class * num_others)
