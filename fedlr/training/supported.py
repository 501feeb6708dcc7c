"""What DP-SGD can train here, checked before any private example is read (reliability.md R-P9).

Two kinds of checks. The structure: what the adapter cannot carry or Opacus cannot see. And a probe: a few
forward passes on constant tokens or pixels, which show what no list of names can (layers that merge examples, a
batch norm by another name, buffers that move). The first failure is one `InputError`, not a crash in the middle
of a round.

Dropout is refused rather than switched off: nothing here changes a model behind its owner's back. It would draw
from a global generator, and the engines would no longer agree.

PEFT is looked at by attribute, not by class: only adapter, models and export import it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, ROLES, Block, roles_of
from fedlr.errors import InputError
from fedlr.errors.messages import first_line
from fedlr.models.peft_state import ADAPTER_NAME, head_parts
from fedlr.models.zero_head import awake
from fedlr.tasks.probe import PROBE_EXAMPLES, in_training, probe_inputs

GradSampleMode = Literal["hooks", "ghost", "loop"]

ONE_BY_ONE = "set trainer.engine=opacus trainer.grad_sample_mode=loop, which takes one example at a time"
PROBE_PADDING = (2, 19)
MAX_PROBE_CHANGE = 1e-3  # relative; far above what another batch composition does to float32 kernels
# Another width rounds otherwise, by 0.03 in a small bfloat16 model. What passes here, the same model in float32 shows.
MAX_PADDING_CHANGE = {torch.float32: MAX_PROBE_CHANGE, torch.bfloat16: 0.05}


def check_supported(model: nn.Module, block: Block, *, grad_sample_mode: GradSampleMode = "hooks") -> None:
    """Check that per-example gradients of `block` exist, are all that trains, and are of one example each.

    Args:
        model: a PEFT model with one LoRA adapter. Left as it was: mode, `requires_grad` and buffers.
        block: what will train; of single slots, their roles are checked in every layer.
        grad_sample_mode: which class of `fedlr.training.gradients` will be used.

    Raises:
        InputError: naming the first thing that is not supported, and what to change.
    """
    roles = roles_of(block)
    if not roles or not roles <= set(ROLES):
        raise InputError(f"Expected a trained block out of {ROLES}, got {sorted(roles)}")
    _check_adapter(model)
    _check_modules(model)
    trained = _trained_layers(model, roles)
    _check_trained(trained, grad_sample_mode)
    model = awake(model)  # behind a head of zeros no probe sees anything
    _probe(model, _trained_layers(model, roles), grad_sample_mode)


def _check_adapter(model: nn.Module) -> None:
    config: Any = getattr(model, "peft_config", {}).get(ADAPTER_NAME)
    if config is None:
        raise InputError(f"Expected a PEFT model with one adapter named {ADAPTER_NAME!r}, got {type(model).__name__}")
    if config.bias != "none":
        raise InputError(f"Expected adapter bias 'none', got {config.bias!r}; the adapter carries no biases")
    if config.trainable_token_indices:
        raise InputError("Expected no trainable_token_indices, got some; embeddings have no per-example gradient here")
    for path, layer in _lora_layers(model):
        factors = (layer.lora_A, layer.lora_B)
        if len(layer.lora_embedding_A) > 0 or any(type(f[ADAPTER_NAME]) is not nn.Linear for f in factors):
            raise InputError(
                f"Expected LoRA on linear layers, got {path} ({type(layer).__name__}); change target_modules"
            )
        if layer.use_dora[ADAPTER_NAME] or ADAPTER_NAME in getattr(layer, "lora_variant", {}):
            raise InputError(f"Expected plain LoRA, got a variant (such as DoRA) on {path}; switch it off")
        if layer.lora_bias[ADAPTER_NAME]:
            raise InputError(f"Expected lora_bias=false, got true on {path}; the adapter carries no biases")


def _check_modules(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            raise InputError("Expected gradient checkpointing off, got on; it hides activations from Opacus")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(f"Expected a model without batch normalisation, got {path}; it mixes examples")
        dropout = [name for name, value in vars(module).items() if _is_dropout(module, name, value)]
        if dropout:
            raise InputError(
                f"Expected dropout 0, got {getattr(module, dropout[0])} in {path}.{dropout[0]}; set it to 0"
            )


def _check_trained(trained: dict[str, nn.Module], mode: GradSampleMode = "hooks") -> None:
    if not trained:
        raise InputError("Expected the model to have tensors of the trained block, got none")
    parameters = [p for layer in trained.values() for p in layer.parameters(recurse=False)]
    if len({id(p) for p in parameters}) < len(parameters):
        raise InputError("Expected no tied trained tensors, got some; an adapter cannot hold them")
    for path, layer in trained.items():
        if mode != "loop" and type(layer) not in GradSampleHooks.GRAD_SAMPLERS:
            raise InputError(
                f"Expected trained layers that Opacus knows, got {type(layer).__name__} at {path}; {ONE_BY_ONE}"
            )
        if any(p.dtype != torch.float32 for p in layer.parameters(recurse=False)):
            raise InputError(f"Expected trained tensors in float32, got another type at {path}; noise needs the digits")


def _probe(model: nn.Module, trained: dict[str, nn.Module], mode: GradSampleMode) -> None:
    """Run constant examples through the model and look at what its layers see."""
    inputs = probe_inputs(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shapes: dict[str, list[torch.Size]] = {path: [] for path in trained}
    with _recorded(trained, shapes):
        alone = _logits(model, inputs)
    together = _logits(model, _with_another_last(inputs))
    padded = [_logits(model, _padded(model, inputs, num_padding)) for num_padding in PROBE_PADDING]
    most = max(MAX_PADDING_CHANGE.get(parameter.dtype, MAX_PROBE_CHANGE) for parameter in model.parameters())

    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    if moved:
        raise InputError(f"Expected buffers that training leaves alone, got {moved[0]} changed by a forward pass")
    if not _change(alone[:-1], together[:-1]) <= MAX_PROBE_CHANGE:
        raise InputError("Expected examples that do not interact, got a model whose output for one depends on another")
    # A language model gives logits of every token: those of the padding count for nothing.
    if not all(_change(alone, other[:, : alone.shape[1]]) <= most for other in padded):
        raise InputError(
            "Expected a model that ignores padding, got one whose output depends on it: one long example would change "
            "the gradients of all that are padded to its length"
        )
    for path, seen in shapes.items():
        if not seen:
            raise InputError(f"Expected every trained layer to take part in the forward pass, got {path} left out")
        if mode != "loop" and any(shape[0] != PROBE_EXAMPLES for shape in seen):
            raise InputError(
                f"Expected layers that keep examples apart, got {path} with them merged into one axis or with an "
                f"input that all examples share; {ONE_BY_ONE}"
            )
        if mode == "ghost" and (len(seen) > 1 or len(seen[0]) not in (2, 3)):
            raise InputError(
                f"Expected layers used once, on (N, K) or (N, T, K), for ghost gradients, got {path}; "
                "set trainer.grad_sample_mode=hooks"
            )


def _change(logits: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest logit; nan if either has one."""
    return float((logits - other).abs().max() / logits.abs().max().clamp(min=1e-6))


def _is_dropout(module: nn.Module, name: str, value: object) -> bool:
    named = "drop" in name or (name == "p" and "Drop" in type(module).__name__)
    return named and isinstance(value, float) and value > 0.0


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict))


def _trained_layers(model: nn.Module, roles: frozenset[str]) -> dict[str, nn.Module]:
    """Return, by path, the modules that hold the tensors of the block as their own."""
    found: dict[str, nn.Module] = {}
    for path, layer in _lora_layers(model):
        for role in sorted(roles & {LORA_A, LORA_B}):
            found[f"{path}.{role}"] = getattr(layer, role)[ADAPTER_NAME]
    if HEAD in roles:
        found |= {path: part for path, (_, part) in head_parts(model).items()}
    return found


def _with_another_last(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the examples with another one in the last place: its tokens moved, its pixels turned to the negative."""
    last = {n: -rows[-1:] if rows.is_floating_point() else rows[-1:].roll(1, dims=-1) for n, rows in inputs.items()}
    return {name: torch.cat([rows[:-1], last[name]]) for name, rows in inputs.items()}


def _padded(model: Any, inputs: dict[str, Tensor], num_padding: int) -> dict[str, Tensor]:
    """Return the examples with padding on the right; images, which all have one size, as they are."""
    fill = {"input_ids": getattr(model.config, "pad_token_id", None) or 0, "attention_mask": 0}
    pad = nn.functional.pad
    return {n: pad(rows, (0, num_padding), value=fill[n]) if n in fill else rows for n, rows in inputs.items()}


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with in_training(model):
        try:
            logits: Tensor = model(**inputs).logits.float()
            return logits
        except Exception as error:  # whatever a foreign forward raises
            raise InputError(
                f"Expected a model that reads a few made-up examples of {sorted(inputs)}, got {type(error).__name__}: "
                f"{first_line(error)}; look at model.name_or_path"
            ) from error


@contextmanager
def _recorded(layers: dict[str, nn.Module], shapes: dict[str, list[torch.Size]]) -> Iterator[None]:
    def note(path: str) -> Any:
        return lambda _module, inputs: shapes[path].append(inputs[0].shape)

    handles = [layer.register_forward_pre_hook(note(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
