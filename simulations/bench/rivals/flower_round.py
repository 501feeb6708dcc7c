"""One round of Flower's Ray simulation, in a fresh process: two actors of one core each.

`python -m fedlr.simulations.bench.rivals.flower_round cached|example OUT.safetensors OVERRIDE ...`
"""

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import save_file

from fedlr.adapters.state import LORA_B
from fedlr.config.build import build
from fedlr.config.schema import Experiment, compose_experiment
from fedlr.models.network import AdaptedModel, attach_lora
from fedlr.models.peft_state import read_adapter
from fedlr.simulations.bench.rivals import flower_cached, flower_example
from fedlr.simulations.bench.settings import scratch_root
from fedlr.simulations.bench.worker import by_name

INIT: dict[str, Any] = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200_000_000}
RESOURCES: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
APPS = {"cached": flower_cached.app, "example": flower_example.app}


class Complete(FedAvg):
    """Flower's FedAvg, which goes on with whoever is left; this one ends the run when a client fails."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Average, if every client answered."""
        answers = list(replies)
        if failed := [message for message in answers if message.has_error()]:
            raise RuntimeError(f"{len(failed)} of {len(answers)} clients failed: {failed[0].error}")
        return super().aggregate_train(server_round, answers)


def server(kind: str, overrides: Sequence[str], out: Path, *, scratch: str) -> ServerApp:
    """Return a server of one round over all nodes, which leaves the trained tensors of the mean in a file."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _context: Context) -> None:
        e, model = starting_model(overrides)
        block = read_adapter(model).select(frozenset({LORA_B}))
        first = flower_cached.start_arrays(block) if kind == "cached" else flower_example.start_arrays(model)
        strategy = Complete(fraction_evaluate=0.0, min_train_nodes=e.num_clients, min_available_nodes=e.num_clients)
        told = ConfigRecord({"overrides": list(overrides), "scratch": scratch})
        arrays = strategy.start(grid=grid, initial_arrays=first, num_rounds=1, train_config=told).arrays
        if kind == "cached":
            tensors = flower_cached.unpacked(arrays.to_torch_state_dict()["block"], block)
        else:
            tensors = flower_example.trained_tensors(model, arrays)
        save_file(by_name(tensors), out)

    return app


def starting_model(overrides: Sequence[str]) -> tuple[Experiment, AdaptedModel]:
    """Return the experiment and the model that the first adapter is read from."""
    e = compose_experiment(overrides)
    base = build(e.model.section(), "model", label_names=e.data.section()["labels"], seed=e.seed or 0)
    return e, attach_lora(base, e.adapter, seed=e.seed or 0)


def main(arguments: Sequence[str]) -> int:
    """Run the simulation; a client that fails ends it."""
    kind, out, *overrides = arguments
    with tempfile.TemporaryDirectory(dir=scratch_root(), prefix="ray") as folder:
        run_simulation(
            server_app=server(kind, overrides, Path(out), scratch=folder),
            client_app=APPS[kind],
            num_supernodes=compose_experiment(overrides).num_clients,
            backend_config={"client_resources": RESOURCES, "init_args": {**INIT, "_temp_dir": folder}},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
