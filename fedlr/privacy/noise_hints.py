"""What a search for the noise of a budget found before on this machine, for the same question.

A hint, never an answer: that the noise lasts for the budget is computed anew by whoever asks. That less noise would not
do is believed of a file whose checksum is right: one that was forged can only add noise. Each question has a file of
its own, named by its hash, with one whole number and the checksum.
"""

import hashlib
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from fedlr.errors import InputError
from fedlr.files import cache_folder, write_whole

LARGEST = 10**9  # of a number that can be a hint


def hint_of(question: object) -> int | None:
    """Return the number that was kept for a question; None where there is none, or its file is damaged."""
    try:
        number = int(_path(question).read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    whole = 1 <= number <= LARGEST and _path(question).read_text(encoding="ascii") == _line(question, number)
    return number if whole else None


def keep_hint(question: object, number: int) -> None:
    """Keep a number for a question; where nothing can be written nothing is kept."""
    path = _path(question)
    with suppress(OSError, InputError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, _line(question, number))


def _line(question: object, number: int) -> str:
    return f"{number} {_digest((question, number))}\n"


def _path(question: object) -> Path:
    return cache_folder() / "noise" / _digest((question, version("dp-accounting")))


def _digest(told: object) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]
