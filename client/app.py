"""The device as a Flower ClientApp: for Flower's simulation, a stock SuperNode, and our own node (client/node.py).

A node says which settings are its own: `client-yaml` of its node config, or `FEDLR_CLIENT` in its environment; in
Flower's simulation `FEDLR_CLIENTS` names a folder of `client-0.yaml`, `client-1.yaml` and so on, by partition.
"""

import os
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlr.client.device import Device
from fedlr.client.node import FAILED, answer
from fedlr.client.settings import load_settings
from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.flower.records import to_record
from fedlr.runs.commands import quiet_libraries

PARTITION = "partition_id"  # in the answer to a query
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a request for a round; what goes wrong stays on the device, in its log."""
    try:
        return answer(resident(settings_path(context)), message, say=print)
    except Exception as error:  # a stock SuperNode would send its text, which names files and labels
        print(f"no answer: {type(error).__name__}: {error}", flush=True)
        return Message(FAILED, reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which partition this node is, in Flower's simulation."""
    partition = context.node_config.get("partition-id")
    return Message(to_record({}, {PARTITION: partition}), reply_to=message)


def settings_path(context: Context) -> Path:
    """Return where this node's settings are.

    Raises:
        InputError: nobody said.
    """
    if (folder := os.environ.get("FEDLR_CLIENTS")) and "partition-id" in context.node_config:
        return Path(folder) / f"client-{context.node_config['partition-id']}.yaml"
    given = context.node_config.get("client-yaml") or os.environ.get("FEDLR_CLIENT")
    if not given:
        raise InputError("Expected client-yaml=FILE in --node-config, or FEDLR_CLIENT=FILE, got neither")
    return Path(str(given))


@cache
def resident(path: Path) -> Device:
    """Return the device of these settings: one a process, for as long as it lives."""
    quiet_libraries()
    go_offline(True)
    return Device(load_settings(path), say=lambda line: print(f"{path.stem}: {line}", flush=True))
