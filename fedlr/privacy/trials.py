"""Private selection: the best of a random number of trials, and the epsilon of choosing it.

Whoever chooses the best of several runs on the same rows releases more than one run does, though each is private.
Papernot and Steinke (2022, "Hyperparameter tuning with Renyi differential privacy", https://arxiv.org/abs/2110.03620)
bound it where the number of trials is random, drawn before any of them and told to nobody, each trial draws its
settings, batches and noise afresh, and nothing but the best leaves: theorem 2 for a geometric number, theorem 6 for a
Poisson one. The bound is dp-accounting's `RepeatAndSelectDpEvent`.

It is about whoever sees what was chosen. Who sees the trials themselves (a server that took part in them) learns what
all of them released, and their epsilons add up.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dp_accounting
import yaml
from scipy.stats import geom, poisson

from fedlr.errors import InputError
from fedlr.errors.ranges import MOST_STEPS, require_delta
from fedlr.privacy.accountant import composed_renyi
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.units import rounded_up
from fedlr.streams import Draws

Law = Literal["geometric", "poisson"]
SHAPES: Mapping[str, float] = {"geometric": 1.0, "poisson": math.inf}  # as dp-accounting names them
MOST_TRIALS = 1000  # on average
MEANS = (
    "choosing the best of a random number of trials and releasing nothing of the others, for whoever sees the chosen "
    "run alone; whoever saw the trials, or how many there were, has what all of them released: their epsilons add up"
)
SAID = ("law", "mean", "num_steps", "epsilon", "delta", "means")


@dataclass(frozen=True)
class Trials:
    """How many trials there are.

    Args:
        mean: on average, 1 at least.
        law: "geometric": at least one, with a long tail; "poisson": close to the mean, and sometimes none at all.
    """

    mean: float
    law: Law = "geometric"

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= MOST_TRIALS:
            raise InputError(f"Expected privacy.trials in [1, {MOST_TRIALS}], got {self.mean}")
        if self.law not in SHAPES:
            raise InputError(f"Expected privacy.trials_law to be geometric or poisson, got {self.law!r}")

    def draw(self, draws: Draws) -> int:
        """Draw a number of trials; it must not depend on data, and is not to be told.

        >>> import numpy as np
        >>> [Trials(10.0).draw(np.random.default_rng(k)) for k in range(5)]
        [10, 7, 3, 1, 28]
        """
        uniform = float(draws.random(1)[0])
        if self.law == "poisson":
            return int(poisson.ppf(uniform, self.mean)) if uniform > 0 else 0
        return max(1, int(geom.ppf(uniform, 1 / self.mean)))

    def epsilon(self, events: Sequence[tuple[dp_accounting.DpEvent, int]], delta: float) -> float:
        """Return the epsilon, at this delta, of the best of the trials; each trial is all of these events.

        Guarantees:
            Unit and relation: those of the events. An upper bound for what is chosen, by Renyi accounting.

        Raises:
            InputError: an event has no Renyi bound.

        >>> steps = [(PoissonSampler(0.032).dp_event(1.0), 500)]
        >>> round(Trials(10.0).epsilon(steps, 1e-5), 2), round(Trials(10.0, "poisson").epsilon(steps, 1e-5), 2)
        (8.96, 10.35)
        """
        require_delta(delta, "rdp")
        if not events:
            return 0.0
        if any(count > MOST_STEPS for _, count in events):
            raise InputError(f"Expected at most {MOST_STEPS} private steps of a trial, got more")
        one = dp_accounting.dp_event.ComposedDpEvent(
            [dp_accounting.dp_event.SelfComposedDpEvent(event, count) for event, count in events]
        )
        return composed_renyi(dp_accounting.dp_event.RepeatAndSelectDpEvent(one, self.mean, SHAPES[self.law]), delta)


def with_trials(statement: dict[str, Any], run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the statement of a run that is one of several trials, with the epsilon of having been chosen.

    Which law the number of trials had, and how many steps were announced for one, is read from config.yaml, which
    nobody signs and no ledger vouches for; the noise from the ledger. Without `privacy.trials` it is the statement
    as it was.

    Raises:
        InputError: the ledger has more steps than a trial, or several kinds of them.
    """
    asked = _asked(Path(run_dir))
    if asked is None:
        return statement
    trials, num_steps, ledger = asked
    header, charges, _ = read_ledger(Path(run_dir) / ledger)
    mechanisms = {charge.mechanism for client in charges.by_client.values() for charge in client.values()}
    most = max((sum(c.steps for c in client.values()) for client in charges.by_client.values()), default=0)
    if len(mechanisms) > 1 or most > num_steps:
        raise InputError(
            f"Expected at most {num_steps} steps of one mechanism in {ledger} of a trial, got {most} of "
            f"{len(mechanisms)}: what was chosen among other trials has no bound"
        )
    events = [(PoissonSampler(m.sample_rate).dp_event(m.noise_multiplier), num_steps) for m in mechanisms]
    epsilon = trials.epsilon(events, header.delta)
    told = dict(zip(SAID, (trials.law, trials.mean, num_steps, epsilon, header.delta, MEANS), strict=True))
    sentence = (
        f"It was chosen as the best of a random number of trials ({trials.law}, mean {trials.mean:g}): together with "
        f"the choice epsilon <= {rounded_up(epsilon)} at delta = {header.delta:g} for whoever sees none of the others."
    )
    return {**statement, "statement": f"{statement['statement']} {sentence}", "trials": told}


def of_choice(statement: Mapping[str, Any]) -> dict[str, float]:
    """Return what summary.json says in place of the epsilon of one trial, where a run was chosen among trials.

    >>> of_choice({"epsilon": {"maximum": 5.13}, "trials": {"epsilon": 8.96}}), of_choice({})
    ({'epsilon_max': 8.96}, {})
    """
    return {"epsilon_max": float(statement["trials"]["epsilon"])} if statement.get("trials") else {}


def _asked(run_dir: Path) -> tuple[Trials, int, str] | None:
    """Return the law of the trials, the steps of one and the name of its ledger; None of a run that is no trial."""
    path = run_dir / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_bytes())
        privacy = tree["privacy"]
        if privacy.get("trials") is None:
            return None
        trials = Trials(float(privacy["trials"]), privacy.get("trials_law") or "geometric")
        rounds = int(tree["num_rounds"])
        if privacy.get("client_epsilon") is None:
            most = int(privacy.get("max_participations") or rounds)
            return trials, most * int(tree["trainer"]["num_steps"]), "ledger.jsonl"
        if tree["cohort"] == "cyclic":
            rounds = -(-rounds // -(-int(tree["num_clients"]) // int(tree["cohort_size"])))
        return trials, rounds, "server_ledger.jsonl"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"Expected the configuration of a run in {path}, got {error!r:.200}") from None
