"""A base model with the adapter that a run asks for: LoRA, or another system of the registry as PEFT builds it.

The attached model knows the names of its system (`Layout`, read by `models.peft_state`). Parts that a server would
ship are slots of the adapter too, of a role that never trains: every client is given them once, when it enrols, they
count in the adapter's hash, and a copy of the model that has others is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch
from peft import TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fedlr.adapters.state import SHIPPED, Slot
from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.network import AdaptedModel, BaseModel, attach_lora, seeded, with_targets
from fedlr.models.peft_state import LAYOUT
from fedlr.models.places import check_places, linear_names
from fedlr.models.tuners.blocks import LORA, entry_of, role_of
from fedlr.models.tuners.build import frozen_parts, shipped_parts, trained_parameters
from fedlr.models.tuners.entry import Tuner

RANKS = ("r", "init_r")  # how PEFT calls what is adapter.rank here
ALPHAS = ("lora_alpha", "alpha", "psoft_alpha", "randlora_alpha")
OURS = ("task_type", "modules_to_save", "target_modules", "layers_to_transform", "inference_mode", "peft_type")
_START = "it is LoRA with another start; set adapter=lora adapter.init_lora_weights={name}"
_PUBLIC = _START + " adapter.public={{path: FILE}}"
_BASE = "it changes the base model's own weights: the adapter would not open on the plain base"

# Systems of the registry that a run does not carry, and why; tests/simulations/test_tuners_run.py tries all others.
NOT_IN_RUNS: Mapping[str, str] = {
    "eva": _PUBLIC.format(name="eva"),
    "corda": _PUBLIC.format(name="corda"),
    "lora_ga": _PUBLIC.format(name="lora_ga"),
    "pissa": _START.format(name="pissa"),
    "lora_plus": "its tensors are LoRA's, and it is two learning rates: set adapter=lora trainer=lora_plus",
    "adalora": "its ranks are allocated by gradients before the noise, and without that it is LoRA with a diagonal of "
    "hardly any gradient; set adapter=lora method=rank_budget, whose server allocates ranks, or adapter=lora_xs",
    "olora": _START.format(name="olora"),
    "kasa": _BASE,
    "frod": "its saved folder opens as another model where a singular value decomposition has other signs",
    "conv_lora": "it adapts convolutions, and the models of a run have linear layers",
    "bdlora": "its sizes are no plain values of a configuration",
    "trainable_tokens": "PEFT saves no head beside it, and a head drawn anew is another one",
    "mhr": "its forward pass reads task_ids, which no data of a run have",
}


@dataclass(frozen=True)
class Layout:
    """What a model of another system than LoRA knows of its own adapter."""

    system: str
    tuner: Tuner

    def role(self, name: str) -> str | None:
        """Return the role of a parameter by its dotted name; None if no block trains it."""
        block = self.tuner.block_of(name)
        return None if block is None else role_of(self.system, block)

    def shipped(self, model: nn.Module) -> dict[Slot, Tensor]:
        """Return copies of the frozen parts that clients are given once."""
        return {Slot(name, SHIPPED): part for name, part in shipped_parts(model, self.tuner).items()}

    def load_shipped(self, model: nn.Module, tensors: Mapping[Slot, Tensor]) -> None:
        """Write the shipped ones of an adapter's tensors into a model, in place: its copies share them."""
        own = self.frozen(model)
        for slot in self.shipped(model).keys() & tensors.keys():
            with torch.no_grad():
                own[slot.path].copy_(tensors[slot])

    def frozen(self, model: nn.Module) -> dict[str, Tensor]:
        """Return every frozen tensor by name, as it is."""
        return frozen_parts(model)


def run_tuner(system: str) -> Tuner:
    """Return the registry's entry of a system that a run can train.

    Raises:
        InputError: for an unknown name, one that the registry refuses, and one that no run carries.
    """
    entry = entry_of(system)
    if system in NOT_IN_RUNS:
        raise InputError(f"Expected an adapter.system that a run can train, got {system!r}: {NOT_IN_RUNS[system]}")
    return entry


def attach(base: BaseModel, config: AdapterConfig, *, seed: int) -> AdaptedModel:
    """Return the base network with one adapter of the configuration's system, drawn from the seed.

    Raises:
        InputError: if the system does not fit the model or its sizes, with what to change.
    """
    if config.system == LORA:
        if config.sizes:
            raise InputError(
                f"Expected adapter.sizes=null for adapter.system=lora, got {config.sizes}; use LoRA's keys"
            )
        return attach_lora(base, config, seed=seed)
    tuner, config = run_tuner(config.system), with_targets(base, config)
    check_places(base.network, base.source, config, heads=base.head_names)
    arguments, names = peft_arguments(config, tuner), linear_names(base.network, base.head_names)
    arguments["modules_to_save"] = base.whole_modules or None  # beside what PEFT adds
    try:
        peft_config = tuner.peft_config(task_type=TaskType(base.task_type), **arguments)
        with seeded(seed):
            model = get_peft_model(base.network, peft_config, autocast_adapter_dtype=False)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):  # a head is frozen until train_only lets it train
                module.requires_grad_(False)
        trained = trained_parameters(model, tuner)
    except (ValueError, TypeError, RuntimeError, AssertionError, KeyError) as error:
        raise InputError(
            f"Expected adapter.system={config.system} to fit the layers {config.target_modules!r} of {base.source} "
            f"with adapter.rank={config.rank} and adapter.sizes={config.sizes}, got: {first_line(error)}; its linear "
            f"layers end in {', '.join(names)}"
        ) from error
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    setattr(model, LAYOUT, Layout(config.system, tuner))
    return model


def peft_arguments(config: AdapterConfig, tuner: Tuner) -> dict[str, Any]:
    """Return PEFT's arguments of a configuration: sizes and places by the names of the system's own class.

    Raises:
        InputError: for a size that the class does not have, or that defines the system, and for keys of LoRA alone.
    """
    known = {one.name for one in fields(tuner.config)}  # type: ignore[arg-type]  # PEFT's are dataclasses
    is_made_later = (
        config.system == "lora_xs" and config.init_lora_weights == "lora_sb"
    )  # fedlr.models.starts.silver_bullet
    of_lora = {"init_lora_weights": "lora_sb" if is_made_later else True, "use_rslora": False}
    for key, plain in {**of_lora, "client_ranks": None, "client_memory_mb": None}.items():
        if (given := getattr(config, key)) != plain:
            raise InputError(f"Expected adapter.{key}={plain} for adapter.system={config.system}, got {given!r}")
    for name in config.sizes or {}:
        if name in RANKS:
            raise InputError(f"Expected adapter.rank to set the rank, got adapter.sizes.{name}")
        if name not in known or name in (*OURS, *ALPHAS, *tuner.options):
            usable = sorted(known - {*OURS, *ALPHAS, *RANKS, *tuner.options})
            near = ", ".join(get_close_matches(name, usable, n=3) or usable)
            raise InputError(
                f"Expected adapter.sizes to have keys of {tuner.config.__name__}, such as {near}, got {name!r}"
            )
    arguments: dict[str, Any] = {"target_modules": config.target_modules}
    arguments |= {name: config.rank for name in RANKS if name in tuner.sizes}
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha
    arguments |= {name: alpha for name in ALPHAS if name in known and ("r" in arguments or "r" not in known)}
    if config.layers is not None:
        if "layers_to_transform" not in known:
            raise InputError(f"Expected adapter.layers=null for adapter.system={config.system}, got {config.layers}")
        arguments["layers_to_transform"] = list(config.layers)
    return arguments | (config.sizes or {})
