"""The privacy statement of the client unit, recomputed from the server's ledger alone."""

import math
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fedlr.errors import InputError
from fedlr.privacy.charges import Charges, Header, read_ledger
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.profile import profile_of
from fedlr.privacy.statement import RANDOMNESS, SIMULATION, UNSIGNED, floating_point
from fedlr.privacy.units import CLIENT, rounded_up

POISSON = (
    "the Poisson draw of each round's cohort over the fixed population of enrolled clients, which nobody but the "
    "server learns"
)
NONE = "none: cohorts have a fixed size and may be known, so every round counts as if all clients took part"
CYCLIC = (
    "none: clients take part in a fixed and public order, each once in {} rounds, and are charged each time; no draw "
    "is secret"
)
COMMON = ("noise_multiplier", "max_grad_norm", "sample_rate", "divisor")
GAUSSIAN = "Gaussian mechanism on the sum of clipped updates (central DP-FedAvg)"
MATRIX = "Matrix mechanism on the sums of clipped updates (DP-FTRL, banded square root)"
TRUSTED = [
    "the server and its operator: they see every update in the clear, clip it, and add the noise",
    "the server's machine, its ledger and its source of noise",
]
PROTECTS_AGAINST = [
    "A2: readers of the released model, and of every round's",
    "A3: the other clients, all of them together",
]
NOT_PROTECTED_AGAINST = [
    "A4: the server's operator, who is trusted",
    "A5: a malicious server",
    "whoever can read the server's memory, or the client's own device",
]
CONDITIONS = [
    "how many clients are enrolled is public and does not change during the run",
    "one client is one slot: whoever has two has about twice the epsilon, and a much larger delta",
    "the server tells nobody who took part in a round, nor what any single update did",
    "nobody lowered or replaced the server's ledger file; the head below lets a second party check",
]
NOT_COVERED = [
    "tuning and model selection: choosing hyperparameters, rounds or the best of several runs on the same clients",
    "rows that were held out for evaluation, and scores of them",
    "timing and failures of the server",
    "other runs and other uses of the same clients' data that are not in this ledger",
]


def client_statement(
    ledger_path: str | os.PathLike[str], num_clients: int, *, placed_by: Sequence[str] = ()
) -> dict[str, Any]:
    """State what a server's ledger says of the client unit; the same for each of its clients.

    Args:
        ledger_path: the server's ledger; it is verified, and not changed.
        num_clients: enrolled clients.
        placed_by: reasons why another client's rows depend on more than themselves; with any the run is not for
        release.

    Raises:
        InputError: the ledger is missing, was changed, or is of another unit.
    """
    header, charges, head = read_ledger(ledger_path)
    if header.unit != CLIENT.name or set(charges.by_client) - {0}:
        raise InputError(f"Expected a ledger of the client unit in {os.fspath(ledger_path)}, got one of {header.unit}")
    spent = charges.epsilon(0, header)
    is_private = math.isfinite(spent)
    number = spent if is_private else "inf"
    curve = profile_of(charges.steps_of(0, header), header.delta, known=spent)
    return {
        "statement": sentence(header, spent, num_clients=num_clients, placed_by=placed_by),
        "differential_privacy": is_private,
        "for_release": is_private and header.randomness == "os" and not placed_by and header.delta * num_clients < 1,
        "placement_depends_on": list(placed_by),
        "unit": CLIENT.text,
        "neighbouring_relation": CLIENT.relation,
        "mechanisms": _mechanisms(charges),
        "delta": header.delta,
        "epsilon": {"maximum": number, "median": number, "minimum": number},
        **({} if curve is None else {"profile": curve}),
        "budget": {"epsilon": header.epsilon, "delta": header.delta},
        "num_clients": num_clients,
        "num_rounds_charged": len(charges.of(0)),
        "accountant": {"name": header.accountant, "library": "dp-accounting", "version": version("dp-accounting")},
        "amplification": _amplification([charge.mechanism for charge in charges.of(0).values()]),
        "trusted": TRUSTED,
        "protects_against": PROTECTS_AGAINST,
        "not_protected_against": NOT_PROTECTED_AGAINST,
        "conditions": CONDITIONS,
        "randomness": {"kind": header.randomness, "meaning": RANDOMNESS[header.randomness]},
        "floating_point": floating_point(charge.mechanism for charge in charges.of(0).values()),
        "not_covered": NOT_COVERED,
        "signatures": UNSIGNED,
        "dataset_id": header.dataset_id,
        "num_torn_rows": charges.num_torn,
        "ledger_head": head,
    }


def sentence(header: Header, spent: float, *, num_clients: int, placed_by: Sequence[str] = ()) -> str:
    """Say the claim, whom it trusts, and where it ends."""
    if math.isinf(spent):
        return "No differential privacy of clients: epsilon = inf."
    large = (
        "" if header.delta * num_clients < 1 else f", which is 1/{num_clients} or more and so no protection of anybody"
    )
    claim = (
        f"epsilon <= {rounded_up(spent)} at delta = {header.delta:.6g}{large}, for {CLIENT.text} (add or "
        "remove), against readers of the models and the other clients; the server is trusted, and sees updates in the "
        "clear"
    )
    if header.randomness == "seeded":
        return f"Not for release, {SIMULATION}. Simulated: {claim}."
    if placed_by:
        return f"Not for release: a row's place depends on {placed_by[0]}. If rows stayed where they are: {claim}."
    return f"{claim}."


def with_clients(statement: dict[str, Any], of_clients: dict[str, Any]) -> dict[str, Any]:
    """Return the statement of one unit with that of clients beside it; the two epsilons are never added."""
    return {
        **statement,
        "statement": f"{statement['statement']} Of another unit, and never added to it: {of_clients['statement']}",
        "for_release": statement["for_release"] and of_clients["for_release"],
        "client_unit": of_clients,
    }


def _amplification(mechanisms: Sequence[Mechanism]) -> str:
    separations = {mechanism.separation for mechanism in mechanisms}
    if len(separations) == 1 and separations != {1}:
        return CYCLIC.format(*separations)
    return POISSON if mechanisms and all(mechanism.sample_rate < 1 for mechanism in mechanisms) else NONE


def _mechanisms(charges: Charges) -> list[dict[str, Any]]:
    counts: dict[Any, int] = {}
    for charge in charges.of(0).values():
        counts[charge.mechanism] = counts.get(charge.mechanism, 0) + 1
    return [
        {
            "name": MATRIX if mechanism.bands > 1 else GAUSSIAN,
            "sampling": "Poisson: each client joins each round independently" if mechanism.sample_rate < 1 else "none",
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "max_norm": mechanism.max_grad_norm,
            "divisor": mechanism.divisor,
            "num_rounds": number,
            **{key: value for key, value in mechanism.constants().items() if key not in COMMON},
        }
        for mechanism, number in counts.items()
    ]
