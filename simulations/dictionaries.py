"""Seven reference works of Debian's dict packages as prompts and responses: `Define: WORD (WORK)` and its entry.

A word is in one of three classes by its hash, over all works at once: entries are copied between works (FOLDOC holds
much of the Jargon File), so a word that is held out of one work only would be read in another. `tuning` words are for
choosing rates, `test` words for the figures; neither is ever trained on.

Twelve clients hold the works: the three large ones are three clients each. The smallest, `elements`, is nobody's: its
words are an unseen work.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import NamedTuple

from fedlr.simulations.archives import gunzipped

NAMES = {
    "wn": "WordNet",
    "gcide": "GCIDE",
    "foldoc": "FOLDOC",
    "vera": "VERA",
    "jargon": "Jargon File",
    "devil": "Devil's Dictionary",
    "elements": "Elements",
}
CLIENTS = {"wn": 3, "gcide": 3, "foldoc": 3, "vera": 1, "jargon": 1, "devil": 1}
ROWS_PER_CLIENT, HELD_OUT_PER_WORK = 640, 60
LEAST_CHARACTERS, MOST_WORD_CHARACTERS = 12, 40  # of an entry, of a word

_DIGITS = {
    letter: value for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


class Entry(NamedTuple):
    """What a work says of a word."""

    work: str  # a key of NAMES
    word: str
    definition: str


def dictionary_tables(read: Callable[[str], bytes]) -> dict[str, bytes]:
    """Return the .jsonl files: all entries, the clients' (train), and held-out ones (test, tuning, and unseen: the test
    words of the work that is nobody's).

    Args:
        read: gives a file of the packages' folder `usr/share/dictd`, such as `wn.index`.
    """
    every, clients = [], []
    held_out: dict[str, list[str]] = {"test": [], "tuning": [], "unseen": []}
    for work in NAMES:
        entries = list(_cleaned(work, _articles(read(f"{work}.index"), gunzipped(read(f"{work}.dict.dz")))))
        every += [_line(entry) for entry in entries]
        drawn = sorted(entries, key=_draw)
        for words in ("test", "tuning"):
            chosen = [entry for entry in drawn if words_of(entry.word) == words][:HELD_OUT_PER_WORK]
            if work in CLIENTS:
                held_out[words] += [_line(entry, client=work) for entry in chosen]
            elif words == "test":
                held_out["unseen"] += [_line(entry, client=work) for entry in chosen]
        train = [entry for entry in drawn if words_of(entry.word) == "train"]
        for number in range(CLIENTS.get(work, 0)):
            name = work if CLIENTS[work] == 1 else f"{work}-{number + 1}"
            mine = train[number * ROWS_PER_CLIENT : (number + 1) * ROWS_PER_CLIENT]
            clients += [_line(entry, client=name) for entry in mine]
    tables = {"all": every, "train": clients, **held_out}
    return {name: "".join(lines).encode() for name, lines in tables.items()}


def words_of(word: str) -> str:
    """Return the class of a word: a tenth each are for `test` and `tuning`, the rest for `train`.

    >>> [words_of(word) for word in ("penult", "troll", "apple")]
    ['test', 'test', 'train']
    """
    return {0: "test", 1: "tuning"}.get(zlib.crc32(word.lower().encode()) % 10, "train")


def _line(entry: Entry, **more: str) -> str:
    row = {
        "word": entry.word,
        "work": entry.work,
        "words": words_of(entry.word),
        "prompt": f"Define: {entry.word} ({NAMES[entry.work]})",
        "response": entry.definition,
        **more,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _draw(entry: Entry) -> bytes:
    return blake2b(f"{entry.work}\0{entry.word}".encode(), digest_size=8).digest()


def _articles(index: bytes, text: bytes) -> Iterator[tuple[str, str]]:
    """Yield each article once, with its first headword; several may share one."""
    seen = set()
    for line in index.decode("utf-8", "replace").splitlines():
        word, start, size = line.split("\t")[:3]
        if not word.startswith("00") and (start, size) not in seen:
            seen.add((start, size))
            first = _number(start)
            yield word, text[first : first + _number(size)].decode("utf-8", "replace")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def _cleaned(work: str, articles: Iterator[tuple[str, str]]) -> Iterator[Entry]:
    """Yield the first usable entry of each word."""
    seen = set()
    for _, article in articles:
        # {cross references} without their braces.
        word, definition = _PARSERS.get(work, _plain)(re.sub(r"\{([^}]*)\}", r"\1", article.replace("\r", "")))
        word, definition = _one_line(word), _one_line(definition)
        usable = word and len(word) <= MOST_WORD_CHARACTERS and len(definition) >= LEAST_CHARACTERS
        if usable and word.lower() not in seen:
            seen.add(word.lower())
            yield Entry(work, word, definition)


def _plain(article: str) -> tuple[str, str]:
    head, _, rest = article.partition("\n")
    return head, re.sub(r"\(\d{4}-\d\d-\d\d\)\s*$", "", rest.rstrip())  # the date of an entry


def _wordnet(article: str) -> tuple[str, str]:
    head, _, rest = article.partition("\n")
    rest = _one_line(re.sub(r"\[(syn|ant):.*?\]", "", rest, flags=re.DOTALL))
    return head, re.sub(r"^(n|v|adj|adv)\s*(\d+)?\s*:", r"\1:", rest)  # no number of the sense


def _gcide(article: str) -> tuple[str, str]:
    found = re.match(r"^(.*?)\\[^\\]*\\,?\s*(.*)$", article, flags=re.DOTALL)  # the pronunciation stands between
    if not found:
        return "", ""
    without_marks = re.sub(r"\[[^\]]*\]", " ", found[2])  # etymology, sources
    return found[1], re.sub(r"\([A-Z][a-z.]+\)", " ", without_marks)


def _devil(article: str) -> tuple[str, str]:
    found = re.match(r"^([A-Z][A-Z' \-.]+),\s*(.*)$", article.strip(), flags=re.DOTALL)
    return (found[1].lower(), found[2]) if found else ("", "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


_PARSERS: dict[str, Callable[[str], tuple[str, str]]] = {"wn": _wordnet, "gcide": _gcide, "devil": _devil}
