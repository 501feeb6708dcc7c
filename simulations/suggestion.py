"""What a plan says of the learning rate, and which other schedule would leave less noise beside what is learnt.

Everything here is from public numbers: the configuration, and counts of rows where data.public is true.
"""

import math
from dataclasses import dataclass, replace

from fedlr.adapters.state import HEAD
from fedlr.config.auto_rates import (
    SGD,
    expected_rows,
    learning_rate_of,
    noise_multiplier_of,
    noise_of,
    require_rule,
    resolved_rates,
    rows_source,
)
from fedlr.config.schema import AUTO, Experiment
from fedlr.errors import InputError
from fedlr.methods.method import Method
from fedlr.runs.tables import num_rows_of
from fedlr.simulations.federation import Federation
from fedlr.training.rates import ACCUMULATED_NOISE

NUM_ROUNDS, MOMENTUM = 20, 0.5  # of the schedule that is suggested: docs/log.md has the experiments


@dataclass(frozen=True)
class Told:
    """A schedule with its noise.

    Args:
        experiment: whose schedule it is.
        noise_multiplier: of each of its steps.
        num_rows: of a client, as far as that is public.
    """

    experiment: Experiment
    noise_multiplier: float
    num_rows: float

    @property
    def num_gradients(self) -> float:
        """Of all clients in all rounds, expected."""
        e = self.experiment
        return e.num_rounds * e.cohort_size * e.trainer.num_steps * e.trainer.sample_rate * self.num_rows

    @property
    def signal_to_noise(self) -> float:
        """Of the sum of all updates: gradients that a weight of the mean model gathers, per noise that it gathers, in
        units of the clip bound (`fedlr.training.rates`, without momentum)."""
        e = self.experiment
        noise = self.noise_multiplier * math.sqrt(e.num_rounds * e.trainer.num_steps * e.cohort_size)
        return self.num_gradients / noise


def rate_lines(given: Experiment, federation: Federation) -> list[str]:
    """Say which rate and divisor a run has, what noise they let add up in a weight, and what auto would choose.

    Args:
        given: the experiment as it was configured.
        federation: what was made of it.
    """
    e, method = federation.experiment, federation.method
    lr, divisor = learning_rate_of(e), federation.training.divisor
    noise = noise_of(e, method.server_step)
    named = "" if lr is None else f"lr {lr:g}, "
    size = "" if noise is None else f": noise of {noise:.2g} adds up in a weight of the last model"
    lines = [f"rate        {named}divisor {divisor:g}{size}"]
    num_rows = num_rows_of(e, federation.clients[0].table, federation.test)
    if given.trainer.divisor == AUTO:
        rows = expected_rows(e, num_rows=num_rows)
        lines.append(f"            divisor found from {rows:g} rows a client ({rows_source(e)})")
    found = automatic(e, method, num_rows=num_rows)
    if found is not None and learning_rate_of(given) != AUTO and noise is not None:
        numbers = f"lr {learning_rate_of(found):g}, divisor {found.trainer.divisor:g}"
        lines.append(f"            auto would be {numbers}, for noise of {ACCUMULATED_NOISE:g}")
    if learning_rate_of(given) == AUTO:
        others = (("without privacy", "no_privacy_lr", "run_no_privacy"), ("alone", "alone_lr", "run_alone"))
        lines += [
            f"            lr {getattr(e.tracking, key):g} for the arm {name}"
            for name, key, runs in others
            if getattr(e.tracking, runs)
        ]
    return lines


def automatic(experiment: Experiment, method: Method, *, num_rows: int) -> Experiment | None:
    """Return the experiment with the numbers that auto would find; None where there is no rule."""
    try:
        require_rule(experiment)
    except InputError:
        return None
    trainer, optimizer = experiment.trainer, experiment.trainer.optimizer.model_copy(update={"lr": AUTO})
    asked = trainer.model_copy(update={"divisor": AUTO, "optimizer": optimizer})
    return resolved_rates(
        experiment.model_copy(update={"trainer": asked}), num_rows=num_rows, server_step=method.server_step
    )


def suggestion_lines(federation: Federation) -> list[str]:
    """Suggest full batches of all clients, as an override to paste, where that leaves less noise; else nothing."""
    e, mechanism = federation.experiment, federation.mechanism
    if mechanism is None:
        return []
    num_rows = expected_rows(e, num_rows=num_rows_of(e, federation.clients[0].table, federation.test))
    own, other = Told(e, mechanism.noise_multiplier, num_rows), full_batches(e, num_rows=num_rows)
    if other is None or other.signal_to_noise < 1.1 * own.signal_to_noise:
        return []
    return [
        f"suggestion  {' '.join(overrides(e, federation.method))}",
        f"            noise multiplier {other.noise_multiplier:g} in place of {own.noise_multiplier:g}, "
        f"{other.signal_to_noise / own.signal_to_noise:.1f} times the signal beside the noise, for "
        f"{other.num_gradients:,.0f} gradients in place of {own.num_gradients:,.0f}",
    ]


def full_batches(experiment: Experiment, *, num_rows: float) -> Told | None:
    """Return the schedule of full batches of all clients, one step a round; None where no noise meets the budget."""
    e = experiment
    other = e.model_copy(
        update={
            "num_rounds": NUM_ROUNDS,
            "cohort_size": e.num_clients,
            "trainer": e.trainer.model_copy(update={"num_steps": 1, "sample_rate": 1.0}),
            "privacy": e.privacy.model_copy(update={"max_participations": None, "noise_multiplier": None}),
        }
    )
    try:
        noise = noise_multiplier_of(other)
    except InputError:
        return None
    return None if noise is None else Told(other, noise, num_rows)


def overrides(experiment: Experiment, method: Method) -> list[str]:
    """Return what to type after a command for the schedule of full batches."""
    e = experiment
    words = [f"num_rounds={NUM_ROUNDS}", f"cohort_size={e.num_clients}", "trainer.num_steps=1", "trainer.sample_rate=1"]
    if e.privacy.max_participations is not None:
        words.append("privacy.max_participations=null")
    if e.privacy.noise_multiplier is not None:
        words.append("privacy.noise_multiplier=null")
    if may_have_momentum(e, method):
        words.append(f"server_momentum={MOMENTUM:g}")
    if e.trainer.optimizer.target == SGD and e.trainer.after_noise is None:
        words += ["trainer.optimizer.lr=auto", "trainer.divisor=auto"]
    return words


def may_have_momentum(experiment: Experiment, method: Method) -> bool:
    """Return whether a method takes a momentum of the server's, and something has it."""
    try:
        roles = replace(method, server_momentum=MOMENTUM).momentum_roles
    except InputError:
        return False
    return experiment.adapter.train_head or roles != {HEAD}
