"""Which node is which client: by the roster of registered keys, or, in Flower's simulation, by partition."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlr.flower.records import facts_of
from fedlr.server.roster import load_roster

QUERY, PARTITION = "query", "partition_id"


class Nodes(Protocol):
    """Which node is which client, now."""

    def online(self) -> Mapping[int, int]:
        """Return the node id of every client that can be reached."""
        ...


class RosterNodes:
    """Clients by their registered keys: the SuperLink knows a node by its key, the roster knows whose it is."""

    def __init__(self, grid: Grid, roster: Path) -> None:
        self._grid, self._roster = grid, roster

    def members(self) -> frozenset[int]:
        """Return the numbers of all enrolled clients, connected or not; nobody who was revoked."""
        return frozenset(load_roster(self._roster).client_of_node.values())

    def online(self) -> Mapping[int, int]:
        """Return the node id of every enrolled client that is connected; the roster is read anew each time."""
        client_of_node = load_roster(self._roster).client_of_node
        return {client_of_node[node]: node for node in self._grid.get_node_ids() if node in client_of_node}


class PartitionNodes:
    """Clients by what their nodes say: nobody can register anything in a simulation, and everybody is ourselves."""

    def __init__(self, grid: Grid, *, num_clients: int, patience_s: float = 120.0) -> None:
        self._grid = grid
        deadline = time.monotonic() + patience_s
        while len(nodes := list(grid.get_node_ids())) < num_clients and time.monotonic() < deadline:
            time.sleep(0.1)
        asked = [Message(RecordDict(), node, QUERY) for node in nodes]
        replies = grid.send_and_receive(asked, timeout=patience_s)
        self._nodes = {
            int(facts_of(reply.content)[PARTITION]): reply.metadata.src_node_id
            for reply in replies
            if not reply.has_error()
        }

    def online(self) -> Mapping[int, int]:
        """Return all nodes."""
        return self._nodes
