"""The mechanism of the client unit from a configuration, and what is said of it before a run."""

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.privacy.accountant import calibrate_noise_multiplier, epsilon
from fedlr.privacy.adaptive_clip import count_noise
from fedlr.privacy.correlated import best_bands
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler

LARGE_DELTA = 0.01
LOUD_COUNT = 0.2  # of the cohort: noise that drowns a share of clients


def client_delta(experiment: Experiment) -> float:
    """Return the delta of the client unit: as configured, else n^-1.1 for n clients (McMahan et al. 2018, sec. 4).

    Raises:
        InputError: there is one client only.
    """
    found, num_clients = experiment.privacy.client_delta, experiment.num_clients
    if found is not None:
        return found
    if num_clients < 2:
        raise InputError("Expected two clients or more with privacy.unit=client, got 1: nobody hides it")
    return float(num_clients**-1.1)


def cohort_rate(experiment: Experiment) -> float:
    """Return the chance of a client to be in a round that may be accounted for: of a cohort of a fixed size it is 1.

    Whoever watches may know who was asked, so that no draw amplifies; a Poisson cohort is told to nobody.
    """
    return experiment.cohort_size / experiment.num_clients if experiment.cohort == "poisson" else 1.0


def separation(experiment: Experiment) -> int:
    """Return how many rounds lie from one participation of a client to its next: of `cohort=cyclic`, else 1."""
    e = experiment
    return -(-e.num_clients // e.cohort_size) if e.cohort == "cyclic" else 1


def most_participations(experiment: Experiment) -> int:
    """Return how often a client is charged in a run of the client unit: in every round, or once in a cycle."""
    return -(-experiment.num_rounds // separation(experiment))


def client_mechanism(experiment: Experiment) -> tuple[PrivacyBudget | None, Mechanism | None]:
    """Return the budget and the mechanism of the client unit, whose noise lasts for all rounds; None without one.

    Raises:
        InputError: one round exceeds the budget, or no noise reaches it.
    """
    e, p = experiment, experiment.privacy
    if p.client_epsilon is None:
        return None, None
    budget, rate = PrivacyBudget(p.client_epsilon, client_delta(e)), cohort_rate(e)
    noise = p.client_noise_multiplier or calibrate_noise_multiplier(
        budget, sample_rate=rate, num_steps=most_participations(e), accountant=p.accountant
    )
    event = PoissonSampler(rate).dp_event(noise)
    spent = epsilon([(event, most_participations(e))], budget.delta, accountant=p.accountant)
    if spent > budget.epsilon:
        raise InputError(
            f"Expected a privacy.client_noise_multiplier with which {e.num_rounds} rounds stay within "
            f"privacy.client_epsilon={budget.epsilon:g}, got {noise:g}, which spends {spent:.4g}; null finds the least "
            "that does"
        )
    return budget, Mechanism(
        noise_multiplier=noise,
        max_grad_norm=p.client_max_norm,
        sample_rate=rate,
        divisor=float(e.cohort_size),
        release_noise=p.release_noise,
        separation=separation(e),
        clip_quantile=p.client_clip_quantile or 0.0,
        count_noise=count_noise(noise, e.cohort_size) if p.client_clip_quantile else 0.0,
        bands=(p.bands or best_bands(separation(e), e.num_rounds)) if p.mechanism == "dp_ftrl" else 1,
    )


def loud_count_notes(mechanism: Mechanism | None) -> tuple[str, ...]:
    """Say that the count behind a clip bound is mostly noise; nothing where it is not, or there is none."""
    share = mechanism.count_noise / mechanism.divisor if mechanism else 0.0
    if share <= LOUD_COUNT:
        return ()
    return (
        f"the share of clients within the clip bound is known to {share:.2g} only: of so small a cohort "
        "privacy.client_clip_quantile follows noise; set it to null, or take more clients a round",
    )


def unit_notes(experiment: Experiment) -> tuple[str, ...]:
    """Say what of the configuration does not count with the client unit, and what is weak about it."""
    e, p = experiment, experiment.privacy
    if p.client_epsilon is None:
        return ()
    found = []
    if e.max_update_ratio is not None:
        found.append(
            "the clip bounds every update by itself (privacy.client_max_norm), so max_update_ratio is not used: "
            "measured against others an update would tell of them"
        )
    if client_delta(e) >= 1 / e.num_clients:
        found.append(
            f"privacy.client_delta={client_delta(e):g} is 1 / num_clients or more: to publish one client in the clear "
            f"would count as private; set it below {1 / e.num_clients:.3g}"
        )
    elif client_delta(e) > LARGE_DELTA:
        found.append(
            f"delta is {client_delta(e):.3g} for {e.num_clients} clients: so few hide hardly anybody; this unit is for "
            "hundreds of clients and more"
        )
    if p.mechanism == "dp_ftrl" and p.randomness == "os":
        found.append("a run of dp_ftrl whose noise is the operating system's cannot be resumed: none of it is stored")
    if cohort_rate(e) == 1 and e.cohort == "fixed":
        found.append(
            "a cohort of a fixed size, or of everybody, amplifies nothing: every round counts as if all clients took "
            "part; cohort=poisson of a part of them does, with a server that tells nobody who was drawn"
        )
    return tuple(found)
