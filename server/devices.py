"""`fedlr server devices`: which devices the SuperLink sees; it fails when that, or its database, does not answer.

Made for people and for the watchdog of deploy/systemd: /health answers also when the database is locked.
"""

from dataclasses import dataclass
from pathlib import Path

from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.constant import NodeStatus

from fedlr.runs.commands import Options, command
from fedlr.server.enrol import SuperLink, control_of
from fedlr.server.roster import load_roster


@dataclass(frozen=True)
class Device:
    """A key that is let in, as the SuperLink sees it."""

    node_id: int
    name: str
    is_online: bool
    last_seen: str  # when it last came or left, ISO 8601; "" for never


@command
def devices(arguments: list[str]) -> None:
    """List the enrolled devices: fedlr server devices --superlink HOST:PORT --superlink-ca FILE [--roster FILE]

    With the roster also their client numbers, and those of the roster that the SuperLink does not know.
    """
    options = Options()
    options.add_argument("--superlink", required=True)
    options.add_argument("--superlink-ca", type=Path, required=True)
    options.add_argument("--roster", type=Path)
    chosen = options.parse_args(arguments)
    roster = load_roster(chosen.roster) if chosen.roster else None
    found = list_devices(SuperLink(chosen.superlink, chosen.superlink_ca))
    numbers = roster.client_of_node if roster else {}
    for device in found:
        number = f"client {numbers[device.node_id]}" if device.node_id in numbers else "no client of the roster"
        state = "online" if device.is_online else f"offline, last seen {device.last_seen or 'never'}"
        print(f"{device.name or device.node_id}: " + (f"{number}, " if roster else "") + state)
    for entry in roster.clients if roster else ():
        if entry.node_id not in {device.node_id for device in found}:
            print(
                f"{entry.name}: client {entry.client_id}, unknown to the SuperLink; fedlr server enrol --all mends it"
            )
    print(f"{sum(device.is_online for device in found)} of {len(found)} online")


def list_devices(superlink: SuperLink) -> list[Device]:
    """Ask the SuperLink for the keys that are let in.

    Raises:
        InputError: when it does not answer.
    """
    with control_of(superlink) as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return [
        Device(
            node_id=int(node.node_id),
            name=str(node.name),
            is_online=node.status == NodeStatus.ONLINE,
            last_seen=max(str(node.last_activated_at), str(node.last_deactivated_at)),
        )
        for node in nodes
        if node.status != NodeStatus.UNREGISTERED
    ]
