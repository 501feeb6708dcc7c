"""Where the LoRA factors go, and how they start: the part of a configuration that needs no model to be checked."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from fedlr.data.public import PublicTable
from fedlr.errors import InputError
from fedlr.errors.limits import pattern_problem

# Of peft 0.21.2, those that leave the base model alone and read no examples; tests/test_experiment.py tries them all.
INITIALISERS = (True, False, "gaussian", "orthogonal")
INFORMED = (
    "principal",
    "activations",
)  # ours, fedlr/models/starts/from_base.py: they read the base model, and nobody's examples
# Ours too, models/starts/starts.py: a server makes them and devices are given them. Those after the first line read a
# table.
FROM_WEIGHTS = ("pissa", "olora")
FROM_LABELS = ("lora_ga", "lora_sb")
FROM_PUBLIC = ("eva", "corda", "corda_ipm", *FROM_LABELS)
MADE_BY_THE_SERVER = (*FROM_WEIGHTS, *FROM_PUBLIC)
WITH_SIDE = (*FROM_WEIGHTS, "corda", "corda_ipm", "lora_ga")  # B A is not zero: a side product takes it back
AUTO_TARGETS = "auto"  # the layers that PEFT has for LoRA on the model's type
CHANGE_THE_BASE = ("loftq",)  # PEFT's pissa_niter_N too
# Of a trained number: itself, where it started, its sum, its noise, two moments, and three of a rule after the noise.
BYTES_A_NUMBER = 9 * 4
LARGEST_SIZE = 1_000_000  # of another system: PEFT allocates what it is asked for


class AdapterConfig(BaseModel):
    """Where the LoRA factors go, and how they start.

    `target_modules` is a list of module names, one regular expression for whole paths, "all-linear", or "auto":
    PEFT's own list for the model's type. `layers` restricts a list to those encoder layers (None: all).
    `client_ranks` gives client k the rank number k of the list, which is repeated as often as there are clients
    (None: all have `rank`); the scale is that of `rank` for all. `client_memory_mb` gives them megabytes instead, of
    which the ranks follow (`ranks`). `init_lora_weights` is PEFT's, as far as an exported adapter opens on the plain
    base model, and nobody's examples are read before there is any noise; `principal` and `activations` are ours
    (`models.starts.from_base`), and so are those that read only weights, or the table `public`, and never change a
    tensor of the base (`fedlr.models.starts.starts`). `system` is a name of `models.tuners`, and `sizes` what that
    system has besides rank and alpha, by PEFT's names.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    rank: Annotated[int, Field(ge=1, le=2**31 - 1)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
    target_modules: str | list[str]
    layers: list[Annotated[int, Field(ge=0, le=10_000)]] | None = None
    init_lora_weights: Any = True
    # Left out where there is none: what devices are sent is then what it was before.
    start_from: Annotated[str | None, Field(min_length=1, exclude_if=lambda path: path is None)] = None
    public: PublicTable | None = None
    use_rslora: bool = False
    train_head: bool = False
    client_ranks: list[Annotated[int, Field(ge=1)]] | None = None
    client_memory_mb: list[Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]] | None = None
    system: str = "lora"
    sizes: dict[str, Any] | None = None

    @property
    def has_client_ranks(self) -> bool:
        """Whether clients have ranks of their own."""
        return self.client_ranks is not None or self.client_memory_mb is not None

    def ranks(self, num_clients: int, *, rows_and_columns: int) -> tuple[int, ...] | None:
        """Return the rank of each client; None: all have the adapter's.

        Args:
            rows_and_columns: D + K, in_features and out_features, of all adapted layers together.

        Raises:
            InputError: if the memory of a client is less than what training one rank takes.
        """
        given = self.client_ranks
        if self.client_memory_mb is not None:
            a_rank_mb = rows_and_columns * BYTES_A_NUMBER / 1e6
            if (least := min(self.client_memory_mb)) < a_rank_mb:
                raise InputError(
                    f"Expected adapter.client_memory_mb of at least {a_rank_mb:.3g}, what one rank takes on "
                    f"{rows_and_columns:,} rows and columns, got {least:g}"
                )
            given = [min(self.rank, int(memory_mb / a_rank_mb)) for memory_mb in self.client_memory_mb]
        return None if given is None else tuple(given[client % len(given)] for client in range(num_clients))

    def given_to_devices(self) -> "AdapterConfig":
        """Return what a device builds: a start that the server makes reaches it as the adapter that it is given, and of
        ranks it hears its own."""
        made_here = self.init_lora_weights in MADE_BY_THE_SERVER  # so is one that is read from a folder
        start = True if made_here else self.init_lora_weights
        others = {
            "start_from": None,
            "public": None,
            "client_ranks": None,
            "client_memory_mb": None,
        }  # a task says a client's own rank
        return self.model_copy(update={"init_lora_weights": start, **others})

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
        known = (*INITIALISERS, *INFORMED, *MADE_BY_THE_SERVER)
        if any(value is one or (isinstance(one, str) and value == one) for one in known):
            return value
        why = ""
        if value in CHANGE_THE_BASE:
            why = f" ({value} changes the base model's own weights: the adapter would not open on the plain base)"
        elif isinstance(value, str) and value.startswith("pissa_niter_"):
            why = " (pissa is the whole decomposition, without iterations)"
        raise ValueError(f"{', '.join(known[4:])}, true, false, gaussian or orthogonal{why}")

    @field_validator("client_memory_mb")
    @classmethod
    def _says_the_ranks_alone(cls, value: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if value is not None and (not value or info.data.get("client_ranks") is not None):
            raise ValueError("null, or megabytes with adapter.client_ranks=null: the one gives the other")
        return value

    @field_validator("target_modules")
    @classmethod
    def _can_match(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and "" in value):
            raise ValueError("one name or more, such as [query, value]")
        if isinstance(value, str):
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"a list of names or a regular expression ({error})") from error
            if problem := pattern_problem(value):
                raise ValueError(f"a list of names, or a regular expression {problem}")
        return value

    @field_validator("sizes")
    @classmethod
    def _are_of_use(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, size in (value or {}).items():
            if isinstance(size, int | float) and abs(size) > LARGEST_SIZE:
                raise ValueError(f"sizes of at most {LARGEST_SIZE:,}, not {name}={size:g}")
        return value

    @field_validator("layers")
    @classmethod
    def _are_some(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if value is not None and isinstance(given := info.data.get("target_modules"), str) and given != AUTO_TARGETS:
            raise ValueError("null, as adapter.target_modules is a pattern: list names there to choose layers here")
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("null for all layers, or a list of different layers, such as [4, 5]")
        return value
