"""Private LoRA over Flower's message API, the best that can be made of an actor: everything is built once and kept.

Federation, model and Opacus hooks live in a global of the module, so each Ray actor builds them once; an adapter
travels as one array. Sampling, clipping and noise come from the same streams as ours, so that results can be compared.
"""

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.config.schema import compose_experiment
from fedlr.rounds.round import RoundRequest
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client on the federation that this actor keeps."""
    overrides, arrays, scratch = content(message)
    federation, pool = kept(overrides, scratch)
    block = federation.request().block
    task = RoundRequest(0, unpacked(arrays["block"], federation.start.adapter.select(block)), block)
    (update,) = pool.train(task, [int(context.node_config["partition-id"])])
    if not isinstance(update, ClientUpdate):
        raise RuntimeError(f"Expected an update, got {update}")
    return reply(message, ArrayRecord({"block": packed(update.tensors)}))


@cache
def kept(overrides: tuple[str, ...], scratch: str) -> tuple[Federation, Any]:
    """Return this process's federation and its pool, whose ledger is in a folder of its own."""
    torch.set_num_threads(1)
    experiment = compose_experiment(overrides)
    federation = assemble(experiment, seed=experiment.seed or 0)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    return federation, make_pool(federation, create_ledger(federation, folder / "ledger.jsonl"))


def start_arrays(block: Mapping[Slot, Tensor]) -> ArrayRecord:
    """Return what the server sends in the first round: the trained tensors as one array."""
    return ArrayRecord({"block": packed(block)})


def packed(tensors: Mapping[Slot, Tensor]) -> Tensor:
    """Return all tensors as one, slot after slot."""
    return torch.cat([tensors[slot].flatten() for slot in sorted(tensors)])


def unpacked(flat: Tensor, shapes: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    """Return the tensors of `packed`, shaped as those of `shapes`."""
    slots = sorted(shapes)
    parts = flat.split([shapes[slot].numel() for slot in slots])
    return {slot: part.view_as(shapes[slot]) for slot, part in zip(slots, parts, strict=True)}


def content(message: Message) -> tuple[tuple[str, ...], dict[str, Tensor], str]:
    """Return what the server said: the experiment's overrides, the tensors, and a folder for scratch files."""
    told: Any = message.content
    return tuple(told["config"]["overrides"]), told["arrays"].to_torch_state_dict(), str(told["config"]["scratch"])


def reply(message: Message, arrays: ArrayRecord) -> Message:
    """Return the reply that Flower's FedAvg expects; every client counts the same."""
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
