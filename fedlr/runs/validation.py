"""The validation rows of an experiment, and which of the held-out rows its scores are of."""

import os
from collections.abc import Callable

from fedlr.config.build import naming
from fedlr.config.schema import DataSection, Experiment
from fedlr.data.files import table_files
from fedlr.data.placement import without_texts_of
from fedlr.data.table import Table
from fedlr.data.validation import set_apart
from fedlr.errors import InputError


def with_validation(
    experiment: Experiment, data: Table, *, load: Callable[[Experiment], Table]
) -> tuple[Table, Table | None]:
    """Return the rows that are left to train and to test on, and the validation rows; None where there are none.

    Args:
        experiment: says which rows are set apart.
        data: all rows of its table.
        load: returns the rows of another table, which `data.test_path` or `data.test_split` names.

    Raises:
        InputError: as for any table, or one of the two has no rows.
    """
    section = experiment.data
    if section.num_validation is not None:
        with naming("data", "num_validation"):
            return set_apart(data, section.num_validation)
    if section.validation_path is None and section.validation_split is None:
        return data, None
    check_third_table(section)
    named = {"test_path": section.validation_path, "test_split": section.validation_split, "num_test": None}
    validation = load(experiment.model_copy(update={"data": section.model_copy(update=named)}))
    return without_texts_of(data, validation), validation


def check_third_table(data: DataSection) -> None:
    """Refuse validation rows that are those of training or of the test figure.

    Raises:
        InputError: which names the keys.
    """
    section = data.section()
    others = {"data.path": section.get("path"), "data.test_path": data.test_path}
    if data.validation_path is not None:
        own = _files(data.validation_path)
        for key, path in others.items():
            if isinstance(path, str) and (shared := sorted(own & _files(path))):
                raise InputError(
                    f"Expected data.validation_path to be another table than {key}, got {data.validation_path!r}, "
                    f"which is {shared[0]!r} too: what is chosen on rows says nothing of how good it is on them"
                )
        return
    splits = {"data.train_split": section.get("train_split") or "train", "data.test_split": data.test_split}
    if shared_keys := [key for key, split in splits.items() if split == data.validation_split]:
        raise InputError(
            f"Expected data.validation_split to be another split than {shared_keys[0]}, got {data.validation_split!r} "
            "for both"
        )
    if isinstance(path := section.get("path"), str) and table_files(path):
        raise InputError(
            f"Expected data.validation_path with the file or folder {path!r}, got "
            f"data.validation_split={data.validation_split!r}: only a dataset by name has splits"
        )


def _files(path: str) -> set[str]:
    return {os.path.realpath(file.path) for file in table_files(path)} or {path}


def scored_rows(experiment: Experiment, test: Table, validation: Table | None) -> Table:
    """Return the test rows, or the validation rows that are not among them where settings are being chosen."""
    if experiment.tracking.evaluate_on == "test" or validation is None:
        return test
    return without_texts_of(validation, test)
