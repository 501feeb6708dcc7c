"""The rows of a person lie together, at most so many are trained on, and no other person has a say in which.

Mutants killed: a cap that counts rows of others, one row too many, no cap, the place by text.
"""

from types import ModuleType

import numpy as np
import pytest

import fedlr.data.persons
from fedlr.data.partition import by_group, dirichlet, iid
from fedlr.data.placement import split_train_test
from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from tests.training.small_models import mutant


def table(num_persons: int = 30, *, without: int | None = None, groups: bool = False) -> LabelledText:
    """Person k has k % 7 + 1 rows; person 3 also has a row twice."""
    rows = [
        (f"text {person} {number % 5 if person == 3 else number}", person)
        for number in range(7)
        for person in range(num_persons)
        if number <= person % 7 and person != without
    ]
    return LabelledText(
        texts=tuple(text for text, _ in rows),
        labels=np.array([number % 2 for number in range(len(rows))]),
        label_names=("no", "yes"),
        groups=tuple(f"site {number % 2}" for number in range(len(rows))) if groups else None,
        source="made up",
        persons=tuple(f"person {person}" for _, person in rows),
    )


def kept(module: ModuleType, data: LabelledText, *, most: int = 3) -> list[list[tuple[str, str]]]:
    indices = module.capped(data, iid(data, num_clients=4, seed=1).indices, most=most, seed=1)
    assert data.persons is not None
    return [sorted((data.persons[row], data.texts[row]) for row in rows.tolist()) for rows in indices]


def check_cap(module: ModuleType) -> None:
    whole = kept(module, table())
    counts: dict[str, int] = {}
    for client in whole:
        for person, _ in client:
            counts[person] = counts.get(person, 0) + 1
    assert counts == {f"person {k}": min(3, k % 7 + 1) for k in range(30)}
    assert sum(len({person for person, _ in client}) for client in whole) == 30  # nobody at two clients
    for gone in range(30):
        others = [[row for row in client if row[0] != f"person {gone}"] for client in whole]
        assert kept(module, table(without=gone)) == others, "another person's rows moved"


def test_at_most_so_many_rows_of_a_person_and_no_other_person_has_a_say() -> None:
    check_cap(fedlr.data.persons)


MUTANTS = {
    "one too many": ("if len(mine) < most:", "if len(mine) <= most:"),
    "no cap": ("if len(mine) < most:", "if True:"),
    "of all rows": ("if len(mine) < most:", "if len(mine) < most and sum(map(len, of_person.values())) % 11 != 10:"),
    "of each client": ("mine = of_person[persons[row]]", "mine = of_person['']"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=MUTANTS)
def test_caps_that_count_otherwise_are_found(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_cap(mutant(fedlr.data.persons, change))


def test_a_person_is_held_out_whole() -> None:
    train, test = split_train_test(table(), num_test=0.3, seed=0)
    assert train.persons and test.persons and not set(train.persons) & set(test.persons)


def test_a_person_at_two_clients_is_refused() -> None:
    data = table(groups=True)
    indices = by_group(data, num_clients=2, seed=0, groups=["site 0", "site 1"]).indices
    with pytest.raises(InputError, match="every person of made up at one client"):
        fedlr.data.persons.capped(data, indices, most=2, seed=0)
    with pytest.raises(InputError, match="partition=iid"):
        dirichlet(data, num_clients=2, seed=0, alpha=0.5)


def test_rows_without_persons_are_refused() -> None:
    data = table()
    nobody = LabelledText(data.texts, data.labels, data.label_names, None, "made up")
    with pytest.raises(InputError, match="data.person_column"):
        fedlr.data.persons.capped(nobody, [np.arange(3)], most=2, seed=0)
