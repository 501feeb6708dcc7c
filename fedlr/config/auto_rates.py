"""Where `trainer.optimizer.lr` and `trainer.divisor` are auto: the numbers that stand for them, from public ones alone.

They are found once, when a run is prepared, after its noise is calibrated; from there on the experiment has numbers,
which are written, sent to devices, resumed from and accounted. A number of a configuration always stays. The rule, and
why, is in `fedlr.training.rates`.
"""

from collections.abc import Mapping
from typing import Any

from fedlr.config.schedules import client_rates, server_rates
from fedlr.config.schema import AUTO, Experiment
from fedlr.errors import InputError
from fedlr.privacy.accountant import calibrate_noise_multiplier
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.training.rates import (
    LARGEST_RATE,
    LARGEST_RATE_OF_SHARES,
    ROWS_OF_A_CLIENT,
    Schedule,
    accumulated_noise,
    learning_rate,
    rounded,
)

SGD = "torch.optim.SGD"
STAND_IN = 1.0  # for what is checked before the numbers are known


def learning_rate_of(experiment: Experiment) -> Any:
    """Return trainer.optimizer.lr as it is configured; None where the optimizer's own default is taken."""
    return experiment.trainer.optimizer.section().get("lr")


def provisional(experiment: Experiment) -> Experiment:
    """Return an experiment with numbers in the place of auto, so that all else can be checked before the data are read.

    Raises:
        InputError: there is no rule for this optimizer.
    """
    if learning_rate_of(experiment) == AUTO:
        require_rule(experiment)
        experiment = with_learning_rate(experiment, STAND_IN)
    return with_divisor(experiment, STAND_IN) if experiment.trainer.divisor == AUTO else experiment


def require_rule(experiment: Experiment) -> None:
    """Refuse an automatic rate of what the rule was not derived for.

    Raises:
        InputError: which names what is in the way, and a number to begin with.
    """
    section = experiment.trainer.optimizer.section()
    way = "set trainer.optimizer.lr to a number"
    if section["_target_"] != SGD:
        name = section["_target_"].rpartition(".")[2]
        raise InputError(
            f"Expected a number in trainer.optimizer.lr with {name}, got auto: it is derived for SGD, whose noise "
            f"adds up in proportion to the rate, while a step of {name} is about as long as the rate whatever "
            "the noise; set trainer.optimizer.lr=0.005, or trainer=sgd"
        )
    momentum = section.get("momentum", 0.0)
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise InputError(f"Expected trainer.optimizer.momentum in [0, 1) with an lr of auto, got {momentum}; {way}")
    for key in ("weight_decay", "dampening"):
        if section.get(key):
            raise InputError(
                f"Expected trainer.optimizer.{key}=0 with trainer.optimizer.lr=auto, got {section[key]}; {way}"
            )
    if experiment.trainer.after_noise is not None:
        raise InputError(
            "Expected trainer.after_noise=null with trainer.optimizer.lr=auto, got "
            f"{experiment.trainer.after_noise.target}, which changes the noise it is derived from; {way}"
        )


def resolved_rates(
    experiment: Experiment, *, num_rows: int | None, server_step: tuple[float, float] = (0.0, 1.0)
) -> Experiment:
    """Return the experiment with numbers in the place of auto; one that has numbers is returned as it is.

    Args:
        experiment: the checked configuration.
        num_rows: of the data that the configuration names, held-out ones too; None: not known here. Read only where
            data.public is true.
        server_step: momentum and rate of a server optimizer of the method's own (`Method.server_step`).

    Guarantees: where data.public is false the result is a function of the configuration alone: no row added, removed
        or changed moves any number.

    Raises:
        InputError: no noise reaches the budget.
    """
    e = experiment
    if e.trainer.divisor == AUTO:
        e = with_divisor(e, rounded(max(1.0, e.trainer.sample_rate * expected_rows(e, num_rows=num_rows))))
    if learning_rate_of(e) != AUTO:
        return e
    noise = noise_multiplier_of(e)
    found = {
        "no_privacy_lr": _rate(e, schedule_of(e, server_step), None),
        "alone_lr": _rate(e, schedule_of(e, server_step, alone=True), noise),
    }
    others = {key: lr for key, lr in found.items() if getattr(e.tracking, key) is None}
    e = e.model_copy(update={"tracking": e.tracking.model_copy(update=others)})
    return with_learning_rate(e, _rate(e, schedule_of(e, server_step), noise))


def found_text(given: Experiment, found: Experiment) -> str | None:
    """Say which numbers stand for what was auto; None where nothing was."""
    numbers = []
    if learning_rate_of(given) == AUTO:
        numbers.append(f"trainer.optimizer.lr={learning_rate_of(found):g}")
    if given.trainer.divisor == AUTO:
        numbers.append(f"trainer.divisor={found.trainer.divisor:g}")
    return f"auto is {' and '.join(numbers)}, from public numbers" if numbers else None


def _rate(experiment: Experiment, schedule: Schedule, noise_multiplier: float | None) -> float:
    return learning_rate(
        schedule,
        noise_multiplier=noise_multiplier,
        max_grad_norm=experiment.privacy.max_grad_norm,
        divisor=experiment.trainer.number_divisor(),
        largest=LARGEST_RATE_OF_SHARES if experiment.task.target == "text_regression" else LARGEST_RATE,
    )


def expected_rows(experiment: Experiment, *, num_rows: int | None) -> float:
    """Return how many rows a client is expected to have: declared, or counted where counts are public, or a constant.

    What is held out counts as configured, not as drawn: the mean is the same for every seed.
    """
    data, num_test = experiment.data, experiment.data.num_test
    if data.rows_per_client is not None:
        return float(data.rows_per_client)
    if not data.public or num_rows is None:
        return float(ROWS_OF_A_CLIENT)
    held_out = 0 if num_test is None else num_test if num_test >= 1 else num_test * num_rows
    return max(1.0, (num_rows - held_out) / experiment.num_clients)


def rows_source(experiment: Experiment) -> str:
    """Say where `expected_rows` is from."""
    if experiment.data.rows_per_client is not None:
        return "data.rows_per_client"
    return "the mean of public data" if experiment.data.public else "assumed: declare data.rows_per_client"


def noise_multiplier_of(experiment: Experiment) -> float | None:
    """Return the noise multiplier of every step, calibrated where it is null; None without privacy."""
    privacy, trainer = experiment.privacy, experiment.trainer
    if privacy.epsilon is None:
        return None
    return privacy.noise_multiplier or calibrate_noise_multiplier(
        PrivacyBudget(privacy.epsilon, privacy.delta),
        sample_rate=trainer.sample_rate,
        num_steps=experiment.max_participations * trainer.num_steps,
        accountant=privacy.accountant,
        rows=privacy.rows_of_unit,
    )


def alone_rounds(experiment: Experiment) -> int:
    """Return how many rounds a client takes part in on average: what it gets when it is alone."""
    return max(1, round(experiment.num_rounds * experiment.cohort_size / experiment.num_clients))


def schedule_of(experiment: Experiment, server_step: tuple[float, float], *, alone: bool = False) -> Schedule:
    """Return how noise adds up in a run, or in one of a client alone."""
    e, optimizer = experiment, experiment.trainer.optimizer.section()
    momentum, lr = server_step
    return Schedule(
        num_rounds=alone_rounds(e) if alone else e.num_rounds,
        cohort_size=1 if alone else e.cohort_size,
        num_steps=e.trainer.num_steps,
        momentum=float(optimizer.get("momentum", 0.0)),
        nesterov=bool(optimizer.get("nesterov", False)),
        server_momentum=e.server_momentum or momentum,
        server_lr=lr,
        client_rates=client_rates(e),
        server_rates=server_rates(e),
    )


def noise_of(experiment: Experiment, server_step: tuple[float, float]) -> float | None:
    """Return N, the noise that a weight gathers over a run whose rate and divisor are numbers; None where that is not
    known: no noise, or a step that is not linear in it."""
    noise, lr = noise_multiplier_of(experiment), learning_rate_of(experiment)
    try:
        require_rule(experiment)
    except InputError:
        return None
    if noise is None or not isinstance(lr, int | float):
        return None
    return accumulated_noise(
        float(lr),
        schedule_of(experiment, server_step),
        noise_multiplier=noise,
        max_grad_norm=experiment.privacy.max_grad_norm,
        divisor=experiment.trainer.number_divisor(),
    )


def arm(experiment: Experiment, key: str) -> Experiment:
    """Return the experiment at the rate of another arm, `no_privacy_lr` or `alone_lr` of tracking, if it has one."""
    lr = getattr(experiment.tracking, key)
    return experiment if lr is None else with_learning_rate(experiment, lr)


def with_learning_rate(experiment: Experiment, lr: float) -> Experiment:
    """Return the experiment at another rate, which a rule of its clients that is told the rate is told too."""
    trainer, before = experiment.trainer, learning_rate_of(experiment)
    method = dict(experiment.method)
    told = method.get("client")
    if isinstance(told, Mapping) and "lr" in told:  # SCAFFOLD's, and its server's
        for key in ("client", "aggregate"):
            section = method[key]
            if isinstance(section, Mapping) and "lr" in section and section["lr"] == before:
                method[key] = {**section, "lr": lr}
    optimizer = trainer.optimizer.model_copy(update={"lr": lr})
    trainer = trainer.model_copy(update={"optimizer": optimizer})
    return experiment.model_copy(update={"trainer": trainer, "method": method})


def with_divisor(experiment: Experiment, divisor: float) -> Experiment:
    """Return the experiment with another divisor."""
    return experiment.model_copy(update={"trainer": experiment.trainer.model_copy(update={"divisor": divisor})})
