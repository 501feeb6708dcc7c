"""The privacy statement: what a run may claim, recomputed from its ledger file alone.

The number in the sentence is the maximum over clients. A mean would hide the client that spent most, and "the
model is epsilon-DP" would be false: the unit is an example, the claim is each client's own.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.privacy.all_runs import checked_all_runs, with_all_runs
from fedlr.privacy.charges import Charge, Charges, Header, read_ledger
from fedlr.privacy.earlier import with_earlier
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.profile import is_same_profile, profile_of
from fedlr.privacy.trials import with_trials
from fedlr.privacy.units import CLIENT, EXAMPLE, PERSON, UNITS, rounded_up

PROTECTS_AGAINST = [
    "A2: readers of the released model",
    "A3: the other clients",
    "A4: an honest but curious server operator",
    "A5: a malicious server that follows the protocol of messages",
]
NOT_PROTECTED_AGAINST = [
    "A6: a server whose code runs on the client",
    "whoever can read the client's own device",
]
AMPLIFICATION = (
    "the secret Poisson draw of examples on the client's device; none is claimed from the sampling of clients, "
    "because the server knows who took part"
)
CONDITIONS = [
    "no training example is held by two clients",
    "a row's client, and whether it is held out, depend on that row alone",
    "each client follows the protocol: it clips, adds its noise and keeps its ledger",
    "nobody lowered or replaced the ledger file; the head below lets a second party check",
]
CONDITIONS_OF_PERSONS = [
    "no person has rows at two clients",
    "a row's client, whether it is held out, and which rows of a person count depend on that person's rows alone",
    *CONDITIONS[2:],
]
NOT_COVERED = [
    "tuning and model selection: choosing hyperparameters, rounds or the best of several runs on the same data",
    "metrics computed on private data",
    "label statistics and numbers of examples",
    "timing, failures and message sizes",
    "participation: which clients took part, and when",
    "other runs and other uses of the same data that are not in this ledger",
    "several rows of one person: a person with k rows has about k times the epsilon, and a much larger delta",
]
FLOATING_POINT = (
    "Noise is drawn and added in floating point, not from a discrete distribution on a grid; the analysis assumes "
    "real numbers, and the last bits of a result may tell more (Mironov 2012)."
)
ON_A_GRID = (
    "Sums are rounded to a grid, and noise is a rounded Gaussian on it, drawn exactly; it allows for what rounding "
    "adds to the sensitivity. That float32 sums of other rows round is allowed for by as much again, without a proof, "
    "and how long a draw takes depends on it."
)
ONE_MECHANISM = "steps of one mechanism, announced before the first of them: their events are added up"
FILTER = (
    "steps of mechanisms that were chosen one after the other: a Renyi filter of order {} (Feldman and Zrnic 2021), "
    "which the budget and the first mechanism fixed before anything was released"
)
UNSIGNED = "none: whoever holds the ledger computes this statement again; only devices have keys to sign theirs with"
NEWER = ("profile", "signatures")  # which statements of earlier versions do not have
LEDGER, SERVER_LEDGER = "ledger.jsonl", "server_ledger.jsonl"  # of the clients of a run, and of its server
MOST_CLIENTS = 1_000_000  # more than that is no run, but a mistake in a file
SIMULATION = "a simulation of privacy: whoever knows the seed can subtract the noise"
RANDOMNESS = {
    "seeded": f"{SIMULATION}; not for release of private data",
    "os": "ChaCha20 under a key of the operating system's generator, a new one for every step; none is stored",
}
# What runs said of their generator that another version made; no ledger has it, so it is taken from what they said.
EARLIER_RANDOMNESS = (
    "seeded by the operating system at every step, and never stored (Philox, not a cryptographic generator)",
)


def privacy_statement(
    ledger_path: str | os.PathLike[str], enrolled_client_ids: Iterable[int], *, placed_by: Sequence[str] = ()
) -> dict[str, Any]:
    """State what a ledger's clients have spent, for whom it holds and what it leaves out.

    Args:
        ledger_path: the ledger; it is verified, and not changed.
        enrolled_client_ids: every client that was enrolled, whether or not it ever trained.
        placed_by: reasons why where a row lies depends on more than that row; with any the run is not for release.

    Returns:
        Values that JSON can hold; an infinite epsilon is the string "inf".

    Raises:
        InputError: the ledger is missing or was changed, no client is enrolled, or one that trained is not.
    """
    header, charges, head = read_ledger(ledger_path)
    enrolled = _enrolled(charges, enrolled_client_ids)
    spent = [charges.epsilon(client, header) for client in enrolled]
    if header.unit == CLIENT.name:
        raise InputError(f"Expected the ledger of clients in {os.fspath(ledger_path)}, got a server's")
    mechanisms, unit = _mechanisms(charges), UNITS[header.unit]
    return {
        "statement": _sentence(header, max(spent), noiseless=_is_noiseless(charges), placed_by=placed_by),
        "differential_privacy": math.isfinite(max(spent)),
        "for_release": math.isfinite(max(spent)) and header.randomness == "os" and not placed_by,
        "placement_depends_on": list(placed_by),
        "unit": unit.text,
        "neighbouring_relation": unit.relation,
        **({"rows_per_person": header.rows_per_person} if unit is PERSON else {}),
        "mechanisms": mechanisms,
        "delta": header.delta,
        "epsilon": {
            "maximum": _json_number(max(spent)),
            "median": _json_number(statistics.median(spent)),
            "minimum": _json_number(min(spent)),
        },
        **_profile(charges, header, enrolled[spent.index(max(spent))], max(spent)),
        "budget": {"epsilon": header.epsilon, "delta": header.delta},
        "num_clients": len(enrolled),
        "num_clients_by_status": _statuses(charges, enrolled),
        "accountant": {
            "name": header.accountant,
            "library": "dp-accounting",
            "version": version("dp-accounting"),
            "composition": _composition(charges, header),
        },
        "amplification": AMPLIFICATION,
        "protects_against": PROTECTS_AGAINST,
        "not_protected_against": NOT_PROTECTED_AGAINST,
        "conditions": CONDITIONS_OF_PERSONS if unit is PERSON else CONDITIONS,
        "randomness": {"kind": header.randomness, "meaning": RANDOMNESS[header.randomness]},
        "floating_point": floating_point(charge.mechanism for charge in _all(charges)),
        "not_covered": NOT_COVERED[:-1] if unit is PERSON else NOT_COVERED,
        "signatures": UNSIGNED,
        "dataset_id": header.dataset_id,
        "num_torn_rows": charges.num_torn,
        "ledger_head": head,
    }


def _enrolled(charges: Charges, client_ids: Iterable[int]) -> list[int]:
    """Return the enrolled clients in order, all that were charged among them."""
    enrolled = sorted(set(client_ids))
    strangers = sorted(set(charges.by_client) - set(enrolled))
    if not enrolled:
        raise InputError("Expected at least one enrolled client to state the privacy of, got nobody")
    if strangers:
        raise InputError(f"Expected every client of the ledger among the enrolled, got {strangers} besides")
    return enrolled


def floating_point(mechanisms: Iterable[Mechanism]) -> str:
    """Say how noise of these mechanisms is drawn and added; one that is not on the grid speaks for all."""
    found = {mechanism.release_noise for mechanism in mechanisms}
    return ON_A_GRID if found == {"grid"} else FLOATING_POINT


def no_privacy_statement(num_clients: int) -> dict[str, Any]:
    """State that a run has no differential privacy; in the same keys."""
    return {
        "statement": "No differential privacy: epsilon is infinite for every client. Updates can reveal data.",
        "differential_privacy": False,
        "for_release": False,
        "unit": EXAMPLE.text,
        "neighbouring_relation": EXAMPLE.relation,
        "mechanisms": [],
        "delta": None,
        "epsilon": {"maximum": "inf", "median": "inf", "minimum": "inf"},
        "num_clients": num_clients,
        "protects_against": [],
        "not_covered": ["everything: no noise was added to anything"],
    }


def with_origin(statement: dict[str, Any], origin: str | None) -> dict[str, Any]:
    """Return a statement that also says which public examples the adapter's start was made from; None: none were."""
    return statement if origin is None else {**statement, "start": origin}


def with_public(statement: dict[str, Any], taken_as_public: Sequence[str]) -> dict[str, Any]:
    """Return a statement that also says what about the data the run took for public; it protects none of that."""
    return {**statement, "taken_as_public": list(taken_as_public)} if taken_as_public else statement


def with_choices(statement: dict[str, Any], choices: Sequence[str]) -> dict[str, Any]:
    """Return a statement that also says what the run decided while it ran, what that read and what it cost."""
    return {**statement, "choices": list(choices)} if choices else statement


def recompute(run_dir: str | os.PathLike[str], *, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """State the privacy of a finished run again, from its ledger, and compare with its privacy.json.

    Only the number of enrolled clients, numbered from 0, what placed the rows, what was taken as public, what was
    decided on the way, where the start is from (an earlier run's statement too), and which generator an earlier version
    drew from are taken from privacy.json: the ledger has none of them. What all runs on the data spent (`all_runs`) is
    computed again from the ledger that config.yaml names, as it was when the run ended; where that file is not found it
    is taken from privacy.json too, and said. The curve may differ in the last digits, as another processor rounds.

    Args:
        run_dir: holds privacy.json and, for a private run, ledger.jsonl.
        say: takes a line on what could not be checked.

    Returns:
        The recomputed statement.

    Raises:
        InputError: a file is missing or was changed, or privacy.json says something else.
    """
    path = Path(run_dir) / "privacy.json"
    try:
        stated = json.loads(path.read_bytes())
        num_clients = stated["num_clients"]
        if type(num_clients) is not int or not 0 < num_clients <= MOST_CLIENTS:
            raise ValueError(f"num_clients={num_clients!r:.40}")
        placed_by = [str(reason) for reason in stated.get("placement_depends_on", ["unknown: the statement is silent"])]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"Expected a privacy statement in {path}, got {error!r:.200}") from error
    found = run_statement(Path(run_dir), num_clients, placed_by=placed_by, expected=_ledgers_of(stated))
    found = with_public(with_origin(found, stated.get("start")), stated.get("taken_as_public") or ())
    found = with_trials(with_choices(found, stated.get("choices") or ()), run_dir)
    found = with_earlier(found, stated.get("started_from"))
    found = _without_newer(_as_earlier(found, stated), stated)
    others, unchecked = checked_all_runs(stated.get("all_runs"), Path(run_dir))
    found = _with_told_curve(with_all_runs(found, others), stated)
    if unchecked is not None:
        say(unchecked)
    different = sorted(key for key in {*found, *stated} if found.get(key) != stated.get(key))
    if different:
        raise InputError(f"Expected {path} to say what the ledger says, got other values of {', '.join(different)}")
    return found


def run_statement(
    run_dir: Path, num_clients: int, *, placed_by: Sequence[str] = (), expected: Collection[str] = ()
) -> dict[str, Any]:
    """State the privacy of a run from the ledgers in its directory: of its examples, of its clients, or of both.

    Args:
        run_dir: holds `LEDGER` and `SERVER_LEDGER`, one of them, or none: then there is no privacy.
        num_clients: enrolled clients.
        placed_by: as for `privacy_statement`.
        expected: names of ledgers that must be there.
    """
    from fedlr.privacy.client_statement import client_statement, with_clients

    own, server = run_dir / LEDGER, run_dir / SERVER_LEDGER
    has_own, has_server = (path.exists() or path.name in expected for path in (own, server))
    if not has_own and not has_server:
        return no_privacy_statement(num_clients)
    of_clients = client_statement(server, num_clients, placed_by=placed_by) if has_server else None
    if not has_own:
        assert of_clients is not None
        return of_clients
    found = privacy_statement(own, range(num_clients), placed_by=placed_by)
    return found if of_clients is None else with_clients(found, of_clients)


def _without_newer(found: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return a statement without what statements of earlier versions do not tell, where `stated` does not."""
    kept = {key: value for key, value in found.items() if key not in NEWER or key in stated}
    if isinstance(told := stated.get("client_unit"), dict) and "client_unit" in kept:
        kept["client_unit"] = _without_newer(kept["client_unit"], told)
    return kept


def _with_told_curve(found: dict[str, Any], stated: Any) -> dict[str, Any]:
    """Return a statement with the curve that is stated, where it is the found one but for rounding."""
    found = dict(found)
    if not isinstance(stated, dict):
        return found
    if "profile" in found and is_same_profile(stated.get("profile"), found["profile"]):
        found["profile"] = stated["profile"]
    if "client_unit" in found:
        found["client_unit"] = _with_told_curve(found["client_unit"], stated.get("client_unit"))
    return found


def _as_earlier(found: dict[str, Any], stated: Any) -> dict[str, Any]:
    """Return a statement that names the generator of an earlier version, where the stated one does."""
    found = dict(found)
    told = stated.get("randomness") if isinstance(stated, dict) else None
    if isinstance(told, dict) and told.get("kind") == "os" and told.get("meaning") in EARLIER_RANDOMNESS:
        if found.get("randomness", {}).get("kind") == "os":
            found["randomness"] = told
    if "client_unit" in found and isinstance(stated, dict):
        found["client_unit"] = _as_earlier(found["client_unit"], stated.get("client_unit"))
    return found


def _ledgers_of(stated: dict[str, Any]) -> list[str]:
    """Return the ledgers that a statement was made of."""
    is_of_clients = stated.get("unit") == CLIENT.text
    found = [SERVER_LEDGER] if is_of_clients or "client_unit" in stated else []
    is_private = "ledger_head" in stated or stated.get("differential_privacy") is not False
    return [*found, LEDGER] if is_private and not is_of_clients else found


def _sentence(header: Header, largest: float, *, noiseless: bool, placed_by: Sequence[str]) -> str:
    if math.isinf(largest):
        why = "no noise was added" if noiseless else "the noise is too small for the accountant"
        return f"No differential privacy: epsilon = inf, max over clients ({why})."
    claim = (
        f"epsilon <= {rounded_up(largest)} at delta = {header.delta}, max over clients, for {UNITS[header.unit].text} "
        f"({UNITS[header.unit].relation}), each client under its own accounting"
    )
    if header.unit == PERSON.name:
        claim += f"; at most {header.rows_per_person} rows of a person are trained on"
    if header.randomness == "seeded":
        return f"Not for release, {SIMULATION}. Simulated: {claim}."
    if placed_by:
        return f"Not for release: a row's place depends on {placed_by[0]}. If rows stayed where they are: {claim}."
    return f"{claim}."


def _profile(charges: Charges, header: Header, client: int, spent: float) -> dict[str, Any]:
    """Return the whole curve of the client that spent most (`fedlr.privacy.profile`); nothing without a step."""
    found = profile_of(charges.steps_of(client, header), header.delta, known=spent)
    return {} if found is None else {"profile": found}


def _composition(charges: Charges, header: Header) -> str:
    """Say by which rule the steps of each client were added up (fedlr.privacy.filter)."""
    rules = [charges.filter_of(client, header) for client in charges.by_client]
    orders = sorted({rule.order for rule in rules if rule is not None})
    if not orders:
        return ONE_MECHANISM
    return FILTER.format(" or ".join(f"{order:g}" for order in orders))


def _mechanisms(charges: Charges) -> list[dict[str, Any]]:
    """Describe every mechanism that occurs, with the numbers of steps that rounds reserved."""
    steps: dict[Any, set[int]] = {}
    for charge in _all(charges):
        steps.setdefault(charge.mechanism, set()).add(charge.reserved_steps)
    return [
        {
            "name": "Poisson-subsampled Gaussian (DP-SGD)",
            "sampling": "Poisson: each example joins each step independently",
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "max_grad_norm": mechanism.max_grad_norm,
            "divisor": mechanism.divisor,
            "steps_per_round": sorted(counts),
            **({"release_noise": "grid"} if mechanism.release_noise == "grid" else {}),
        }
        for mechanism, counts in steps.items()
    ]


def _statuses(charges: Charges, enrolled: Sequence[int]) -> dict[str, int]:
    open_clients = {c for c, rounds in charges.by_client.items() if _has_open(rounds.values())}
    return {
        "never_reserved": sum(client not in charges.by_client for client in enrolled),
        "all_settled": sum(client in charges.by_client and client not in open_clients for client in enrolled),
        "open_reservation_counted_in_full": len(open_clients),
    }


def _has_open(charges: Iterable[Charge]) -> bool:
    return any(charge.settled_steps is None for charge in charges)


def _is_noiseless(charges: Charges) -> bool:
    return any(charge.mechanism.noise_multiplier == 0 for charge in _all(charges))


def _all(charges: Charges) -> Iterable[Charge]:
    return (charge for rounds in charges.by_client.values() for charge in rounds.values())


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
