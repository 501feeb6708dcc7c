"""`fedlr statement --verify`: whether what devices reported is signed with their keys, and by whom it is not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.flower.node_key import canonical_public_key
from fedlr.flower.signed import ROUNDING, is_signed
from fedlr.privacy.earlier import with_earlier
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.reported import reported_statement
from fedlr.privacy.statement import LEDGER, NEWER, ON_A_GRID, SERVER_LEDGER
from fedlr.runs.directory import CLIENTS, read_identity

SIMULATED = (
    "unsigned: a simulation; its devices have no keys, and whoever holds the ledger computes the statement again"
)


def is_reported(run_dir: Path) -> bool:
    """Return whether a run's statement is what devices report of ledgers of their own; not where a ledger is here."""
    has_ledger = any((run_dir / name).exists() for name in (LEDGER, SERVER_LEDGER))
    return not has_ledger and stated(run_dir).get("reported_by_clients") is True


def verify(run_dir: Path, roster: Path | None) -> list[str]:
    """Return a line for each client: signed, or not; and compare the statement with what follows from its clients.

    A word is a client's last if its row of the ledger is the one that is stated (`head`) and no later update of the
    client was used in the run, as clients.jsonl has it.

    Args:
        run_dir: a finished run.
        roster: the server's, which says whose key is whose; None: a key is only compared with its own signature.

    Raises:
        InputError: a signature does not fit what it stands beside, its key is not the client's in the roster, or the
            statement says something else than follows from what its clients say.
    """
    if not is_reported(run_dir):
        return [SIMULATED]
    keys = None if roster is None else _keys(roster)
    lines, wrong = [], []
    reported = stated(run_dir)
    _require_what_follows(reported, run_dir / "privacy.json")
    experiments, used = _experiments(reported, run_dir), _last_used(run_dir)
    for client in reported["clients"]:
        number, word = client.get("client_id"), client.get("signed")
        if not isinstance(word, Mapping):
            lines.append(f"client {number}: not signed")
        elif why := _why_not(client, word, keys, used or {}, delta=reported["delta"], experiments=experiments):
            wrong.append(f"client {number}: {why}")
        else:
            lines.append(f"client {number}: signed epsilon {word['epsilon']:g} at delta {word['delta']:g}")
    silent = reported["num_clients"] - len(reported["clients"])
    if silent:
        lines.append(f"{silent} clients reported nothing")
    if wrong:
        raise InputError(f"Expected the signatures in {run_dir / 'privacy.json'} to be the devices', got {wrong[0]}")
    if used is None:
        lines.append(f"whether these are the last words was not checked: there is no {run_dir / CLIENTS}")
    return lines if keys is not None else [*lines, "whose the keys are was not checked: --roster FILE does"]


def _last_used(run_dir: Path) -> dict[int, int] | None:
    """Return the last round in which each client's update was used; None where the run has no lines of clients."""
    path = run_dir / CLIENTS
    if not path.exists():
        return None
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return {int(row["client_id"]): int(row["round_index"]) for row in rows if row["status"] == "trained"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"Expected a line for each client and round in {path}, got {error!r:.200}") from None


def _require_what_follows(told: Mapping[str, Any], path: Path) -> None:
    """Raise InputError unless a statement is what its clients, delta, mechanism and randomness make it."""
    try:
        if not isinstance(told["delta"], float):
            raise TypeError(f"delta={told['delta']!r:.40}")
        steps: dict[str, Any] = {key: value for key, value in told["mechanism"].items() if key != "name"}
        if told.get("floating_point") == ON_A_GRID:
            steps["release_noise"] = "grid"
        clients = {client["client_id"]: client for client in told["clients"]}
        found = reported_statement(
            told["delta"],
            {number: float(client["epsilon"]) for number, client in clients.items()},
            {number: client["head"] for number, client in clients.items() if client["head"] is not None},
            num_clients=told["num_clients"],
            randomness=told["randomness"]["kind"],
            mechanism=Mechanism(**steps),
            signed={number: client["signed"] for number, client in clients.items() if client.get("signed") is not None},
        )
        found = with_earlier(found, told.get("started_from"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"Expected what devices report in {path}, got {error!r:.200}") from None
    for client, entry in zip(found["clients"], told["clients"], strict=False):
        if "signed" not in entry:  # of an earlier version
            client.pop("signed")
    different = sorted(key for key in found if (key not in NEWER or key in told) and found[key] != told.get(key))
    if different:
        raise InputError(
            f"Expected {path} to say what follows from its clients, got other values of {', '.join(different)}"
        )


def _experiments(reported: Mapping[str, Any], run_dir: Path) -> set[Any]:
    """Return the experiment that signed words may be of: the run's, where that is known; else the words', if one."""
    identity = read_identity(run_dir)
    if identity is not None:
        return {identity["experiment_id"]}
    words = [client.get("signed") for client in reported["clients"]]
    found = {str(word.get("experiment_id")) for word in words if isinstance(word, Mapping)}
    return found if len(found) == 1 else set()


def _why_not(
    client: Mapping[str, Any],
    word: Mapping[str, Any],
    keys: Mapping[int, set[str]] | None,
    used: Mapping[int, int],
    *,
    delta: float,
    experiments: set[Any],
) -> str | None:
    """Return why a signed word does not bear out what stands beside it; None where it does."""
    number, line = client.get("client_id"), str(word.get("public_key"))
    if not is_signed(word, str(word.get("signature")), line):
        return "a signature that is not its key's, or of another word"
    lowest = client["epsilon"] * (1 - ROUNDING) if isinstance(client["epsilon"], float) else client["epsilon"]
    if word["client_id"] != number or not lowest <= word["epsilon"] <= client["epsilon"]:
        return "a signed word of another client, or of another epsilon than is stated"
    if not isinstance(word["delta"], float) or not word["delta"] <= delta:  # a device's own may be the smaller one
        return "a signed word of a larger delta than is stated"
    if word["experiment_id"] not in experiments:
        return "a signed word of another run"
    if word["ledger_head"] != client["head"]:
        return "a signed word of another row of its ledger than is stated"
    if word["round_index"] < used.get(word["client_id"], 0):
        return f"a signed word of round {word['round_index']}, and not its last: round {used[number]} used its update"
    if keys is not None and canonical_public_key(line) not in keys.get(word["client_id"], ()):
        return "a key that is not the client's in the roster"
    return None


def _keys(roster: Path) -> dict[int, set[str]]:
    """Return the keys of each client: the enrolled one, and those that were replaced or revoked."""
    found: dict[int, set[str]] = {}
    try:
        file = json.loads(roster.read_bytes())
        for entry in (*file["clients"], *file.get("revoked", ())):
            found.setdefault(int(entry["client_id"]), set()).add(canonical_public_key(entry["public_key"]))
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"Expected the roster of a server in {roster}, got {error!s:.200}") from None


def stated(run_dir: Path) -> dict[str, Any]:
    """Return privacy.json of a run as it stands."""
    path = run_dir / "privacy.json"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Expected a privacy statement in {path}, got {error!r:.200}") from None
    if not isinstance(found, dict):
        raise InputError(f"Expected a privacy statement in {path}, got {type(found).__name__}")
    return found
