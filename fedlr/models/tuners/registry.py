"""The registry: every tuner of PEFT 0.21 that a client can train under DP-SGD, and those refused with the reason.

A new system is an entry in one of the family files; `fedlr adapters` measures it and fails if the figures say otherwise
than the entry.
"""

import difflib
from collections.abc import Mapping

from fedlr.errors import InputError
from fedlr.models.tuners.entry import Tuner
from fedlr.models.tuners.linear_families import LINEAR_FAMILIES
from fedlr.models.tuners.lora_family import LORA_FAMILY
from fedlr.models.tuners.product_families import MULTILINEAR_FAMILIES, NONLINEAR_FAMILIES

TUNERS: Mapping[str, Tuner] = {**LORA_FAMILY, **LINEAR_FAMILIES, **MULTILINEAR_FAMILIES, **NONLINEAR_FAMILIES}

_PROMPT = "it trains prompts of a whole language model and no layer; what is averaged and measured here are layers"
_SEVERAL = "it mixes several finished adapters; it is none that a client trains"

REFUSED: Mapping[str, str] = {
    "osf": "it edits gradients in hooks on its tensors, so torch.func and a backward pass disagree on what is clipped",
    "pvera": "its forward pass in train mode is random: no two passes have the same per-example gradient",
    "monteclora": "its forward pass in train mode is random: no two passes have the same per-example gradient",
    "lily": "its router averages over all tokens of the batch, so one example changes another's output",
    "velora_batch": "it takes its projection from the batch, so one example changes another's gradient; use velora",
    "hra_gs": "PEFT 0.21.2 starts apply_GS=True far from the base, with nan in some layers; use hra",
    "adamss": "it clusters the base with scikit-learn, which is no dependency here",
    "shadow": "it trains a second transformer beside a pretrained one; it needs a whole language model",
    "adaption_prompt": _PROMPT,
    "prompt_tuning": _PROMPT,
    "multitask_prompt_tuning": _PROMPT,
    "p_tuning": _PROMPT,
    "prefix_tuning": _PROMPT,
    "cpt": _PROMPT,
    "cartridge": _PROMPT,
    "xlora": _SEVERAL,
    "arrow": _SEVERAL,
    "alora": "it switches LoRA on after invocation tokens of a prompt; use lora",
    "qalora": "it needs a quantised base, which is not carried here",
    "loftq": "it needs a quantised base, which is not carried here",
}


def tuner(name: str) -> Tuner:
    """Return an entry of the registry.

    Raises:
        InputError: if the name is refused, with the reason, or unknown.

    >>> tuner("vera").form
    'multilinear'
    >>> tuner("osf")
    Traceback (most recent call last):
    fedlr.errors.InputError: Expected a tuner that can be trained in private here, got 'osf': it edits gradients in ...
    """
    if name in TUNERS:
        return TUNERS[name]
    if name in REFUSED:
        raise InputError(f"Expected a tuner that can be trained in private here, got {name!r}: {REFUSED[name]}")
    nearest = difflib.get_close_matches(name, [*TUNERS, *REFUSED], n=1)
    raise InputError(f"Expected {' or '.join(nearest) or 'one of ' + ', '.join(sorted(TUNERS))}, got {name!r}")
