"""Where the LoRA factors go, and how they start: the part of a configuration that needs no model to be checked."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# Of peft 0.21.2, those that leave the base model alone and read no examples; tests/test_experiment.py tries them all.
INITIALISERS = (True, False, "gaussian", "orthogonal")
INFORMED = ("principal", "activations")  # ours, fedlr/informed.py: they read the base model, and nobody's examples
READ_EXAMPLES = ("eva", "corda", "lora_ga")
CHANGE_THE_BASE = ("pissa", "olora", "loftq")  # pissa_niter_N too


class AdapterConfig(BaseModel):
    """Where the LoRA factors go, and how they start.

    `target_modules` is a list of module names, one regular expression for whole paths, or "all-linear"; `layers`
    restricts a list to those encoder layers (None: all). `client_ranks` gives client k the rank number k of the list,
    which is repeated as often as there are clients (None: all have `rank`); the scale is that of `rank` for all.
    `init_lora_weights` is PEFT's, as far as an exported adapter opens on the plain base model, and nobody's examples
    are read before there is any noise; `principal` and `activations` are ours (`fedlr.informed`).
    `system` is a name of `fedlr.tuners`, and `sizes` what that system has besides rank and alpha, by PEFT's names.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    rank: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: str | list[str]
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    init_lora_weights: Any = True
    use_rslora: bool = False
    train_head: bool = False
    client_ranks: list[Annotated[int, Field(ge=1)]] | None = None
    system: str = "lora"
    sizes: dict[str, Any] | None = None

    def ranks(self, num_clients: int) -> tuple[int, ...] | None:
        """Return the rank of each client; None: all have the adapter's."""
        given = self.client_ranks
        return None if given is None else tuple(given[client % len(given)] for client in range(num_clients))

    @field_validator("client_ranks")
    @classmethod
    def _are_within_the_rank(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        rank = info.data.get("rank", 0)
        if value is not None and (not value or max(value) > rank):
            raise ValueError(f"null for all clients alike, or a list of ranks of at most adapter.rank={rank}")
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _leaves_the_base_alone(cls, value: object, info: ValidationInfo) -> object:
        if value == "orthogonal" and info.data.get("rank", 0) % 2:
            raise ValueError(f"true, false or gaussian where adapter.rank={info.data['rank']} is odd")
        if any(value is one or (isinstance(one, str) and value == one) for one in (*INITIALISERS, *INFORMED)):
            return value
        name = value.partition("_niter_")[0] if isinstance(value, str) else value
        why = ""
        if name in CHANGE_THE_BASE:
            why = f" ({name} changes the base model's own weights: the adapter would not open on the plain base)"
        elif name in READ_EXAMPLES:
            why = f" ({name} reads examples before there is any noise)"
        raise ValueError(f"principal, activations, true, false, gaussian or orthogonal{why}")

    @field_validator("target_modules")
    @classmethod
    def _can_match(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and "" in value):
            raise ValueError("one name or more, such as [query, value]")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"a list of names or a regular expression ({error})") from error
        return value

    @field_validator("layers")
    @classmethod
    def _are_some(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if value is not None and isinstance(info.data.get("target_modules"), str):
            raise ValueError("null, as adapter.target_modules is a pattern: list names there to choose layers here")
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("null for all layers, or a list of different layers, such as [4, 5]")
        return value
