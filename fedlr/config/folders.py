"""Where configuration files lie: those of fedlr, and one's own in a folder `configs` of the working folder.

One's own files stand beside fedlr's in the same groups: `configs/method/mine.yaml` is `method=mine`. They add to
fedlr's and never replace one of them.
"""

from pathlib import Path

from fedlr.errors import InputError

OWN = "configs"  # in the working folder


def folders(packaged: Path) -> tuple[Path, ...]:
    """Return the folder of fedlr's files, and one's own where there is one."""
    own = Path.cwd() / OWN
    return (packaged, own) if own.is_dir() and own.resolve() != packaged.resolve() else (packaged,)


def search_path(packaged: Path) -> str:
    """Return the override that has Hydra look into one's own folder too, after fedlr's."""
    quoted = (str(folder).replace("'", "\\'") for folder in folders(packaged)[1:])
    return "hydra.searchpath=[" + ", ".join(f"'file://{folder}'" for folder in quoted) + "]"


def is_group(key: str, packaged: Path) -> bool:
    """Return whether a key names a group of files."""
    return any((folder / key).is_dir() for folder in folders(packaged))


def options(group: str, packaged: Path) -> list[str]:
    """Return the names of a group's files, sorted."""
    return sorted({path.stem for folder in folders(packaged) for path in (folder / group).glob("*.yaml")})


def file_of(group: str, name: str, packaged: Path) -> Path:
    """Return the file of an option that is there."""
    return _files(group, name, packaged)[0]


def check_own(group: str, choice: str, packaged: Path) -> None:
    """Refuse a choice that is another file of one's own than it is of fedlr.

    Raises:
        InputError: which says what to rename.
    """
    if len({file.read_bytes() for file in _files(group, choice, packaged)}) > 1:
        raise InputError(
            f"Expected {group}={choice} to be one file, got fedlr's and {OWN}/{group}/{choice}.yaml of this folder: "
            f"call yours otherwise, its `name` too, such as {group}=my_{choice}"
        )


def _files(group: str, name: str, packaged: Path) -> list[Path]:
    """Return the files of one name, fedlr's first."""
    return [file for folder in folders(packaged) if (file := folder / group / f"{name}.yaml").is_file()]
