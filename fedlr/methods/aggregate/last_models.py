"""The mean of the models of the last rounds: what is evaluated and exported, never what is broadcast.

Averages the noise of rounds and the swing from cohort to cohort (Polyak and Juditsky 1992, iterate averaging). It reads
released models only, so it is post-processing: no privacy is spent.
Legend: D out_features, K in_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlr.adapters.low_rank import LowRankSum
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, LoraFactors, Slot

PAST = "past-"  # past-1 in the server's memory is the model of the round before, and so on


def with_past(before: AdapterState, after: AdapterState, *, num_rounds: int, average_last: int) -> AdapterState:
    """Return a round's adapter that remembers the models before it, as many as an average of `average_last` needs.

    Args:
        before: the adapter that the round began with, which remembers its own past.
        after: what the round made of it.
        num_rounds: finished before this round; the start is nobody's model, and no part of any mean.
        average_last: models in a mean, this one included; 1 remembers nothing.
    """
    if average_last == 1:
        return after
    past = [dict(before.tensors), *past_models(before)] if num_rounds else []
    named = {f"{PAST}{age}": tensors for age, tensors in enumerate(past[: average_last - 1], start=1)}
    other = {name: tensors for name, tensors in after.memory.items() if not name.startswith(PAST)}
    return replace(after, memory={**other, **named})


def past_models(adapter: AdapterState) -> list[Mapping[Slot, Tensor]]:
    """Return the tensors of the models that an adapter remembers, the latest first."""
    num_past = sum(name.startswith(PAST) for name in adapter.memory)
    return [adapter.memory[f"{PAST}{age}"] for age in range(1, num_past + 1)]


def mean_model(adapter: AdapterState) -> AdapterState:
    """Return the mean of an adapter and the models it remembers; without any the adapter itself.

    delta_W of a layer is the mean of the products, re-factorised to the rank by an SVD: exact where the row spaces
    agree, as where lora_A is frozen or FedSVD's, else the best approximation of that rank. A lora_A that all have is
    kept, and lora_B averaged. Heads are averaged. What is equal in all is kept to the bit.
    """
    models = [adapter.tensors, *past_models(adapter)]
    if len(models) == 1:
        return adapter
    means = {slot: _mean([one[slot] for one in models]) for slot in adapter.tensors if slot.role != LORA_A}
    products: dict[str, LoraFactors] = {}
    for path, own in adapter.factors().items():
        layers = [LoraFactors(one[Slot(path, LORA_A)], one[Slot(path, LORA_B)]) for one in models]
        if not all(torch.equal(layer.lora_A, own.lora_A) for layer in layers):
            products[path] = _mean_product(layers, own)
    averaged = replace(adapter.with_tensors(means), memory={})
    return averaged.with_factors(products)


def _mean(values: list[Tensor]) -> Tensor:
    if all(torch.equal(value, values[0]) for value in values[1:]):
        return values[0]
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)


def _mean_product(layers: list[LoraFactors], own: LoraFactors) -> LoraFactors:
    (rank, in_features), out_features = own.lora_A.shape, len(own.lora_B)
    total = LowRankSum(max_rank=min(sum(len(layer.lora_A) for layer in layers), in_features, out_features))
    for layer in layers:
        total.add(layer, 1 / len(layers))
    best = total.truncated(rank, like=own.lora_A)
    return LoraFactors(best.lora_A.to(own.lora_A.dtype), best.lora_B.to(own.lora_B.dtype))
