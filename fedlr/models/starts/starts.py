"""The adapter before round 0: as it was drawn, or made by the server from weights or public examples, or read.

Some starts have a product B A that is not zero, and take it out of the base to leave the function as it was: PiSSA's
base is W - scale * B A. Here no tensor of the base changes. The adapter carries side = -B A, which is merged into a
copy of W (`models.base_delta`), goes down to clients as all sides do, and is folded into an export as further ranks.
Clients are given all of it and compute none of it: the last bits of a decomposition are a machine's own.

Public examples pass the model without noise: their activations and gradients are in the start, and no epsilon covers
them (`fedlr.data.public`).
Legend: D out_features, K in_features, T tokens.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlr.adapters.state import AdapterState, LoraFactors
from fedlr.data.public import read_public
from fedlr.errors import InputError
from fedlr.models.adapter_config import FROM_LABELS, FROM_PUBLIC, FROM_WEIGHTS, WITH_SIDE, AdapterConfig
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import adapted_layers, read_adapter
from fedlr.models.starts.factors import corda_factors, eva_factors, lora_ga_factors, olora_factors, pissa_factors
from fedlr.models.starts.from_base import watching, weight_of
from fedlr.models.starts.silver_bullet import core_layers, write_bases
from fedlr.models.starts.start_from import read_start
from fedlr.models.zero_head import zero_layers
from fedlr.tasks.examples import Examples, micro_batches
from fedlr.tasks.task import Task

TOKEN_BUDGET = 1024  # of one pass over public texts
Factors = Callable[[str, Tensor], LoraFactors]  # of a layer, by its path and weight (D, K)


@dataclass(frozen=True)
class Start:
    """The adapter before round 0, and where it is from if that is public examples: a sentence, else None."""

    adapter: AdapterState
    origin: str | None = None
    earlier: Mapping[str, Any] | None = None  # what its card says of the run that it is from (fedlr.privacy.earlier)


def start_of(
    config: AdapterConfig,
    base: BaseModel,
    model: AdaptedModel,
    *,
    task: Task,
    private: Mapping[str, Any],
    max_length: int,
    seed: int,
    private_texts: Collection[str] = frozenset(),
) -> Start:
    """Return the adapter that an experiment starts from.

    Args:
        config: where the factors go, and how they start.
        base: the model's, for its tokenizer.
        model: as `fedlr.models.tuners.attach` made it, on the CPU; only bases of lora_sb are written into it.
        task: reads public examples, and says how wrong the model is on them.
        private: the configuration's section `data`, which names no public table.
        max_length: tokens of a text, at most.
        seed: of the public randomness: it draws the public examples.
        private_texts: those of the clients, where they are known here; a public table holds none of them.

    Raises:
        InputError: for a public table that cannot be used, or is the private one, and numbers that are not finite.
    """
    if config.start_from is not None:
        adapter, earlier = read_start(Path(config.start_from).expanduser(), base, model)
        return Start(adapter, earlier=earlier)
    name, drawn = config.init_lora_weights, read_adapter(model)
    if name in FROM_WEIGHTS:
        rank, scale = config.rank, drawn.scale
        formulas = {"pissa": lambda W: pissa_factors(W, rank, scale=scale), "olora": lambda W: olora_factors(W, rank)}
        return Start(with_start(model, drawn, name, lambda _, weight: formulas[name](weight)))
    if name not in FROM_PUBLIC or config.public is None:
        return Start(drawn)
    if task.name != "text_classification":
        raise InputError(
            f"Expected adapter.init_lora_weights to read no public texts for task={task.name}, got {name}; set "
            "adapter.init_lora_weights=orthonormal"
        )
    if name in FROM_LABELS and zero_layers(model):
        raise InputError(
            f"Expected model.head_std above 0 for adapter.init_lora_weights={name}, which reads gradients through the "
            "head, got 0: a head of zeros gives none; set model.head_std=0.1"
        )
    num_classes = len(base.network.config.id2label or {})
    public = read_public(config.public, private, num_classes=num_classes, seed=seed, private_texts=private_texts)
    texts = task.encode(base, public.data, max_length=max_length)
    origin = public.origin(f"adapter.init_lora_weights={name}")
    if name == "lora_sb":
        gradients = weight_gradients(model, core_layers(model), texts, task=task)
        write_bases(model, gradients, rank=config.rank, learning_rate=config.public.learning_rate)
        return Start(read_adapter(model), origin)
    return Start(
        with_start(model, drawn, name, _from_texts(name, model, texts, config.rank, drawn.scale, task=task)), origin
    )


def with_start(model: nn.Module, drawn: AdapterState, name: str, factors: Factors) -> AdapterState:
    """Return an adapter with the factors of every layer, and the side that takes their product back where it is not 0.

    Raises:
        InputError: numbers that are not finite.
    """
    started = {}
    for path, layer in adapted_layers(model).items():
        weight_DK, like = weight_of(layer.get_base_layer()), drawn.factors()[path]
        new = factors(path, _finite(name, path, weight_DK))
        started[path] = LoraFactors(new.lora_A.to(like.lora_A.dtype), new.lora_B.to(like.lora_B.dtype))
    adapter = drawn.with_factors({path: _contiguous(layer) for path, layer in started.items()})
    if name not in WITH_SIDE:
        return adapter
    # Of the rounded factors: what is taken back is what was given, to the bit.
    return replace(adapter, side={path: LoraFactors(f.lora_A, -f.lora_B) for path, f in adapter.factors().items()})


def _from_texts(name: str, model: AdaptedModel, texts: Examples, rank: int, scale: float, *, task: Task) -> Factors:
    """Return the formula of a start that reads public texts, after it has read them."""
    if name == "lora_ga":
        layers = {path: layer.get_base_layer() for path, layer in adapted_layers(model).items()}
        gradients = weight_gradients(model, layers, texts, task=task)
        return lambda path, _: lora_ga_factors(_finite(name, path, gradients[path]), rank)
    if name == "eva":
        centred = centred_moments(model, texts)
        return lambda path, weight: eva_factors(_finite(name, path, centred[path]), rank, out_features=len(weight))
    moments = mean_moments(model, texts)
    return lambda path, weight: corda_factors(
        weight, _finite(name, path, moments[path]), rank, scale=scale, strongest=name == "corda_ipm"
    )


@torch.no_grad()
def entering(model: AdaptedModel, texts: Examples) -> Iterator[tuple[str, Tensor]]:
    """Yield what enters each adapted layer, text by text: a path and (T, K) float64, without padding.

    A layer behind the choice of one token sees one row a text.
    """
    with watching(model) as entered:
        for rows in micro_batches(texts.lengths, range(len(texts)), TOKEN_BUDGET):
            inputs = texts.batch(rows).inputs
            model(**inputs)
            for path, x in entered.items():
                for text, is_token in zip(x, inputs["attention_mask"].bool(), strict=True):
                    yield path, (text[is_token] if text.dim() == 2 else text[None]).double()


def centred_moments(model: AdaptedModel, texts: Examples) -> dict[str, Tensor]:
    """Return sum (x - mean) (x - mean)^T over all tokens that enter each layer, (K, K) float64 by path."""
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    for path, x_TK in entering(model, texts):
        count, total_K, moment_KK = sums.get(path, (0, torch.zeros(()), torch.zeros(())))
        sums[path] = count + len(x_TK), total_K + x_TK.sum(dim=0), moment_KK + x_TK.T @ x_TK
    return {path: moment - torch.outer(total, total) / count for path, (count, total, moment) in sums.items()}


def mean_moments(model: AdaptedModel, texts: Examples) -> dict[str, Tensor]:
    """Return the mean over texts of sum x x^T over a text's tokens, divided by its largest entry, (K, K) by path.

    Divided as CorDA's code and PEFT do, so that no text outweighs the others. Float64.
    """
    moments: dict[str, Tensor] = {}
    for path, x_TK in entering(model, texts):
        x_TK = x_TK / x_TK.max().abs()
        moments[path] = moments.get(path, torch.zeros(())) + x_TK.T @ x_TK / len(texts)
    return moments


def weight_gradients(
    model: AdaptedModel, layers: Mapping[str, nn.Module], texts: Examples, *, task: Task
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss of labelled texts by the frozen weight of each layer, (D, K) float64.

    The weights are as frozen after as before.
    """
    weights = {path: layer.get_parameter("weight") for path, layer in layers.items()}
    was_training = model.training
    model.eval()
    sums = {path: torch.zeros_like(weight, dtype=torch.float64) for path, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for rows in micro_batches(texts.lengths, range(len(texts)), TOKEN_BUDGET):
            loss = task.losses(model, texts.batch(rows)).sum()
            for path, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                sums[path] += gradient / len(texts)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
        model.train(was_training)
    return {path: sum_ if isinstance(layers[path], nn.Linear) else sum_.T for path, sum_ in sums.items()}


def _finite(name: str, path: str, matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise InputError(f"Expected finite numbers for adapter.init_lora_weights={name}, got others in {path}")
    return matrix


def _contiguous(layer: LoraFactors) -> LoraFactors:
    return LoraFactors(layer.lora_A.contiguous(), layer.lora_B.contiguous())
