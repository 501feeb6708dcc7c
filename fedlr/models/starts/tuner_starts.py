"""Starts that are made from data: EVA, CorDA, LoRA-GA, on the server, once, from a public batch.

Each reads activations or gradients of its data without noise. On private rows that would be outside DP-SGD and no
epsilon would cover it; so a server makes the start from public data and ships it, and a client only loads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import PerExampleLoss, losses_of


@dataclass(frozen=True)
class PublicBatch:
    """Examples that are nobody's secret, N first, and how a model is wrong on them."""

    batch: Batch
    loss: PerExampleLoss


class Start(Protocol):
    """Builds the adapted model instead of `get_peft_model`."""

    def __call__(self, model: nn.Module, config: PeftConfig, public: PublicBatch) -> Any:
        """Return PEFT's model around `model`."""
        ...


def eva(model: nn.Module, config: PeftConfig, public: PublicBatch) -> Any:
    """Return a model whose lora_A are the first right singular vectors of activations (Paischer et al. 2024)."""
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)

    def run(inner: Any, inputs: Mapping[str, Tensor]) -> Any:
        return inner.base_model(**inputs)

    def as_rows(layer_input: Any, _model_input: object, _layer_name: str) -> Tensor:
        first: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
        return first.flatten(0, -2)

    initialize_lora_eva_weights(
        adapted,
        dataloader=[dict(public.batch.inputs)],
        forward_fn=run,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=as_rows,
        show_progress_bar=False,
    )
    return adapted


def corda(model: nn.Module, config: PeftConfig, public: PublicBatch) -> Any:
    """Return a model started from weights times the covariance of their inputs (Yang et al. 2024).

    One example at a time: PEFT's covariance fails for larger batches.
    """

    def run() -> None:
        with torch.no_grad():
            for row in range(public.batch.num_examples):
                model(**public.batch.one(row).inputs)

    preprocess_corda(model, cast(LoraConfig, config), run_model=run)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def lora_ga(model: nn.Module, config: PeftConfig, public: PublicBatch) -> Any:
    """Return a model started from the singular vectors of the first gradient (Wang et al. 2024)."""

    def run() -> None:
        losses_of(model, public.loss, public.batch).mean().backward()

    preprocess_loraga(model, cast(LoraConfig, config), run)
    return get_peft_model(model, config, autocast_adapter_dtype=False)
