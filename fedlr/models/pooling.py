"""A classifier of our own on any encoder: one vector per text or picture, pooled over its states, and one linear head.

Notable choices:
- The encoder is the very module that `transformers` reads the checkpoint into for its own sequence classifier, so the
  body of a model, and its hash, do not depend on how it is pooled. A pooler of BERT's is taken out: nothing reads it.
- Instead of a bias the head has a constant feature of 0.1. With normalised features f the gradient of the head is (p -
  y) f^T, of norm at most sqrt(2) * sqrt(1.01) < 1.43 on any data: a public bound, by which to choose the clip bound.
- Features are made in float32, whatever the encoder computes in.

Legend: N examples, T tokens, H hidden size, K classes.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from fedlr.errors import InputError

AUTO = "auto"
NORMALISED = "_normalised"
POOLINGS = tuple(f"{kind}{suffix}" for kind in ("cls", "mean", "last") for suffix in ("", NORMALISED))
BIAS_FEATURE = 0.1  # 1.0 takes 4.5 points of accuracy at epsilon 6 (docs/log.md)
# How sentence-transformers calls what we pool.
_PLACE = re.compile(r"\w[\w-]*")  # of a module's folder, inside the model's own
_KINDS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last", "cls": "cls", "mean": "mean"}


def pooled(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Return the features of each text: its pooled states, then the constant 0.1.

    Args:
        states: of the last layer, (N, T, H).
        mask: (N, T), 1 for the tokens of a text and 0 for padding on its right; None: there is no padding.
        pooling: one of `POOLINGS`.

    Returns:
        (N, H + 1), float32 or wider.

    >>> states = torch.tensor([[[3.0, 4.0], [100.0, 100.0]]])
    >>> [round(x, 3) for x in pooled(states, torch.tensor([[1, 0]]), "mean_normalised")[0].tolist()]
    [0.6, 0.8, 0.1]
    """
    states = states.float() if states.dtype.itemsize < 4 else states
    kind = pooling.removesuffix(NORMALISED)
    if kind != "cls" and mask is not None and mask.shape != states.shape[:2]:
        raise ValueError("Expected the states of all tokens to pool over, got those of some")
    if kind == "cls":
        vectors = states[:, 0]
    elif mask is None:
        vectors = states.mean(dim=1) if kind == "mean" else states[:, -1]
    elif kind == "mean":
        weights = mask.to(states.dtype)[:, :, None]
        vectors = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
    else:
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        vectors = states[torch.arange(len(states), device=states.device), last]
    if pooling.endswith(NORMALISED):
        vectors = F.normalize(vectors, dim=-1)
    return F.pad(vectors, (0, 1), value=BIAS_FEATURE)


class PooledClassifier(PreTrainedModel):
    """An encoder, `pooled`, and a linear head without bias.

    Args:
        encoder: gives `last_hidden_state`; it keeps the name that its family has for it, so paths of layers do not
            depend on the head.
        pooling: one of `POOLINGS`.
        num_labels: K.
        head_std: standard deviation of the head's weights, drawn from torch's generator; 0: zeros.

    Raises:
        InputError: for an encoder that is none: a model of an encoder and a decoder.
    """

    def __init__(self, encoder: PreTrainedModel, *, pooling: str, num_labels: int, head_std: float) -> None:
        if encoder.config.is_encoder_decoder:
            raise InputError(
                f"Expected model.pooling=null for {encoder.config.model_type}, an encoder with a decoder, got {pooling}"
            )
        # What transformers asks a class, this one has from its encoder.
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
            setattr(self, name, getattr(encoder, name, False))
        super().__init__(encoder.config)
        self.base_model_prefix, self.main_input_name = encoder.base_model_prefix, encoder.main_input_name
        self.pooling, self.num_labels = pooling, num_labels
        self.reads_features = False  # what comes in as embeddings is what the head reads (fedlr.models.prefix)
        setattr(self, self.base_model_prefix, encoder)
        self.num_features = encoder.config.get_text_config().hidden_size + 1
        self.classifier = nn.Linear(self.num_features, num_labels, bias=False)
        with torch.no_grad():
            self.classifier.weight.zero_() if head_std == 0 else self.classifier.weight.normal_(std=head_std)

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's token embedding."""
        return cast(nn.Module, cast(Any, self.base_model).get_input_embeddings())

    def features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Return what the head reads of each text or picture, (N, H + 1)."""
        if pixel_values is not None:
            return pooled(self.base_model(pixel_values).last_hidden_state, None, self.pooling)
        words = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = {name: tensor for name, tensor in words.items() if tensor is not None}
        states = self.base_model(**given, attention_mask=attention_mask).last_hidden_state
        return pooled(states, attention_mask, self.pooling)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **_others: object,
    ) -> SequenceClassifierOutput:
        """Map token ids (N, T), embeddings (N, T, H), or pictures, to logits (N, K)."""
        if self.reads_features:
            assert inputs_embeds is not None
            features = inputs_embeds[:, 0]
        else:
            features = self.features(input_ids, attention_mask, inputs_embeds, pixel_values)
        return SequenceClassifierOutput(logits=self.classifier(features))


def pooling_of(location: str) -> str | None:
    """Return how the files of a sentence encoder say it is pooled; None where there are none.

    Args:
        location: a folder, or a name of the hub, of which only what lies in the cache is read where it is offline.

    Raises:
        InputError: if they name what is not served here.
        OSError: if it cannot be known whether there are any.
    """
    modules = _read(location, "modules.json")
    if modules is None:
        return None
    listed = [module for module in modules if isinstance(module, Mapping)] if isinstance(modules, list) else []
    kinds = [str(module.get("type")).rpartition(".")[2] for module in listed]
    places = [str(module.get("path")) for module, kind in zip(listed, kinds, strict=True) if kind == "Pooling"]
    if set(kinds) - {"Transformer", "Pooling", "Normalize"} or len(places) != 1 or not _PLACE.fullmatch(places[0]):
        raise _not_served(location, f"modules {', '.join(kinds) or 'of another form'} in modules.json")
    section = _read(location, f"{places[0]}/config.json")
    modes = _modes(section) if isinstance(section, Mapping) else []
    if len(modes) != 1 or modes[0] not in _KINDS:
        raise _not_served(location, f"{' and '.join(modes) or 'none'} in {places[0]}/config.json")
    return _KINDS[modes[0]] + (NORMALISED if "Normalize" in kinds else "")


def _modes(section: Mapping[str, Any]) -> list[str]:
    """Return the modes that a section of sentence-transformers switches on: by flags, or by name as newer ones do."""
    flag = "pooling_mode_"
    flags = [name.removeprefix(flag) for name, value in section.items() if name.startswith(flag) and value is True]
    return flags or ([str(section["pooling_mode"])] if "pooling_mode" in section else [])


def _not_served(location: str, got: str) -> InputError:
    return InputError(
        f"Expected files of a sentence encoder in {location} that name one pooling by cls, mean or last token for "
        f"model.pooling=auto, got {got}; set model.pooling to one of {', '.join(POOLINGS)}, or null"
    )


def _read(location: str, name: str) -> Any:
    """Return the content of a JSON file beside a model; None if the model has no such file."""
    found: str | None
    if Path(location).is_dir():
        path = Path(location) / name
        found = str(path) if path.is_file() else None
    else:
        found = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"Expected JSON in {name} of {location}, got {type(error).__name__}; repair it") from error
