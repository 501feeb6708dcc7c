"""`fedlr statement --verify`: whether what devices reported is signed with their keys, and by whom it is not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.flower.node_key import canonical_public_key
from fedlr.flower.signed import is_signed

SIMULATED = (
    "unsigned: a simulation; its devices have no keys, and whoever holds the ledger computes the statement again"
)


def is_reported(run_dir: Path) -> bool:
    """Return whether a run's statement is what devices report of ledgers of their own."""
    return stated(run_dir).get("reported_by_clients") is True


def verify(run_dir: Path, roster: Path | None) -> list[str]:
    """Return a line for each client: signed, or not.

    Args:
        run_dir: a finished run.
        roster: the server's, which says whose key is whose; None: a key is only compared with its own signature.

    Raises:
        InputError: a signature does not fit what it stands beside, or its key is not the client's in the roster.
    """
    if not is_reported(run_dir):
        return [SIMULATED]
    keys = None if roster is None else _keys(roster)
    lines, wrong = [], []
    reported = stated(run_dir)
    for client in reported.get("clients", []):
        number, word = client.get("client_id"), client.get("signed")
        if not isinstance(word, Mapping):
            lines.append(f"client {number}: not signed")
        elif why := _why_not(client, word, keys):
            wrong.append(f"client {number}: {why}")
        else:
            lines.append(f"client {number}: signed epsilon {word['epsilon']:g} at delta {word['delta']:g}")
    silent = reported.get("num_clients", 0) - len(reported.get("clients", []))
    if silent:
        lines.append(f"{silent} clients reported nothing")
    if wrong:
        raise InputError(f"Expected the signatures in {run_dir / 'privacy.json'} to be the devices', got {wrong[0]}")
    return lines if keys is not None else [*lines, "whose the keys are was not checked: --roster FILE does"]


def _why_not(client: Mapping[str, Any], word: Mapping[str, Any], keys: Mapping[int, str] | None) -> str | None:
    """Return why a signed word does not bear out what stands beside it; None where it does."""
    number, line = client.get("client_id"), str(word.get("public_key"))
    if not is_signed(word, str(word.get("signature")), line):
        return "a signature that is not its key's, or of another word"
    if word["client_id"] != number or not word["epsilon"] >= client.get("epsilon", float("inf")):
        return "a signed word of another client, or of a smaller epsilon than is stated"
    if keys is not None and keys.get(word["client_id"]) != canonical_public_key(line):
        return "a key that is not the client's in the roster"
    return None


def _keys(roster: Path) -> dict[int, str]:
    try:
        file = json.loads(roster.read_bytes())
        entries = [*file["clients"], *file.get("revoked", ())]
        return {int(entry["client_id"]): canonical_public_key(entry["public_key"]) for entry in reversed(entries)}
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
