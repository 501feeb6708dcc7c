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
