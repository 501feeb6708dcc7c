"""Scores are those of their definitions: by hand, over all pairs, and beside scikit-learn where there is one.

Mutants this file kills: recalls weighted by class size; F1 over all classes, those that never occur too; ties that
count as wins; a class that does not occur and spoils the mean; bins that lose a confidence of 1.
"""

import itertools
import math
import warnings

import numpy as np
import pytest

from fedlr.tasks.class_scores import Scores, area_under_curves, calibration_error, mean_scores, scores


def scores_of(labels: list[int], shares: np.ndarray) -> Scores:
    answers = shares.argmax(axis=1)
    return scores(np.array(labels), answers, shares.max(axis=1), shares, num_classes=shares.shape[1])


# Six examples: 4 of class 0, of which 3 are found, and 2 of class 1, of which 1 is.
BY_HAND = scores_of([0, 0, 0, 0, 1, 1], np.array([[0.9, 0.1]] * 3 + [[0.4, 0.6]] * 2 + [[0.8, 0.2]]))


def test_two_classes_by_hand() -> None:
    assert BY_HAND.confusion == ((3, 1), (1, 1))
    assert BY_HAND.balanced_accuracy == (3 / 4 + 1 / 2) / 2
    assert BY_HAND.macro_f1 == (2 * 3 / 8 + 2 * 1 / 4) / 2
    assert BY_HAND.mcc == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    # Pairs of one of class 1 (shares .6, .2) and one of class 0 (.1, .1, .1, .6): .6 wins 3 and ties 1, .2 wins 3.
    assert BY_HAND.auc == (3 + 0.5 + 3) / 8
    # Bins of 1/15: .9 (three right of three), .6 (one right of two), .8 (wrong).
    assert BY_HAND.ece == pytest.approx((3 * 0.1 + 2 * 0.1 + 0.8) / 6)


def test_of_three_classes_one_that_never_occurs_spoils_no_mean() -> None:
    shares = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
    found = scores_of([0, 1, 1, 1], shares)
    assert found.confusion == ((1, 0, 0), (1, 2, 0), (0, 0, 0))
    assert found.balanced_accuracy == pytest.approx((1 + 2 / 3) / 2)
    assert found.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 2)  # class 2 is neither true nor named
    assert found.auc == pytest.approx((3 / 3 + 3 / 3 - 1 / 3 + 1 / 3) / 2)


def test_one_constant_answer_is_worth_nothing() -> None:
    found = scores_of([0, 1, 1, 1], np.array([[0.1, 0.9]] * 4))
    assert (found.balanced_accuracy, found.mcc, found.auc) == (0.5, 0.0, 0.5)
    assert found.macro_f1 == pytest.approx(2 * 3 / 7 / 2)


def test_what_is_not_defined_is_none() -> None:
    assert area_under_curves(np.array([1, 1]), np.array([[0.1, 0.9], [0.2, 0.8]])) is None
    assert area_under_curves(np.array([0, 1]), np.array([[math.nan] * 2, [0.2, 0.8]])) is None
    assert calibration_error(np.array([True]), np.array([math.nan])) is None
    many = scores(np.array([0, 150]), np.array([0, 3]), np.array([0.5, 0.5]), None, num_classes=200)
    assert (many.confusion, many.auc, many.balanced_accuracy) == (None, None, 0.5)


def test_confidence_of_one_and_of_the_edges_is_in_a_bin() -> None:
    right = np.array([True, False, True])
    assert calibration_error(right, np.array([1.0, 1.0, 1.0])) == pytest.approx(1 / 3)
    assert calibration_error(right, np.array([1 / 15, 2 / 15, 0.0])) == pytest.approx((14 / 15 + 2 / 15 + 1.0) / 3)


def test_area_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 40)
    shares = generator.integers(0, 8, 40) / 8  # many ties
    pairs = itertools.product(shares[labels == 1], shares[labels == 0])
    expected = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert area_under_curves(labels, np.stack([1 - shares, shares], axis=1)) == pytest.approx(expected)


def test_mean_over_models_adds_their_confusion_matrices() -> None:
    other = Scores(0.5, 0.5, 0.0, None, 0.2, ((1, 1), (1, 1)))
    found = mean_scores([BY_HAND, other])
    assert found.confusion == ((4, 2), (2, 2))
    assert found.balanced_accuracy == pytest.approx((BY_HAND.balanced_accuracy + 0.5) / 2)
    assert found.auc is None  # of one of them it is not known


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(num_classes: int, seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), generator.integers(0, num_classes, 60)])
    shares = generator.dirichlet(np.full(num_classes, 0.6), len(labels)).round(2) + 1e-3
    shares /= shares.sum(axis=1, keepdims=True)
    answers, found = shares.argmax(axis=1), scores_of(labels.tolist(), shares)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(labels, answers))
        assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, answers, average="macro"))
    assert found.mcc == pytest.approx(metrics.matthews_corrcoef(labels, answers))
    given = shares[:, 1] if num_classes == 2 else shares
    assert found.auc == pytest.approx(metrics.roc_auc_score(labels, given, multi_class="ovr"))
    assert found.confusion == tuple(map(tuple, metrics.confusion_matrix(labels, answers).tolist()))
