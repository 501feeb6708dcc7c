"""What the owner of a device may allow and bound: the section `policy` of `client.yaml`.

`fedlr.client.policy` holds what a server asks against it.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from fedlr.config.old_names import RuleName
from fedlr.config.parts import OPTIMIZERS, RULES_OF_PROTOCOL, OptimizerName
from fedlr.config.schema import PositiveInt, Rate, Section
from fedlr.errors.ranges import (
    LARGEST_DIVISOR,
    LARGEST_GRAD_NORM,
    LARGEST_NOISE_MULTIPLIER,
    LEAST_DIVISOR,
    LEAST_GRAD_NORM,
)
from fedlr.flower.task_terms import Sha256, TaskName
from fedlr.models.tuners.blocks import LORA
from fedlr.models.tuners.registry import TUNERS

# Bounds that no owner needs to move.
LARGEST_ARGUMENT = 1e6  # of an optimizer or a rule
LARGEST_SCALE = 1e3  # lora_alpha / rank
LARGEST_SIZE = 65_536  # any number in adapter.sizes
MOST_NAMES = 1_000  # in a list of modules or layers
MOST_BLOCKS = 10_000  # single slots that a round may name
MODULE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
HOW_IT_RUNS = ("foreach", "fused", "capturable", "differentiable")  # of torch's optimizers: nothing a server need say
# Which task the rows of a reader are for, and which models read them.
TASK_OF_DATA: Mapping[str, TaskName] = {
    "table": "text_classification",
    "synthetic": "text_classification",
    "multilabel_table": "text_multilabel",
    "scored_table": "text_regression",
    "conversations": "causal_lm",
    "synthetic_chat": "causal_lm",
    "images": "image_classification",
    "made_up_images": "image_classification",
}
MODELS_OF_TASK: Mapping[TaskName, tuple[str, ...]] = {
    "text_classification": ("pretrained", "tiny_random"),
    "text_multilabel": ("pretrained", "tiny_random"),
    "text_regression": ("pretrained", "tiny_random"),
    "causal_lm": ("pretrained_causal", "tiny_random_causal"),
    "image_classification": ("pretrained_images", "tiny_vit"),
}


def system_name(name: str) -> str:
    """Refuse what is no system of the registry."""
    if name not in TUNERS:
        raise ValueError("a system of docs/adapters.md, such as lora")
    return name


SystemName = Annotated[str, AfterValidator(system_name)]


class Policy(Section):
    """The owner's bounds. `allowed_models` are SHA-256 of base models without their heads (`fedlr client doctor`)."""

    allowed_models: Annotated[list[Sha256], Field(min_length=1)]
    # A language model can repeat what it was trained on, word for word: its owner says that it may be one.
    allowed_tasks: Annotated[list[TaskName], Field(min_length=1)] = [
        "text_classification",
        "text_multilabel",
        "text_regression",
        "image_classification",
    ]
    max_experiments: PositiveInt = 100  # of which this device keeps an adapter and the last replies
    max_rounds: PositiveInt = 1_000  # of one experiment
    max_steps_per_round: PositiveInt = 100
    max_sample_rate: Rate = 0.25
    min_noise_multiplier: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 0.3
    max_noise_multiplier: Annotated[float, Field(gt=0, le=LARGEST_NOISE_MULTIPLIER)] = 1_000.0
    max_grad_norm: Annotated[float, Field(ge=LEAST_GRAD_NORM, le=LARGEST_GRAD_NORM)] = 10.0
    min_divisor: Annotated[float, Field(ge=LEAST_DIVISOR)] = 1.0
    max_divisor: Annotated[float, Field(gt=0, le=LARGEST_DIVISOR)] = 1e6
    max_length: PositiveInt = 512  # tokens of one text or conversation
    max_token_budget: PositiveInt = 65_536  # tokens of one forward pass
    max_rank: PositiveInt = 64
    max_trained_values: PositiveInt = 20_000_000  # of an adapter, as a message brings it
    max_side_values: PositiveInt = 100_000_000  # of what a server folded away
    allowed_adapters: Annotated[list[SystemName], Field(min_length=1)] = [LORA]
    allowed_optimizers: Annotated[list[OptimizerName], Field(min_length=1)] = list(OPTIMIZERS)
    allowed_rules: list[RuleName] = list(RULES_OF_PROTOCOL)
    allow_seeded_randomness: bool = False
    allow_no_privacy: bool = False

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        for what in ("noise_multiplier", "divisor"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if least > most:
                raise ValueError(f"a section with min_{what} <= max_{what} ({least:g} > {most:g})")
        return self
