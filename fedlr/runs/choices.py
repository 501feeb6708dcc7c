"""What a run decided while it ran, what each decision read, and what it cost: sentences of the privacy statement."""

from collections.abc import Mapping
from typing import Any

from fedlr.config.schedules import client_rates, server_rates
from fedlr.config.schema import Experiment
from fedlr.runs.selection import BEST


def choices_of(experiment: Experiment, released: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one sentence for each decision of a private run; none without privacy, where all may reveal rows.

    Args:
        experiment: the resolved configuration.
        released: `released` of summary.json (`fedlr.runs.selection`).
    """
    e = experiment
    if not e.privacy.is_private:
        return ()
    found = []
    if not (client_rates(e).is_constant and server_rates(e).is_constant):
        found.append(
            "the learning rate of each round: by its public number alone; it reads no rows and costs no epsilon"
        )
    rows = f"{released['num_validation'] or 0:,} validation rows ({_source(e)})"
    if e.release == BEST:
        found.append(
            f"which model is released: the best of the scored ones on {rows}; no client trains on them, so it costs no "
            "epsilon, and no epsilon protects them"
        )
    if e.patience is not None:
        stopped = (
            f"after round {released['num_rounds']} of {e.num_rounds}"
            if released["stopped_early"]
            else "not before the end"
        )
        found.append(
            f"when to stop ({stopped}): by scores on {rows}; it costs no epsilon and spares none: epsilon is that of "
            f"all {e.num_rounds} rounds that were announced, asked or not"
        )
    return tuple(found)


def _source(experiment: Experiment) -> str:
    data = experiment.data
    if data.num_validation is not None:
        return "data.num_validation, of data declared public"
    key = "validation_path" if data.validation_path is not None else "validation_split"
    return f"data.{key}, taken for the server's own"
