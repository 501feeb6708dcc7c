"""The other end of `contestants.Process`: one federation that trains what it is told, a JSON line at a time.

`python -m fedlr.simulations.bench.worker SCRATCH` reads commands from standard input and answers on standard output.
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedlr.adapters.state import ClientUpdate, Slot
from fedlr.config.schema import compose_experiment
from fedlr.rounds.round import run_round
from fedlr.simulations.bench.memory_use import peak_mb, reset_peak
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool


class Session:
    """A federation and its pool, over the commands that it was told; all through the project's own front door."""

    def __init__(self, scratch: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=scratch))
        self._federation: Federation | None = None
        self._pool: Any = None

    def assemble(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Compose, assemble and make the pool; say what was built."""
        torch.set_num_threads(1)
        started = time.perf_counter()
        experiment = compose_experiment(list(overrides))
        self._federation = f = assemble(experiment, seed=experiment.seed or 0)
        self._pool = make_pool(f, create_ledger(f, self.folder / "ledger.jsonl"))
        frozen = [p for p in f.working.parameters() if not p.requires_grad and p.is_floating_point()]
        largest = max(frozen, key=torch.Tensor.numel)
        return {
            "seconds": time.perf_counter() - started,
            "pool": type(self._pool).__name__,
            "engine": experiment.trainer.engine,
            "base_dtype": str(largest.dtype).removeprefix("torch."),
            "num_workers": experiment.runtime.num_workers,
            "torch_threads": torch.get_num_threads(),
            "unit": unit(f),
            "mean_tokens": float(f.clients[0].table.lengths.mean()),
            "num_clients": len(f.clients),
        }

    def train(self, round_index: int, clients: Sequence[int], keep: str = "") -> dict[str, Any]:
        """Train clients from the start adapter; every one must come back with an update."""
        f = self.federation
        task = f.request(round_index)
        started = time.perf_counter()
        outcomes = list(self._pool.train(task, list(clients)))
        seconds = time.perf_counter() - started
        if lost := [outcome for outcome in outcomes if not isinstance(outcome, ClientUpdate)]:
            raise RuntimeError(f"Expected an update from every client, got {lost[0]}")
        if sorted(outcome.client_id for outcome in outcomes) != sorted(clients):
            raise RuntimeError("Expected one update from every client, got others")
        for outcome in outcomes if keep else []:
            save_file(by_name(outcome.tensors), self.folder / f"{keep}-{outcome.client_id}.safetensors")
        return {"seconds": seconds}

    def round(self, clients: int, keep: str = "") -> dict[str, Any]:
        """Run one whole round with the first so many clients: training, checks, aggregation; keep the mean there."""
        f = self.federation
        state, diagnostics = run_round(f.start, range(clients), pool=self._pool, method=f.method)
        if len(diagnostics.trained) != clients:
            raise RuntimeError(f"Expected {clients} clients to train, got {len(diagnostics.trained)}")
        if keep:
            save_file(by_name(state.adapter.select(f.request().block)), keep)
        return {"seconds": diagnostics.train_s + diagnostics.aggregate_s}

    def peak(self, reset: bool) -> dict[str, Any]:
        """Return the peak resident memory since the last reset, in MB."""
        peak = peak_mb()
        if reset:
            reset_peak()
        return {"peak_mb": peak}

    @property
    def federation(self) -> Federation:
        """Return what `assemble` built."""
        if self._federation is None:
            raise RuntimeError("Expected `assemble` first")
        return self._federation

    def close(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.close()


COMMANDS = {name: getattr(Session, name) for name in ("assemble", "train", "round", "peak")}


def unit(federation: Federation) -> float:
    """Return how far one clipped example moves an adapter in one round of plain SGD: lr * C / divisor."""
    optimizer: Any = federation.training.optimizer([torch.nn.Parameter(torch.zeros(1))])
    bound = 1.0 if federation.mechanism is None else federation.mechanism.max_grad_norm
    return float(optimizer.defaults["lr"]) * bound / federation.training.divisor


def by_name(tensors: Mapping[Slot, Tensor]) -> dict[str, Tensor]:
    """Return tensors by a name that `contestants.by_slot` reads."""
    return {f"{slot.path}|{slot.role}": tensor.contiguous() for slot, tensor in tensors.items()}


def serve(session: Session, commands: TextIO, answers: TextIO) -> int:
    """Answer every line until there are no more, or one fails."""
    for line in commands:
        arguments = json.loads(line)
        try:
            answer = COMMANDS[arguments.pop("do")](session, **arguments)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            return 1
    return 0


def main(arguments: Sequence[str]) -> int:
    """Serve standard input; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = Session(Path(arguments[0]))
    try:
        return serve(session, sys.stdin, answers)
    finally:
        session.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
