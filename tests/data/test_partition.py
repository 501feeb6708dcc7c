"""Partitions are disjoint, complete where they say so, and skewed as their papers say."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlr.data.partition import Partition, by_group, dirichlet, dirichlet_by_label, iid
from fedlr.data.table import LabelledText
from fedlr.errors import InputError

PARTITIONERS = {
    "iid": iid,
    "dirichlet": partial(dirichlet, alpha=0.3),
    "dirichlet_by_label": partial(dirichlet_by_label, alpha=0.3, min_examples=0),
}


def labelled(labels: list[int] | np.ndarray, groups: tuple[str, ...] | None = None) -> LabelledText:
    labels = np.asarray(labels, dtype=np.int64)
    names = tuple("abcdefghij"[: labels.max() + 1])
    return LabelledText(tuple(f"text {i}" for i in range(len(labels))), labels, names, groups, "here")


@pytest.mark.parametrize("name", PARTITIONERS)
@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=8, max_size=60),
    num_clients=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_no_example_belongs_to_two_clients(name: str, labels: list[int], num_clients: int, seed: int) -> None:
    data = labelled(labels)
    partition = PARTITIONERS[name](data, num_clients=num_clients, seed=seed)
    joined = np.concatenate(partition.indices)
    assert partition.num_clients == len(partition.indices) == num_clients
    assert len(set(joined.tolist())) == len(joined)
    assert joined.min() >= 0 and joined.max() < len(labels)
    assert all((np.diff(indices) > 0).all() for indices in partition.indices)
    assert len(joined) == len(labels)
    assert partition.label_counts(data).sum() == len(joined)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_a_partition_is_a_function_of_the_seed(name: str) -> None:
    data = labelled(np.arange(300) % 3)

    def lists(seed: int) -> list[list[int]]:
        return [i.tolist() for i in PARTITIONERS[name](data, num_clients=5, seed=seed).indices]

    assert lists(1) == lists(1) != lists(2)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_more_clients_than_examples_is_refused_with_both_numbers(name: str) -> None:
    with pytest.raises(InputError, match="11 clients.*10 examples"):
        PARTITIONERS[name](labelled([0, 1] * 5), num_clients=11, seed=0)
    with pytest.raises(InputError, match="num_clients >= 1"):
        PARTITIONERS[name](labelled([0, 1] * 5), num_clients=0, seed=0)


def mean_skew(partition: Partition, data: LabelledText) -> float:
    """Mean total variation distance between a client's label proportions and those of all examples."""
    counts = partition.label_counts(data)
    prior = np.bincount(data.labels) / len(data)
    return float(np.abs(counts / counts.sum(axis=1, keepdims=True) - prior).sum(axis=1).mean() / 2)


@pytest.mark.parametrize("function", [dirichlet, partial(dirichlet_by_label, min_examples=1)])
def test_a_small_alpha_skews_and_a_large_one_does_not(function) -> None:  # type: ignore[no-untyped-def]
    data = labelled(np.arange(3000) % 3)
    skews = [mean_skew(function(data, num_clients=10, seed=0, alpha=a), data) for a in (0.05, 1.0, 1e4)]
    assert skews[0] > 0.4 > skews[1] > skews[2]
    assert skews[2] < 0.06


def test_proportions_of_hsu_are_drawn_from_a_dirichlet_and_sizes_are_about_equal() -> None:
    """With equally frequent labels a client expects N / C rows; one client of many has Beta proportions."""
    data = labelled(np.arange(4000) % 2)
    alpha, num_clients = 2.0, 50
    counts = dirichlet(data, num_clients=num_clients, seed=3, alpha=alpha).label_counts(data)
    shares = counts[:, 0] / counts.sum(axis=1)
    variance = 0.25 / (alpha + 1) * (1 + alpha / 80)
    assert 0.5 < shares.var() / variance < 1.6  # chi-square of 49 degrees: far outside at this seed it is not
    assert abs(counts.sum(axis=1) - 80).max() < 45


def test_a_label_that_no_client_wants_goes_to_all() -> None:
    data = labelled([0] * 600 + [1] * 600)
    counts = dirichlet(data, num_clients=3, seed=1, alpha=1e-6).label_counts(data)
    assert counts.sum(axis=0).tolist() == [600, 600]


def test_alpha_has_a_meaning_or_is_refused() -> None:
    data = labelled([0, 1, 2] * 40)
    for function in (dirichlet, dirichlet_by_label):
        for alpha in (0.0, -1.0, float("nan"), float("inf"), 1e-300):
            with pytest.raises(InputError, match="alpha"):
                function(data, num_clients=3, seed=0, alpha=alpha)
    for alpha in (1e-6, 1e6):
        assert len(np.concatenate(dirichlet(data, num_clients=3, seed=0, alpha=alpha).indices)) == 120


def test_every_client_has_the_minimum_or_the_draw_is_given_up() -> None:
    data = labelled(np.arange(200) % 2)
    partition = dirichlet_by_label(data, num_clients=8, seed=0, alpha=0.5, min_examples=8)
    assert min(map(len, partition.indices)) >= 8
    with pytest.raises(InputError, match="alpha=0.01 .* 8 clients .*25 of the 200"):
        dirichlet_by_label(data, num_clients=8, seed=0, alpha=0.01, min_examples=25)
    with pytest.raises(InputError, match=r"min_examples in \[0, 25\].*got 26"):
        dirichlet_by_label(data, num_clients=8, seed=0, alpha=0.5, min_examples=26)


def test_groups_become_clients_in_the_order_of_their_names() -> None:
    data = labelled([0, 1, 0, 1], groups=("nyt", "amazon", "nyt", "movie"))
    assert [i.tolist() for i in by_group(data, num_clients=3, seed=0).indices] == [[1], [3], [0, 2]]
    assert by_group(data, num_clients=3, seed=0).depends_on
    named = by_group(data, num_clients=3, seed=0, groups=["nyt", "movie", "amazon"])
    assert [i.tolist() for i in named.indices] == [[0, 2], [3], [1]] and not named.depends_on
    with pytest.raises(InputError, match="got 1 rows of here with another"):
        by_group(data, num_clients=2, seed=0, groups=["nyt", "movie"])
    with pytest.raises(InputError, match="3 groups.*num_clients=4.*set num_clients=3"):
        by_group(data, num_clients=4, seed=0)
    with pytest.raises(InputError, match="data.group_column"):
        by_group(labelled([0, 1]), num_clients=2, seed=0)


def test_a_partition_that_shares_an_example_cannot_be_made() -> None:
    with pytest.raises(InputError, match="two clients"):
        Partition((np.array([0, 1]), np.array([1, 2])))
