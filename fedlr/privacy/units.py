"""What an epsilon is about: one example, one person or one client, and which data are called neighbours.

Three units, three numbers. One cannot be computed from another, and two of one run are never added up: each says what
its own neighbours change.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlr.errors import InputError
from fedlr.errors.ranges import UnitName


@dataclass(frozen=True)
class Unit:
    """A unit of privacy, as ledgers and statements write it."""

    name: UnitName
    text: str  # what may be there or not
    relation: str  # how two neighbouring data sets differ


EXAMPLE = Unit("example", "one training example of one client", "add or remove one example")
PERSON = Unit(
    "person",
    "one person, with all training examples of theirs at one client",
    "add or remove one person, whose examples are at most the cap",
)
CLIENT = Unit(
    "client",
    "one client, with all of its training examples",
    "add or remove one client: its updates count, or count as zero; how many clients are enrolled is public",
)
UNITS: Mapping[UnitName, Unit] = {unit.name: unit for unit in (EXAMPLE, PERSON, CLIENT)}


def unit_of_text(text: str) -> Unit:
    """Return the unit that a ledger's header or a statement names.

    Raises:
        InputError: for other words.

    >>> unit_of_text("one training example of one client").name
    'example'
    """
    for unit in UNITS.values():
        if unit.text == text:
            return unit
    raise InputError(f"Expected the unit of a ledger, such as {EXAMPLE.text!r}, got {text!r:.100}")


def rounded_up(epsilon: float) -> float:
    """Return an epsilon as a sentence says it: never smaller, to thousandths.

    >>> rounded_up(5.2561)
    5.257
    """
    return math.ceil(epsilon * 1000) / 1000
