"""A Flower app as Flower's users write it: FedAvg over the state dict of a LoRA adapter.

It is copied into a Flower bundle and run by Flower's own commands (rivals/flower_deployment.py), so it imports nothing
of ours. A client does no work but to add a constant, from which the mean is known beforehand: all the time is Flower's.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file, save_file

STEP = 1e-3  # what client 0 adds to every number; client 1 adds twice as much, and so on

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Add this client's constant to what came."""
    content: Any = message.content
    tensors = content["arrays"].to_torch_state_dict()
    for tensor in tensors.values():
        tensor += STEP * (1 + int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": 1})
    return Message(content=RecordDict({"arrays": ArrayRecord(tensors), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """Flower's FedAvg, which tells when each round ended, and ends where a client is missing."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Average, and look at the clock."""
        answers = list(replies)
        whole = [answer for answer in answers if not answer.has_error()]
        if len(whole) != self.min_train_nodes:
            raise RuntimeError(f"Expected {self.min_train_nodes} clients in round {server_round}, got {len(whole)}")
        found = super().aggregate_train(server_round, whole)
        self.ends.append(time.monotonic())
        return found

    ends: list[float]


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; leave the arrays and the times in the folder that the run's configuration names."""
    folder, num_clients = Path(str(context.run_config["folder"])), int(context.run_config["num-clients"])
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients)
    strategy.ends = []
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(dict(load_file(folder / "start.safetensors"))),
        num_rounds=int(context.run_config["num-rounds"]),
    )
    save_file(result.arrays.to_torch_state_dict(), folder / "end.safetensors")
    (folder / "ends.partial").write_text(json.dumps(strategy.ends))
    (folder / "ends.partial").replace(folder / "ends.json")
