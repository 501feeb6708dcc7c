"""The client unit in a simulation: the server's ledger, its cohorts, and what is said of the noise."""

import json
from collections.abc import Callable
from functools import partial

from fedlr.config.schema import Experiment
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.client_unit import EVERYBODY, ClientUnit
from fedlr.rounds.cohorts import cyclic_cohort, poisson_cohort
from fedlr.runs.directory import LEDGER, SERVER_LEDGER
from fedlr.simulations.federation import Federation
from fedlr.streams import OsRandomness, SeededRandomness, ServerRandomness
from fedlr.training.noise import update_noise


def ledgers_of(experiment: Experiment) -> list[str]:
    """Return the names of the ledgers that a run leaves behind: of its clients, of its server, of both, or none."""
    privacy = experiment.privacy
    found = [LEDGER] if privacy.epsilon is not None else []
    return found if privacy.client_epsilon is None else [*found, SERVER_LEDGER]


def client_unit(federation: Federation, ledger: PrivacyLedger | None) -> ClientUnit | None:
    """Return what hides whole clients in the rounds of a federation; None where nothing does.

    Raises:
        ValueError: there is a mechanism and no ledger, or the reverse.
    """
    f, e = federation, federation.experiment
    if (f.client_mechanism is None) != (ledger is None):
        raise ValueError("Expected a server's ledger exactly with a mechanism of the client unit")
    if f.client_mechanism is None or ledger is None:
        return None
    return ClientUnit(
        f.client_mechanism,
        ledger,
        randomness=_server_randomness(f),
        cohort_size=e.cohort_size,
        computed=f"{f.start.adapter.fingerprint()} {f.data_sha256} {json.dumps(e.resolved(), sort_keys=True)}",
    )


def cohort_draws(federation: Federation) -> Callable[[int], tuple[int, ...]] | None:
    """Return what draws the cohort of a round under `cohort=poisson` or `cyclic`; None under a fixed size."""
    f, e = federation, federation.experiment
    if e.cohort == "cyclic":
        return partial(cyclic_cohort, num_clients=e.num_clients, cohort_size=e.cohort_size)
    if e.cohort != "poisson":
        return None

    def drawn(round_index: int) -> tuple[int, ...]:
        generator = _server_randomness(f).cohort(round_index=round_index)
        return poisson_cohort(generator, num_clients=e.num_clients, sample_rate=e.cohort_size / e.num_clients)

    return drawn


def _server_randomness(federation: Federation) -> ServerRandomness:
    found = federation.randomness
    if not isinstance(found, SeededRandomness | OsRandomness):
        raise ValueError(f"Expected randomness of a seed or of the operating system, got {type(found).__name__}")
    return found


def spent_on_clients(ledger: PrivacyLedger | None, num_rounds: int) -> float | None:
    """Return the epsilon of the client unit after so many rounds; None without one."""
    if ledger is None:
        return None
    return ledger.spent_all([EVERYBODY], num_rounds=num_rounds if ledger.is_seeded else None)[EVERYBODY]


def noise_of_update(federation: Federation) -> float | None:
    """Return the standard deviation of the noise in one number of what the server averages: a client's update, or with
    the client unit the one that stands for all; None where it is not known."""
    m = federation.client_mechanism
    if m is None:
        return update_noise(federation.training, federation.mechanism)
    return (
        None
        if federation.mechanism or m.bands > 1 or m.clip_quantile
        else m.noise_multiplier * m.max_grad_norm / m.divisor
    )


def noise_as_of_one(federation: Federation) -> float | None:
    """Return the noise that each of the cohort's updates would carry, if the noise of their mean were theirs."""
    found = noise_of_update(federation)
    if found is None or federation.client_mechanism is None:
        return found
    return found * float(federation.experiment.cohort_size**0.5)
