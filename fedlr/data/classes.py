"""Whether the labels that were found in a column are classes: enough of them, not too many, each spelled in one way."""

from collections.abc import Sequence
from decimal import Decimal

from fedlr.data.values import as_number
from fedlr.errors import InputError

MANY = 20


def check_classes(where: str, names: Sequence[str]) -> None:
    """Refuse a column of labels that are no classes.

    Args:
        where: the file and the column, for the message, which holds no label.
        names: the label of each row.

    Raises:
        InputError: which says what the column holds instead, and what to set.
    """
    found = set(names)
    if len(found) == 1:
        raise InputError(
            f"{where} has only one label: expected two or more; if it is one client's share, name all labels with "
            "data.labels=[...]"
        )
    numbers = {name: number for name in found if (number := as_number(name)) is not None}
    by_number: dict[Decimal, list[str]] = {}
    for name, number in numbers.items():
        by_number.setdefault(number, []).append(name)
    for spellings in by_number.values():
        if len(spellings) > 1:
            raise InputError(
                f"{where} spells the number of one label in {len(spellings)} ways (such as 1, 1.0 and 01), which would "
                "be as many classes: write it in one way, or name the labels with data.labels=[...]"
            )
    are_scores = len(numbers) == len(found) and any(number % 1 for number in numbers.values() if abs(number) < 10**20)
    if are_scores and len(found) > MANY:
        raise InputError(
            f"{where} has {len(found)} different numbers with decimals: they are scores, whose task is regression, and "
            "only classes can be trained here; set data.label_column, or turn the scores into a few classes"
        )
    if len(found) > max(MANY, len(names) // 2):
        raise InputError(
            f"{where} has {len(found)} different labels in {len(names)} rows: the column looks like a text or a score; "
            "set data.label_column"
        )
