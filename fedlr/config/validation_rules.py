"""Which rows are held out, and which settings may be chosen on: apart from what is trained on and what is reported."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedlr.config.rule import rule

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

TEST_WAYS = ("num_test", "test_path", "test_split")
WAYS = ("num_validation", "validation_path", "validation_split")


def given(experiment: "Experiment", keys: tuple[str, ...]) -> dict[str, Any]:
    """Return which of these keys of data have a value."""
    return {key: value for key in keys if (value := getattr(experiment.data, key)) is not None}


@rule("data.num_test", "data.test_path", "data.test_split")
def held_out_rows(e: "Experiment") -> Iterator[str]:
    """Rows are held out in one way."""
    ways = given(e, TEST_WAYS)
    if not ways:
        yield (
            "Expected a value for data.num_test, data.test_path or data.test_split, got none: add data.num_test=0.2, "
            "a share of the rows, or the table that is held out"
        )
    if len(ways) > 1:
        first, second = list(ways)[:2]
        yield f"Expected data.{first}=null beside data.{second}, got {ways[first]!r}: rows are held out in one way"


@rule("data.num_validation", "data.validation_path", "data.validation_split")
def one_validation_split(e: "Experiment") -> Iterator[str]:
    """Validation rows are set apart in one way."""
    ways = given(e, WAYS)
    if len(ways) > 1:
        first, second = list(ways)[:2]
        yield (
            f"Expected data.{first}=null beside data.{second}, got {ways[first]!r}: validation rows are set apart in "
            "one way"
        )


@rule("tracking.evaluate_on", "data.num_validation", "data.validation_path")
def rows_to_score(e: "Experiment") -> Iterator[str]:
    """A run that is scored on validation rows has some."""
    if e.tracking.evaluate_on == "validation" and not given(e, WAYS):
        yield (
            "Expected validation rows with tracking.evaluate_on=validation, got none: add data.num_validation=0.1, a "
            "share of public rows, or data.validation_path, a table of the server's own"
        )


@rule("release", "patience", "runtime", "data.validation_path")
def rows_to_choose_by(e: "Experiment") -> Iterator[str]:
    """A model, or when to stop, is chosen on validation rows, in a simulation; test rows are only reported on."""
    asked: dict[str, tuple[str, str]] = {"release": ("last", e.release)} if e.release != "last" else {}
    asked |= {"patience": ("null", str(e.patience))} if e.patience is not None else {}
    for key, (without, value) in asked.items():
        if e.runtime.kind != "local":
            yield (
                f"Expected {key}={without} with runtime={e.runtime.kind}, got {value}: a server of devices has no "
                "validation rows; set runtime=local"
            )
        if not given(e, WAYS):
            yield (
                f"Expected validation rows with {key}={value}, got none: add data.validation_path, a table of the "
                "server's own that no client trains on, or, of public data, data.num_validation=0.1; test rows are for "
                "the figure that is told"
            )


@rule("patience", "num_rounds", "tracking.evaluate_every")
def patience_that_ends(e: "Experiment") -> Iterator[str]:
    """A run is scored often enough to lose its patience."""
    num_scored = -(-e.num_rounds // e.tracking.evaluate_every)
    if e.patience is not None and e.patience >= num_scored:
        yield (
            f"Expected patience < {num_scored}, the rounds that are scored of num_rounds={e.num_rounds}, got "
            f"{e.patience}: no run could stop; lower it, or tracking.evaluate_every"
        )


@rule("data.num_validation", "data.validation_path", "data.validation_split", "runtime")
def validation_in_a_simulation(e: "Experiment") -> Iterator[str]:
    """Devices know no validation split."""
    ways = given(e, WAYS)
    if ways and e.runtime.kind != "local":
        yield (
            f"Expected data.{next(iter(ways))}=null with runtime={e.runtime.kind}, got a validation split: "
            "devices do not know of it; choose settings in a simulation"
        )


@rule("data.num_validation", "data.public", "privacy.epsilon")
def validation_of_private_rows(e: "Experiment") -> Iterator[str]:
    """To choose settings on private rows costs epsilon, which is not accounted for: refused unless they are public."""
    if e.data.num_validation is not None and e.privacy.is_private and not e.data.public:
        yield (
            f"Expected data.num_validation=null in a private run, got {e.data.num_validation:g}: what is chosen on "
            "private rows costs epsilon, which nothing here accounts for; choose on rows of the server's own "
            "(data.validation_path), or say data.public=true if the data are no secret"
        )
