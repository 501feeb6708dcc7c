"""`fedlr server enrol` and `revoke`: which keys the SuperLink lets in, and the roster that says who they are.

Both use Flower's Control API, which the proxy hides, so they run on the server's machine. The SuperLink remembers a
revoked key for ever: a device that comes back needs a new one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedlr.errors import InputError
from fedlr.flower.node_key import load_public_key
from fedlr.runs.commands import Options, command
from fedlr.server.roster import Roster, load_roster, locked, save_roster

UNKNOWN_NODE = 2**64 - 1


@dataclass(frozen=True)
class SuperLink:
    """The Control API of a SuperLink: HOST:PORT on loopback, and the file of the authority that signed for it."""

    address: str
    root_certificates: Path


@command
def enrol(arguments: list[str]) -> None:
    """Let a device in: fedlr server enrol --superlink HOST:PORT --superlink-ca FILE --roster FILE --name NAME KEY.pub

    KEY.pub is the file that `fedlr client key` made on the device. The device gets the next client number.
    With --replace NAME instead of --name NAME: a new key for a device, enrolled or revoked; it keeps name and number,
    and its old key is shut out. What its old ledger says was spent on its data stays spent: move the ledger along.
    With --all instead of --name and KEY.pub: everybody in the roster again, after the SuperLink lost its database.
    """
    options = _options()
    options.add_argument("--name")
    options.add_argument("--replace")
    options.add_argument("--all", action="store_true")
    options.add_argument("public_key", type=Path, nargs="?")
    chosen = options.parse_args(arguments)
    if chosen.name is not None and chosen.replace is not None:
        raise InputError("Expected --name or --replace, got both")
    name = chosen.replace or chosen.name
    given = (name is not None, chosen.public_key is not None)
    if given != ((False, False) if chosen.all else (True, True)):
        raise InputError("Expected --name NAME or --replace NAME and KEY.pub, or --all alone; --help shows the options")
    superlink = SuperLink(chosen.superlink, chosen.superlink_ca)
    with locked(chosen.roster):
        if chosen.all:
            roster = enrol_again(superlink, load_roster(chosen.roster))
            save_roster(roster, chosen.roster)
            print(f"{len(roster.clients)} devices are enrolled in {superlink.address}, {len(roster.revoked)} are not")
            return
        roster = load_roster(chosen.roster) if chosen.roster.exists() else Roster()
        add = enrol_one if chosen.replace is None else enrol_instead
        roster = add(superlink, roster, name, _read_line(chosen.public_key))
        save_roster(roster, chosen.roster)
    entry = roster.named(name)
    print(f"{entry.name} is client {entry.client_id}, node {entry.node_id}, in {chosen.roster}")


@command
def revoke(arguments: list[str]) -> None:
    """Shut a device out: fedlr server revoke --superlink HOST:PORT --superlink-ca FILE --roster FILE --name NAME

    The SuperLink refuses its key from the next request on, for ever. Its client number is not given again.
    """
    options = _options()
    options.add_argument("--name", required=True)
    chosen = options.parse_args(arguments)
    with locked(chosen.roster):
        roster = load_roster(chosen.roster)
        entry = roster.named(chosen.name)
        unregister(SuperLink(chosen.superlink, chosen.superlink_ca), [entry.node_id])
        save_roster(roster.without_client(chosen.name), chosen.roster)
    print(f"{chosen.name} (client {entry.client_id}) is shut out")


def enrol_one(superlink: SuperLink, roster: Roster, name: str, public_key: str) -> Roster:
    """Return the roster with one more device, whose key the SuperLink then lets in.

    Raises:
        InputError: for a name or key that is taken or no good, before the SuperLink hears of it.
    """
    roster.with_client(name, public_key, node_id=UNKNOWN_NODE)
    (node_id,) = register(superlink, [public_key], names=[name])
    return roster.with_client(name, public_key, node_id)


def enrol_instead(superlink: SuperLink, roster: Roster, name: str, public_key: str) -> Roster:
    """Return the roster with a new key under the name and number of a device, whose old key is shut out.

    Raises:
        InputError: for a name that never was, or a key that is taken or no good, before the SuperLink hears of it.
    """
    roster.with_replacement(name, public_key, node_id=UNKNOWN_NODE)
    old = roster.to_replace(name)
    (node_id,) = register(superlink, [public_key], names=[name])
    unregister(superlink, [old.node_id])
    return roster.with_replacement(name, public_key, node_id)


def enrol_again(superlink: SuperLink, roster: Roster) -> Roster:
    """Return the roster with the node ids of a SuperLink that may know none of its keys any more."""
    keys, names = [e.public_key for e in roster.clients], [e.name for e in roster.clients]
    node_ids = register(superlink, keys, names=names)
    entries = zip(roster.clients, node_ids, strict=True)
    return Roster(tuple(e.model_copy(update={"node_id": node_id}) for e, node_id in entries), roster.revoked)


def register(superlink: SuperLink, public_keys: Sequence[str], *, names: Sequence[str] = ()) -> list[int]:
    """Let keys in; return the node id of each.

    A key that is registered already keeps its node id, so a call that was cut off can be repeated.

    Args:
        public_keys: lines of .pub files.
        names: of the devices, in the SuperLink's own list; none if empty.

    Raises:
        InputError: for a key that is no EC P-384 key or was revoked, or when the SuperLink cannot be reached.
    """
    keys = [public_key_to_bytes(load_public_key(line)) for line in public_keys]
    with control_of(superlink) as control:
        known = {key: node_id for node_id, key in _registered(control).items()}
        node_ids = []
        for key, name in zip(keys, names or [""] * len(keys), strict=True):
            request = RegisterNodeRequest(public_key=key, name=name or None)
            node_ids.append(known.get(key) or int(control.RegisterNode(request).node_id))
    return node_ids


def unregister(superlink: SuperLink, node_ids: Sequence[int]) -> None:
    """Shut nodes out; those that the SuperLink has shut out already stay so.

    Raises:
        InputError: when the SuperLink cannot be reached or refuses.
    """
    with control_of(superlink) as control:
        for node_id in set(node_ids) & _registered(control).keys():
            control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def _registered(control: ControlHttpClient) -> dict[int, bytes]:
    """Public keys (PEM) that are let in, by node id."""
    nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return {int(node.node_id): bytes(node.public_key) for node in nodes if node.status != NodeStatus.UNREGISTERED}


@contextmanager
def control_of(superlink: SuperLink) -> Iterator[ControlHttpClient]:
    """Open the Control API; what goes wrong with it is an InputError."""
    try:
        certificates = superlink.root_certificates.read_bytes()
        with ControlHttpClient.from_server_address(superlink.address, False, certificates, interceptors=[]) as control:
            yield control
    except httpx.HTTPStatusError as error:
        refusal = FlowerError.from_json(error.response.text)
        if refusal is not None and refusal.code == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
            raise InputError("Expected a key that was never revoked, got one that was; make a new one") from None
        what = f"code {refusal.code}: {refusal.message}" if refusal else f"HTTP {error.response.status_code}"
        raise InputError(f"Expected the Control API on {superlink.address} to agree, got {what}") from None
    except (httpx.HTTPError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Expected a SuperLink on {superlink.address}, got {error}; is it running here?") from None


def _options() -> Options:
    options = Options()
    options.add_argument("--superlink", required=True)
    options.add_argument("--superlink-ca", type=Path, required=True)
    options.add_argument("--roster", type=Path, required=True)
    return options


def _read_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Expected a public key in {path}, got {error}") from None
