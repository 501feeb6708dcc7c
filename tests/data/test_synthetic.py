"""The made-up sentences are reproducible, balanced, known to their vocabulary and learnable."""

import numpy as np
import pytest

from fedlr.errors import InputError
from fedlr.tasks.synthetic import MAX_LABELS, VOCABULARY, synthetic_text


def test_the_same_seed_gives_the_same_sentences() -> None:
    first, again, other = synthetic_text(50, 1), synthetic_text(50, 1), synthetic_text(50, 2)
    assert first.texts == again.texts != other.texts
    assert first.labels.tolist() == again.labels.tolist()


@pytest.mark.parametrize("num_labels", [2, 3, MAX_LABELS])
def test_labels_are_balanced_and_every_word_is_in_the_vocabulary(num_labels: int) -> None:
    data = synthetic_text(401, 0, num_labels=num_labels, num_clauses=3)
    counts = np.bincount(data.labels)
    assert len(counts) == len(data.label_names) == num_labels and counts.max() - counts.min() <= 1
    assert {word for text in data.texts for word in text.split()} <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def naive_bayes_accuracy(train, test) -> float:  # type: ignore[no-untyped-def]
    place = {word: i for i, word in enumerate(VOCABULARY)}
    counts = np.ones((len(train.label_names), len(VOCABULARY)))
    for text, label in zip(train.texts, train.labels, strict=True):
        np.add.at(counts[label], [place[w] for w in text.split()], 1)
    scores = np.log(counts / counts.sum(axis=1, keepdims=True))
    guesses = [scores[:, [place[w] for w in text.split()]].sum(axis=1).argmax() for text in test.texts]
    return float((np.array(guesses) == test.labels).mean())


def test_words_tell_the_label_up_to_its_noise() -> None:
    clean, noisy = synthetic_text(800, 3), synthetic_text(800, 3, label_noise=0.2)
    half = np.arange(400)
    assert naive_bayes_accuracy(clean.subset(half), clean.subset(half + 400)) > 0.98
    assert 0.74 < naive_bayes_accuracy(noisy.subset(half), noisy.subset(half + 400)) < 0.86
    assert clean.texts == noisy.texts


def test_the_domain_does_not_tell_the_label() -> None:
    data = synthetic_text(2000, 4)
    assert data.groups is not None and len(set(data.groups)) == 4
    for domain in set(data.groups):
        positive = data.labels[np.array(data.groups) == domain].mean()
        assert abs(positive - 0.5) < 0.1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_examples": 1}, "num_examples"),
        ({"num_labels": 1}, "num_labels"),
        ({"num_labels": MAX_LABELS + 1}, "num_labels"),
        ({"label_noise": 1.0}, "label_noise"),
        ({"label_noise": -0.1}, "label_noise"),
        ({"num_clauses": 0}, "num_clauses"),
        ({"num_clauses": 10**30}, "num_clauses"),
        ({"num_examples": 100_000_000_000}, r"num_examples in \[1, 200,000\]"),
    ],
)
def test_a_number_out_of_range_is_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(InputError, match=named):
        synthetic_text(**{"num_examples": 10, "seed": 0, **options})  # type: ignore[arg-type]
