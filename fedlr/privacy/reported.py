"""The privacy statement of a server whose clients keep their own ledgers: what they report, and that they report it.

The server cannot check it. It says so, for each client, and states no epsilon for a client that told it none.
"""

import math
from collections.abc import Mapping
from typing import Any

from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.statement import (
    AMPLIFICATION,
    CONDITIONS,
    NOT_COVERED,
    NOT_PROTECTED_AGAINST,
    PROTECTS_AGAINST,
    RANDOMNESS,
    SIMULATION,
    floating_point,
    no_privacy_statement,
)
from fedlr.privacy.units import EXAMPLE, rounded_up

BY_DEVICES = (
    "{} of {} clients signed what they report with the key they are enrolled with: that shows who said so, not that it "
    "is true. fedlr statement RUN_DIR --verify checks them"
)


def reported_statement(
    delta: float | None,
    epsilon: Mapping[int, float],
    ledger_heads: Mapping[int, str],
    *,
    num_clients: int,
    randomness: str,
    mechanism: Mechanism | None,
    signed: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """State what clients report of their own ledgers.

    Args:
        delta: that the server asked for; None without privacy.
        epsilon: by client, the highest that it ever said: over the life of its ledger, other experiments included.
        ledger_heads: by client, the hash of its ledger's last row: whoever keeps it can tell an older copy.
        num_clients: enrolled clients.
        randomness: "seeded" or "os".
        mechanism: of every private step; None without privacy.
        signed: by client, the word that its highest epsilon came with, its signature and the key it is checked with.

    Returns:
        Values that JSON can hold, in the keys of `fedlr.privacy.statement.privacy_statement`.
    """
    if mechanism is None:
        return no_privacy_statement(num_clients)
    largest = max(epsilon.values(), default=math.inf)  # of nobody there is nothing to say
    is_private, silent = math.isfinite(largest), num_clients - len(epsilon)
    told = rounded_up(largest) if is_private else math.inf
    claim = (
        f"each client whose update was used reports epsilon <= {told} at delta <= {delta}, max over "
        f"{len(epsilon)} clients, for {EXAMPLE.text} ({EXAMPLE.relation}), by its own ledger over its whole life; this "
        f"server cannot check it, and {silent} of {num_clients} clients reported nothing"
    )
    words = signed or {}
    seeded = f"Not for release, {SIMULATION}. Simulated: " if randomness == "seeded" else ""
    return {
        "statement": f"{seeded}{claim}." if is_private else f"No differential privacy: {claim}.",
        "differential_privacy": is_private,
        "for_release": is_private and randomness == "os",
        "reported_by_clients": True,
        "unit": EXAMPLE.text,
        "neighbouring_relation": EXAMPLE.relation,
        "mechanism": {
            "name": "Poisson-subsampled Gaussian (DP-SGD)",
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "max_grad_norm": mechanism.max_grad_norm,
            "divisor": mechanism.divisor,
        },
        "delta": delta,
        "clients": [
            {
                "client_id": client,
                "epsilon": value if math.isfinite(value) else "inf",
                "head": ledger_heads.get(client),
                "signed": None if client not in words else dict(words[client]),
            }
            for client, value in sorted(epsilon.items())
        ],
        "signatures": BY_DEVICES.format(len(words.keys() & epsilon.keys()), num_clients),
        "num_clients": num_clients,
        "num_clients_that_reported": len(epsilon),
        "amplification": AMPLIFICATION,
        "protects_against": PROTECTS_AGAINST,
        "not_protected_against": NOT_PROTECTED_AGAINST,
        "conditions": CONDITIONS,
        "randomness": {"kind": randomness, "meaning": RANDOMNESS[randomness]},
        "floating_point": floating_point([mechanism]),
        "not_covered": NOT_COVERED,
    }
