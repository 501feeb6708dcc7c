"""Which rows settings may be chosen on: a validation split, apart from what is trained on and from what is told of."""

from typing import TYPE_CHECKING

from fedlr.errors import InputError

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

WAYS = ("num_validation", "validation_path", "validation_split")


def check_validation(experiment: "Experiment") -> None:
    """Refuse a validation split that is named twice, or that no epsilon covers, and scores on one that is not there.

    Raises:
        InputError: which names the keys.
    """
    data, on = experiment.data, experiment.tracking.evaluate_on
    given = {key: getattr(data, key) for key in WAYS if getattr(data, key) is not None}
    if len(given) > 1:
        first, second = list(given)[:2]
        raise InputError(
            f"Expected data.{first}=null beside data.{second}, got {given[first]!r}: validation rows are set apart in "
            "one way"
        )
    if on == "validation" and not given:
        raise InputError(
            "Expected validation rows with tracking.evaluate_on=validation, got none: add data.num_validation=0.1, a "
            "share of public rows, or data.validation_path, a table of the server's own"
        )
    check_selection(experiment, has_rows=bool(given))
    if given and experiment.runtime.kind != "local":
        raise InputError(
            f"Expected data.{next(iter(given))}=null with runtime={experiment.runtime.kind}, got a validation split: "
            "devices do not know of it; choose settings in a simulation"
        )
    if data.num_validation is not None and experiment.privacy.is_private and not data.public:
        raise InputError(
            f"Expected data.num_validation=null in a private run, got {data.num_validation:g}: what is chosen on "
            "private rows costs epsilon, which nothing here accounts for; choose on rows of the server's own "
            "(data.validation_path), or say data.public=true if the data are no secret"
        )


def check_selection(experiment: "Experiment", *, has_rows: bool) -> None:
    """Refuse to choose a model, or when to stop, by rows that there are not, and a patience that no run can lose.

    Raises:
        InputError: which names the keys.
    """
    e = experiment
    asked: list[tuple[str, str, str | int]] = [("release", "last", e.release)] if e.release != "last" else []
    asked += [("patience", "null", e.patience)] if e.patience is not None else []
    if not asked:
        return
    key, without, value = asked[0]
    if e.runtime.kind != "local":
        raise InputError(
            f"Expected {key}={without} with runtime={e.runtime.kind}, got {value}: a server of devices has no "
            "validation rows; set runtime=local"
        )
    if not has_rows:
        raise InputError(
            f"Expected validation rows with {key}={value}, got none: add data.validation_path, a table of the "
            "server's own that no client trains on, or, of public data, data.num_validation=0.1; test rows are for "
            "the figure that is told"
        )
    num_scored = -(-e.num_rounds // e.tracking.evaluate_every)
    if e.patience is not None and e.patience >= num_scored:
        raise InputError(
            f"Expected patience < {num_scored}, the rounds that are scored of num_rounds={e.num_rounds}, got "
            f"{e.patience}: no run could stop; lower it, or tracking.evaluate_every"
        )
