"""An audit from start to finish: the mechanism, one run as configured, one run that can fail, and planted faults."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlr.config.rule import Rules, rule
from fedlr.config.schema import Experiment
from fedlr.privacy.accountant import calibrate_noise_multiplier
from fedlr.privacy.audit.finding import NUM_RUNS, Finding
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.runs.directory import LEDGER
from fedlr.simulations.audit.canaries import OneRun, guess_canaries
from fedlr.simulations.audit.mechanism import FAR_ABOVE, mechanism_audit, moved
from fedlr.simulations.audit.options import Options
from fedlr.simulations.audit.planted import PLANTED, noise_off
from fedlr.simulations.audit.probe import Magnified, Unmetered
from fedlr.simulations.audit.small import auditor_generator, with_rows
from fedlr.simulations.federation import Federation, prepare
from fedlr.simulations.ledgers import create_ledger
from fedlr.streams import SeededRandomness

SMALL_EPSILON = 1.0  # at which a run of some hundred canaries can fail
CONFIGURED, WHOLE_BATCHES = "one_run", "one_run_whole_batches"


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon beside what is accounted: the last of up to `NUM_RUNS` runs, the first that holds."""

    check: str
    what: str
    run: OneRun
    num_runs: int

    @property
    def holds(self) -> bool:
        """Whether some run did not exceed what is accounted."""
        return self.run.lower_bound <= self.run.epsilon

    @property
    def can_fail(self) -> bool:
        """Whether right guesses alone would exceed what is accounted."""
        return self.run.most > self.run.epsilon


@dataclass(frozen=True)
class Planted:
    """A fault that was planted, and the checks that found it."""

    fault: str
    found_by: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    federation: Federation  # of few rows
    options: Options
    findings: list[Finding]
    bounds: list[Bound]
    planted: list[Planted] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Return the checks that found something else than is accounted."""
        checks = [(one.check, one.holds) for one in self.findings] + [(one.check, one.holds) for one in self.bounds]
        return [check for check, holds in checks if not holds]

    @property
    def holds(self) -> bool:
        """Whether everything is as accounted."""
        return not self.failed

    @property
    def missed(self) -> list[str]:
        """Return the planted faults that no check found."""
        return [one.fault for one in self.planted if not one.found_by]


def audit(experiment: Experiment, options: Options, *, seed: int, say: Callable[[str], None]) -> Audit:
    """Audit an experiment as configured.

    Raises:
        InputError: it is not private, its rows are not public, or it could not run.
    """
    OF_AN_AUDIT.check(experiment)
    full = prepare(experiment, seed=seed)
    generator = auditor_generator(full)
    f = with_rows(full, options.canaries, generator)
    assert f.mechanism is not None
    accounted = f.mechanism
    say(f"the mechanism: {options.draws:,} draws of noise, and neighbouring clients")
    findings = mechanism_audit(f, accounted=accounted, num_draws=options.draws)
    num_canaries = sum(map(len, f.clients))
    say(f"one run as configured: {num_canaries:,} canaries")
    configured = shortened(f, options.rounds)
    bounds = [bound(configured, CONFIGURED, options, generator=generator)]
    say(f"one step over whole batches at epsilon {SMALL_EPSILON:g}, which can fail")
    whole = over_whole_batches(f)
    bounds.append(bound(whole, WHOLE_BATCHES, options, generator=generator))
    planted = list(plant(f, whole, options, generator=generator, say=say)) if options.planted else []
    return Audit(f, options, findings, bounds, planted)


@rule("privacy.epsilon", "privacy.unit", "runtime", "privacy.ledger")
def epsilon_of_rows(e: Experiment) -> Iterator[str]:
    """An audit plants single rows and trains several times: it needs an epsilon of rows, and charges no ledger."""
    if not e.privacy.is_private:
        yield "Expected an epsilon to audit, got privacy=none; set privacy=dp"
    if e.privacy.unit != "example":
        yield (
            "Expected privacy.unit=example for an audit, whose canaries are single rows, got client; audit the same "
            "configuration with privacy=dp"
        )
    if e.runtime.kind != "local":
        yield f"Expected runtime=local for an audit, which trains in this process, got {e.runtime.kind}"
    if e.privacy.ledger is not None:
        yield (
            f"Expected privacy.ledger=null for an audit, got {e.privacy.ledger!r}: an audit trains several "
            "times and charges nothing there; leave privacy.ledger and privacy.ledger_epsilon out"
        )


@rule("data.public")
def audit_of_public_rows(e: Experiment) -> Iterator[str]:
    """The figures of an audit are computed from rows in the clear, which no epsilon covers."""
    if not e.data.public:
        yield (
            "Expected data.public=true for an audit, got false: its figures are computed from the rows in the clear, "
            "and no epsilon covers them; audit the same configuration with data=synthetic"
        )


OF_AN_AUDIT: Rules[Experiment] = Rules("An audit", "Asked by `fedlr audit`.", (epsilon_of_rows, audit_of_public_rows))


def shortened(f: Federation, num_rounds: int | None) -> Federation:
    """Return the federation with so many rounds of it; None: all."""
    rounds = min(f.experiment.num_rounds, num_rounds or f.experiment.num_rounds)
    return replace(f, experiment=f.experiment.model_copy(update={"num_rounds": rounds}))


def over_whole_batches(f: Federation) -> Federation:
    """Return the federation with one round of one step over all rows of all clients, at a small epsilon.

    Model, engine, pool, method, clip, divisor and optimizer are those of the configuration. The loss is magnified, so
    that each row has all the influence that the clip leaves it, at a start where no trained tensor is zero.
    """
    assert f.mechanism is not None and f.budget is not None
    e = f.experiment
    budget = PrivacyBudget(min(SMALL_EPSILON, f.budget.epsilon), f.budget.delta)
    sigma = calibrate_noise_multiplier(budget, sample_rate=1.0, num_steps=1, accountant=e.privacy.accountant)
    loss: Any = Magnified(f.training.loss, FAR_ABOVE)
    privacy = e.privacy.model_copy(update={"max_participations": 1, "epsilon": budget.epsilon})
    changed = {"num_rounds": 1, "cohort_size": e.num_clients, "privacy": privacy}
    return replace(
        moved(f),
        experiment=e.model_copy(update=changed),
        budget=budget,
        mechanism=replace(f.mechanism, noise_multiplier=sigma, sample_rate=1.0),
        training=replace(f.training, num_steps=1, sampler=PoissonSampler(1.0), loss=loss),
    )


def bound(f: Federation, check: str, options: Options, *, generator: np.random.Generator) -> Bound:
    """Return the lower bound of a federation's epsilon: of one run, or of more while each exceeds what is accounted."""
    assert f.mechanism is not None
    for number in range(NUM_RUNS):
        with tempfile.TemporaryDirectory() as folder:
            ledger = create_ledger(f, Path(folder) / LEDGER)
            assert ledger is not None
            run = guess_canaries(
                f if number == 0 else with_fresh_noise(f, generator),
                accounted=f.mechanism,
                ledger=ledger,
                spent=partial(most_spent, ledger, len(f.clients)),
                guessed=options.guesses,
                generator=generator,
            )
        found = Bound(check, WHAT[check], run, number + 1)
        if found.holds:
            break
    return found


def most_spent(ledger: PrivacyLedger, num_clients: int) -> float:
    """Return the epsilon of the client that spent most."""
    return max(ledger.spent_all(range(num_clients)).values())


WHAT = {
    CONFIGURED: "lower bound on epsilon at 95 %, one run as configured",
    WHOLE_BATCHES: "lower bound on epsilon at 95 %, one step over whole batches",
}


def with_fresh_noise(f: Federation, generator: np.random.Generator) -> Federation:
    """Return the federation with streams of another seed, where a seed decides them."""
    if not isinstance(f.randomness, SeededRandomness):
        return f
    return replace(f, randomness=SeededRandomness(int(generator.integers(2**32))))


def plant(
    f: Federation, whole: Federation, options: Options, *, generator: np.random.Generator, say: Callable[[str], None]
) -> Iterator[Planted]:
    """Plant every fault and yield which checks find it; the one-run audit is asked where it can see one."""
    assert f.mechanism is not None and whole.mechanism is not None
    for fault, broken in PLANTED.items():
        say(f"planted: {fault}")
        found = [
            one.check
            for one in mechanism_audit(broken(f), accounted=f.mechanism, num_draws=options.draws)
            if not one.holds
        ]
        if broken is noise_off and exceeds(broken(whole), whole.mechanism, whole, options, generator=generator):
            found.append(WHOLE_BATCHES)
        yield Planted(fault, tuple(found))


def exceeds(
    broken: Federation, accounted: Mechanism, whole: Federation, options: Options, *, generator: np.random.Generator
) -> bool:
    """Return whether each of `NUM_RUNS` runs of a broken federation refutes the epsilon of the right one."""
    assert whole.budget is not None
    epsilon = whole.budget.epsilon
    for _ in range(NUM_RUNS):
        run = guess_canaries(
            broken,
            accounted=accounted,
            ledger=Unmetered(),
            spent=lambda: epsilon,
            guessed=options.guesses,
            generator=generator,
        )
        if run.lower_bound <= epsilon:
            return False
    return True
