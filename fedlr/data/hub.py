"""Hugging Face datasets to rows."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from fedlr.data.files import is_saved_dataset
from fedlr.data.formats import SUFFIXES, Row, Rows, check_columns
from fedlr.errors import InputError


def read_hub(name: str, columns: Sequence[str], *, split: str) -> Rows:
    """Read the wanted columns of a Hugging Face dataset: `owner/name`, `owner/name:configuration`, or a saved folder.

    A column of images gives the bytes or the path of each, as a mapping.

    Raises:
        InputError: when the Hub cannot be reached, or has no such dataset, configuration, split or column.
    """
    import datasets  # takes a second to import, and only this function needs it

    if is_saved_dataset(name):
        dataset = _saved(datasets.load_from_disk, name, split)
    else:
        dataset = _named(datasets.load_dataset, name, split)
    check_columns(name, dataset.column_names, columns)
    for column in columns:
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    label = dataset.features[columns[1]]
    rows = [Row(i, v) for i, v in enumerate(zip(*(dataset[c] for c in columns), strict=True), start=1)]
    return Rows(rows, tuple(label.names) if isinstance(label, datasets.ClassLabel) else None)


def _saved(load: Callable[[str], Any], folder: str, split: str) -> Any:
    """Return a split of a dataset that `save_to_disk` wrote."""
    try:
        found = load(os.path.expanduser(folder))
    except Exception as error:  # whatever its reader raises of files that were changed
        raise InputError(
            f"{folder!r} is no dataset that can be read ({type(error).__name__}): save it again with save_to_disk"
        ) from error
    splits = list(found) if isinstance(found, dict) else [str(found.split or "train")]
    if split not in splits:
        raise InputError(f"The dataset {folder!r} has no split {split!r}: it has {', '.join(splits)}")
    return found[split] if isinstance(found, dict) else found


def _named(load: Callable[..., Any], name: str, split: str) -> Any:
    """Return a split of a dataset of the Hub, or of its copy here."""
    dataset_name, _, configuration = name.partition(":")
    try:
        return load(dataset_name, configuration or None, split=split)
    except ConnectionError as error:
        raise InputError(
            f"{name!r} is not a file here, and this run is offline (the Hugging Face Hub cannot be reached): "
            f"set data.path to a {', '.join(SUFFIXES)} file, or runtime.offline=false once, which keeps a copy"
        ) from error
    except Exception as error:  # every builder raises its own kind; none of them is a fault of this program
        raise InputError(
            f"{name!r} is not a file here, nor a Hugging Face dataset that loads with split {split!r} "
            f"({type(error).__name__}): check its name, configuration (owner/name:configuration) and split"
        ) from error
