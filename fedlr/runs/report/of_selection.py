"""What the files of a run say of how its model was chosen, checked."""

from collections.abc import Mapping

from fedlr.errors import InputError
from fedlr.errors.messages import shown
from fedlr.runs.report.records import Record
from fedlr.runs.selection import BEST, LAST, MEAN, VALIDATION
from fedlr.tasks.evaluation import Metric


def released_of(summary: Record) -> Mapping[str, object]:
    """Return `released` of summary.json; empty where an earlier version wrote it.

    Raises:
        InputError: a value has another form.
    """
    if summary.values.get("released") is None:
        return {}
    told = summary.nested("released")
    if told.text("model") not in (LAST, MEAN, BEST):
        raise InputError(
            f"Expected {LAST}, {MEAN} or {BEST} for 'model' in {told.where}, got {shown(told.text('model'))}"
        )
    counts = {key: told.count(key) for key in ("rounds_completed", "num_averaged", "num_rounds")}
    num = None if told.values.get("num_validation") is None else told.count("num_validation")
    if num is None and told.text("model") == BEST:
        raise InputError(f"Expected 'num_validation' in {told.where}, got none for the best model")
    stopped = told.get("stopped_early") is True
    return {"model": told.text("model"), **counts, "num_validation": num, "stopped_early": stopped}


def validation_of(row: Record, metric: Metric) -> Mapping[str, float | None]:
    """Return headline and loss of a state on validation rows, as the line has them; empty where it has none."""
    if row.values.get(VALIDATION) is None:
        return {}
    told = row.nested(VALIDATION)
    return {name: told.optional_number(name, may_diverge=True) for name in (metric.name, "loss")}
