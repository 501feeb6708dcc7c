"""Clients of a Flower user, drawn from what they are asked, and runs with them."""

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, Slot
from fedlr.config.schema import CONFIGS
from fedlr.flower import lora_strategy, replies
from fedlr.flower.lora_strategy import LoraStrategy, method_named
from tests.flower.in_process_grid import InProcessGrid
from tests.training.small_models import mutant

Check = Callable[[pytest.MonkeyPatch], None]
NODES = (11, 2**62 + 7, 503, 2**63 + 1)
LAYER, OTHER = "base_model.model.first", "base_model.model.second"
KEYS = {
    f"{LAYER}.lora_A.weight": Slot(LAYER, LORA_A),
    f"{LAYER}.lora_B.weight": Slot(LAYER, LORA_B),
    f"{OTHER}.lora_A.weight": Slot(OTHER, LORA_A),
    f"{OTHER}.lora_B.weight": Slot(OTHER, LORA_B),
    "base_model.model.classifier.weight": Slot("base_model.model.classifier.weight", HEAD),
}
A, B, CLASSIFIER = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", "base_model.model.classifier.weight"
SHAPES = [(3, 6), (5, 3), (2, 4), (4, 2), (2, 5)]
REFUSED = {"fedex_lora", "fedprox", "fedsa_lora", "flora", "la_lora", "renewal", "scaffold"}
REFUSED |= {"hetlora", "rank_budget", "rank_energy", "rank_growth", "drop_lora", "dylora"}
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))


def draw(*what: object, shape: tuple[int, ...]) -> Tensor:
    """Numbers that anyone who knows `what` can draw."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(repr(what).encode())))


def start_tensors(*, zero_B: bool = False) -> dict[str, Tensor]:
    tensors = {key: draw(key, shape=shape) for (key, shape) in zip(KEYS, SHAPES, strict=True)}
    return {key: t * (0.0 if zero_B and "lora_B" in key else 1.0) for key, t in tensors.items()}


def reply_to(message: Message, tensors: Mapping[str, Tensor], metrics: Mapping[str, Any] | None = None) -> Message:
    content = RecordDict({"arrays": ArrayRecord(dict(tensors))})
    if metrics is not None:
        content["metrics"] = MetricRecord(dict(metrics))
    return Message(content, reply_to=message)


def trained(message: Message) -> dict[str, Tensor]:
    """What an honest client makes of a message: every trained array moves by what (node, round, key) draws."""
    config, arrays = message.content["config"], message.content["arrays"].to_torch_state_dict()
    who = (message.metadata.dst_node_id, config["server-round"])
    return {key: arrays[key] + 0.3 * draw(*who, key, shape=tuple(arrays[key].shape)) for key in config["trained-keys"]}


def honest(message: Message) -> Message:
    if message.metadata.message_type == "evaluate":
        return Message(RecordDict({"m": MetricRecord({"num-examples": 2, "accuracy": 0.5})}), reply_to=message)
    return reply_to(message, trained(message), {"num-examples": 10 + message.metadata.dst_node_id % 7, "loss": 1.0})


def run(
    used: LoraStrategy,
    client: Callable[[Message], Any] = honest,
    *,
    num_rounds: int = 1,
    nodes: Sequence[int] | Callable[[], Sequence[int]] = NODES,
    tensors: Mapping[str, Tensor] | None = None,
) -> Result:
    tensors = start_tensors() if tensors is None else tensors
    return used.start(InProcessGrid(client, nodes), ArrayRecord(dict(tensors)), num_rounds=num_rounds, timeout=5)


method_of = functools.cache(method_named)


def quick(name: str = "fedit", **options: Any) -> LoraStrategy:
    """The strategy of a method, of whatever class stands in the module: a mutant's too."""
    return lora_strategy.LoraStrategy(method_of(name), **{"max_wait_s": 0.0, "fraction_evaluate": 0.0, **options})


def failed(message: Message) -> Message:
    return Message(Error(2, "secret of the client"), reply_to=message)


BAD = NODES[2]


def bad_one(bad: Callable[[Message], Any]) -> Callable[[Message], Any]:
    return lambda message: (bad if message.metadata.dst_node_id == BAD else honest)(message)


def same(left: ArrayRecord, right: ArrayRecord) -> bool:
    return list(left) == list(right) and all(left[key].data == right[key].data for key in left)


def catches_mutant(old: str, new: str, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes, and fails where this text of the source is another."""
    check(monkeypatch)
    module = next(module for module in (lora_strategy, replies) if old in inspect.getsource(module))
    changed = mutant(module, (old, new))
    for part in ("LoraStrategy", "ReplyPool", "Weighting", "first_contents", "mean_metrics"):
        if getattr(vars(changed).get(part), "__module__", "") == module.__name__:
            monkeypatch.setattr(lora_strategy, part, vars(changed)[part])
    with pytest.raises((AssertionError, KeyError, OverflowError)):
        check(monkeypatch)
