"""A few held-out pictures of each client, and what the shared adapter takes them for: contact_sheet.json.

They are shown in the clear, so only where the data are declared public and clients are scored one by one
(`tracking.client_accuracy`). Which pictures are shown depends on their places alone: evenly spread over each client's
held-out rows.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedlr.rounds.evaluate import Evaluator
from fedlr.rounds.round import ServerState
from fedlr.simulations.choosing import evaluator_of
from fedlr.simulations.federation import Federation
from fedlr.tasks.pictures import EncodedImages

MOST_CLIENTS = 24
MOST_PICTURES = 10  # of a client


def shown_rows(federation: Federation) -> list[NDArray[np.int64]]:
    """Return which held-out rows are shown of each client, by client id; no list where none are."""
    tests = federation.client_tests
    if tests is None or not isinstance(federation.test, EncodedImages):
        return []
    return [_spread(rows) for rows in tests.rows[:MOST_CLIENTS]]


def named(evaluator: Evaluator, state: ServerState, rows: NDArray[np.int64]) -> list[int]:
    """Return the class that a state's adapter names for each of these held-out rows."""
    return [int(label) for label in evaluator.answers(state, rows).named] if len(rows) else []


def contact_sheet(federation: Federation, state: ServerState) -> dict[str, Any] | None:
    """Return contact_sheet.json; None where nothing is shown."""
    test, tests, rows = federation.test, federation.client_tests, shown_rows(federation)
    if tests is None or not rows or not isinstance(test, EncodedImages):
        return None
    evaluator = evaluator_of(federation)
    clients: list[dict[str, Any]] = []
    for client_id, mine in enumerate(rows):
        told = named(evaluator, state, mine)
        pictures = [
            {"label": int(test.labels[row]), "named": label, "png": _png(test.pixels[test.rows[row]])}
            for row, label in zip(mine, told, strict=True)
        ]
        name = {} if tests.names is None else {"name": tests.names[client_id]}
        clients.append({"client_id": client_id, **name, "pictures": pictures})
    return {"label_names": list(federation.label_names), "clients": clients}


def _spread(rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most MOST_PICTURES of the rows, evenly spread.

    >>> _spread(np.arange(100))[:3].tolist()
    [5, 15, 25]
    """
    found = np.asarray(rows, dtype=np.int64)
    number = min(MOST_PICTURES, len(found))
    return found[(np.arange(number) * 2 + 1) * len(found) // (2 * number)] if number else found


def _png(pixels: NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode("ascii")
