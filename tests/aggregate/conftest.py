"""A small federation of random updates for the aggregators' tests."""

from collections.abc import Callable, Sequence

import pytest
import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, AdapterState, ClientUpdate, Slot

SHAPES = {"layer.0": (12, 20), "layer.1": (9, 7)}
RANK = 3
WEIGHTS = (1.0, 2.0, 5.0, 8.0)

Federation = tuple[AdapterState, list[ClientUpdate]]


@pytest.fixture
def federation() -> Callable[..., Federation]:
    """Return a maker of (adapter, updates): two layers and a head, clients around a common solution."""

    def make(
        *trained: str,
        weights: Sequence[float] = WEIGHTS,
        spread: float = 0.5,
        size: float = 1.0,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Federation:
        generator = torch.Generator().manual_seed(seed)

        def normal(shape: Sequence[int], std: float) -> torch.Tensor:
            return std * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

        tensors = {Slot("head.weight", HEAD): normal((2, 9), 1.0)}
        for path, (out, into) in SHAPES.items():
            tensors[Slot(path, LORA_A)] = normal((RANK, into), into**-0.5)
            tensors[Slot(path, LORA_B)] = normal((out, RANK), size)
        updates = []
        for client_id, weight in enumerate(weights):
            new = {s: t + normal(t.shape, spread * float(t.std())) for s, t in tensors.items() if s.role in trained}
            new = {slot: tensor.to(dtype) for slot, tensor in new.items()}
            updates.append(ClientUpdate(client_id, new, weight, base_round=0))
        return AdapterState({slot: tensor.to(dtype) for slot, tensor in tensors.items()}, scale=0.5), updates

    return make
