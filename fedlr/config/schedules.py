"""The learning-rate schedules of an experiment: the clients' and the server's, and what they do not go with."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fedlr.config.rule import rule
from fedlr.methods.rate_schedule import RateSchedule

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment


def client_rates(experiment: "Experiment") -> RateSchedule:
    """Return what the rate of `trainer.optimizer` is multiplied with in each round."""
    e = experiment
    return RateSchedule(e.trainer.lr_schedule, e.trainer.warmup_rounds, e.num_rounds)


def server_rates(experiment: "Experiment") -> RateSchedule:
    """Return what the server's own step is multiplied with in each round."""
    e = experiment
    return RateSchedule(e.server_lr_schedule, e.server_warmup_rounds, e.num_rounds)


def rates_after(experiment: "Experiment", round_index: int) -> dict[str, float] | None:
    """Return the factors of the round that led to a state, as a line of metrics.jsonl has them.

    None of the start, and without a schedule.
    """
    schedules = {"clients": client_rates(experiment), "server": server_rates(experiment)}
    if not round_index or all(schedule.is_constant for schedule in schedules.values()):
        return None
    return {who: schedule.factor(round_index - 1) for who, schedule in schedules.items()}


@rule("trainer.warmup_rounds", "server_warmup_rounds", "num_rounds")
def warmup_ends(e: "Experiment") -> Iterator[str]:
    """A warm-up ends before the run does."""
    for key, warmup in (
        ("trainer.warmup_rounds", e.trainer.warmup_rounds),
        ("server_warmup_rounds", e.server_warmup_rounds),
    ):
        if warmup >= e.num_rounds:
            yield f"Expected {key} < num_rounds={e.num_rounds}, got {warmup}"


@rule("trainer.lr_schedule", "trainer.warmup_rounds", "method.client")
def one_rate(e: "Experiment") -> Iterator[str]:
    """A rule of the clients that is told the learning rate is told one for all rounds."""
    told = e.method.get("client")
    if not client_rates(e).is_constant and isinstance(told, Mapping) and "lr" in told:
        yield (
            "Expected trainer.lr_schedule=constant and trainer.warmup_rounds=0 for "
            f"method={e.method.get('name')}, whose clients are told one rate of all rounds, got "
            f"{e.trainer.lr_schedule} with {e.trainer.warmup_rounds}"
        )
