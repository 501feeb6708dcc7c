"""Hugging Face datasets to rows."""

from collections.abc import Sequence

from fedlr.data.rows import SUFFIXES, Row, Rows, check_columns
from fedlr.errors import InputError


def read_hub(name: str, columns: Sequence[str], *, split: str) -> Rows:
    """Read the wanted columns of a Hugging Face dataset, `owner/name` or `owner/name:configuration`.

    Raises:
        InputError: when the Hub cannot be reached, or has no such dataset, configuration, split or column.
    """
    import datasets  # takes a second to import, and only this function needs it

    dataset_name, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(dataset_name, configuration or None, split=split)
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
    check_columns(name, dataset.column_names, columns)
    label = dataset.features[columns[1]]
    rows = [Row(i, v) for i, v in enumerate(zip(*(dataset[c] for c in columns), strict=True), start=1)]
    return Rows(rows, tuple(label.names) if isinstance(label, datasets.ClassLabel) else None)
