"""Reference works are read as packed, each word is of one class over all works, and what is fetched is pinned."""

import gzip
import json
import os
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from fedlr.config.schema import compose_experiment
from fedlr.data.conversations import Conversations
from fedlr.errors import InputError
from fedlr.runs.tables import load_examples
from fedlr.simulations import assets, pinned_packages, reference_works
from fedlr.simulations.dictionaries import CLIENTS, NAMES, dictionary_tables, words_of
from fedlr.simulations.pinned_packages import Pinned, debian_packages, wheels

ENTRIES = {
    "wn": ["apple\n    n 1: fruit with {red} skin [syn: {x}]\n"],
    "gcide": ["Pear \\Pear\\ (p[^a]r), n. [OE. pere.] (Bot.) The fleshy fruit of a tree."],
    "foldoc": ["byte\n\n   <data> Eight bits. (1996-12-13)\n"],
    "vera": ["DNS\n      Domain Name System (Internet, RFC 1034)\n"],
    "jargon": ["foo\n   interj. Term of disgust in the lab\n", "no\n  short\n"],
    "devil": ["PRAY, v.  To ask that the laws be annulled."],
    "elements": ["tin\n  Symbol: Sn, a soft metal\n"],
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def number(value: int) -> str:
    digits = ""
    while True:
        digits, value = _LETTERS[value % 64] + digits, value // 64
        if not value:
            return digits


def packed(name: str) -> bytes:
    work, _, kind = name.partition(".")
    texts = [text.encode() for text in ENTRIES[work]]
    if kind == "dict.dz":
        return gzip.compress(b"".join(texts))
    starts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    lines = [f"w\t{number(start)}\t{number(len(t))}\n" for start, t in zip(starts, texts, strict=True)]
    return ("00database\tA\tB\n" + "".join(lines * 2)).encode()  # a second headword of the same article


def rows(table: bytes) -> list[dict[str, str]]:
    return [json.loads(line) for line in table.decode().splitlines()]


def test_entries_are_clean_prompts_and_responses() -> None:
    found = {row["work"]: (row["prompt"], row["response"]) for row in rows(dictionary_tables(packed)["all"])}
    assert found == {
        "wn": ("Define: apple (WordNet)", "n: fruit with red skin"),
        "gcide": ("Define: Pear (GCIDE)", "(p r), n. The fleshy fruit of a tree."),
        "foldoc": ("Define: byte (FOLDOC)", "<data> Eight bits."),
        "vera": ("Define: DNS (VERA)", "Domain Name System (Internet, RFC 1034)"),
        "jargon": ("Define: foo (Jargon File)", "interj. Term of disgust in the lab"),
        "devil": ("Define: pray (Devil's Dictionary)", "v. To ask that the laws be annulled."),
        "elements": ("Define: tin (Elements)", "Symbol: Sn, a soft metal"),
    }


def test_a_held_out_word_is_held_out_of_every_work(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word{i}" for i in range(60)]
    monkeypatch.setitem(ENTRIES, "wn", [f"{word}\n  n 1: the meaning of a word\n" for word in words])
    monkeypatch.setitem(ENTRIES, "jargon", [f"{word}\n  another meaning of it\n" for word in words])
    tables = {name: rows(table) for name, table in dictionary_tables(packed).items()}
    classes = {name: {row["word"] for row in tables[name]} for name in ("train", "test", "tuning")}
    assert not classes["train"] & (classes["test"] | classes["tuning"]) and not classes["test"] & classes["tuning"]
    for name, mine in classes.items():
        assert mine and all(words_of(word) == name for word in mine)
    assert {row["client"] for row in tables["test"]} <= set(CLIENTS)
    assert words_of("Troll") == words_of("troll")


def test_the_tables_are_those_of_the_study() -> None:
    folder = assets.default_folder()
    if not (folder / "dictionaries" / "train.jsonl").is_file():
        pytest.skip("the dictionaries are not fetched: python -m fedlr.simulations.assets dictionaries")
    assert assets.FETCHES["dictionaries"][0](folder) == (folder / "dictionaries", False)
    training, held_out = load_examples(compose_experiment(["experiment=dictionaries"]), seed=0)
    assert isinstance(training, Conversations) and len(training) == 12 * 640 and len(held_out) == 6 * 60
    assert len(set(training.groups or ())) == sum(CLIENTS.values()) == 12 and len(NAMES) == 7


def test_packages_that_cannot_be_had_or_were_changed_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(InputError, match=r"dict-wn cannot be fetched: apt-get said 'E: Unable.*apt-get update"):
        with debian_packages({"dict-wn": Pinned("1", "00")}):
            pass
    apt.write_text("#!/bin/sh\necho x > dict-wn_1_all.deb\n")
    with pytest.raises(InputError, match="dict-wn 1 has SHA-256"):
        with debian_packages({"dict-wn": Pinned("1", "00")}):
            pass
    monkeypatch.setattr(pinned_packages.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="gguf cannot be fetched: pip said"):
        with wheels({"gguf": Pinned("1", "00")}):
            pass


def test_tables_of_another_hash_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / reference_works.MODEL_FOLDER).mkdir()

    class Unpacked:
        def __enter__(self) -> Path:
            inside = tmp_path / "unpacked" / "usr/share/dictd"
            inside.mkdir(parents=True)
            for work in NAMES:
                for kind in ("index", "dict.dz"):
                    (inside / f"{work}.{kind}").write_bytes(packed(f"{work}.{kind}"))
            return tmp_path / "unpacked"

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(reference_works, "debian_packages", lambda pinned: Unpacked())
    with pytest.raises(InputError, match=r"all\.jsonl came out with SHA-256"):
        reference_works.fetch_dictionaries(tmp_path)
    assert not (tmp_path / "dictionaries").exists()


def test_the_converter_finds_the_package_and_none_of_its_folders_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as a wheel lays it out: fedlr/simulations in a folder of packages."""
    monkeypatch.setattr(reference_works, "__file__", str(tmp_path / "fedlr" / "simulations" / "reference_works.py"))
    monkeypatch.setattr(reference_works.fedlr, "__file__", str(tmp_path / "fedlr" / "__init__.py"))
    monkeypatch.setattr(reference_works, "wheels", lambda pinned: nullcontext(dict.fromkeys(pinned, tmp_path / "w")))
    monkeypatch.setattr(reference_works, "wheel", lambda path: nullcontext(Mock()))
    ran = Mock(return_value=Mock(returncode=0))
    monkeypatch.setattr(reference_works.subprocess, "run", ran)
    monkeypatch.setenv("PYTHONPATH", "mine")
    reference_works._fetch_model(tmp_path / "model")
    assert ran.call_args.kwargs["env"]["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "w"), str(tmp_path), "mine"])
