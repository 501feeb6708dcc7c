"""Causal language models: loaded once, frozen, in the numbers they will compute in.

Notable choices:
- A base that is asked for in bfloat16 is loaded so, and is never in float32 first.
- A checkpoint that lacks any tensor is refused: a drawn head would be noise that nothing trains.
- Nothing is added to the network, and its head stays frozen.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from fedlr.errors import InputError, in_range
from fedlr.models.gguf import converted, gguf_in
from fedlr.models.network import BaseModel, _frozen, _not_loaded, resolve, seeded
from fedlr.tasks.chat import CHATML
from fedlr.tasks.synthetic_chat import WORDS
from fedlr.tasks.token_loss import check_token_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pretrained_causal(
    *, name_or_path: str, dtype: Literal["float32", "bfloat16"] = "float32", published_as: str | None = None
) -> BaseModel:
    """Load a causal language model by Hugging Face name, from a local folder, or from an installed package.

    Args:
        name_or_path: a hub name, a folder, or `pkg:PACKAGE/FOLDER` inside an installed package; a folder that holds
            one GGUF file and no config.json is converted once (`fedlr.models.gguf`).
        dtype: of the frozen base, from the start.
        published_as: the name by which others can get the same base model; written into exported adapters.

    Raises:
        InputError: if no causal language model can be loaded from there, with what to change.
    """
    if dtype not in DTYPES:
        raise InputError(f"Expected model.dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    location = resolve(name_or_path)
    if (file := gguf_in(location)) is not None:
        location = str(converted(file))
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        network, report = cast(Any, AutoModelForCausalLM).from_pretrained(
            location, trust_remote_code=False, use_safetensors=True, dtype=DTYPES[dtype], output_loading_info=True
        )
    except Exception as error:  # each of the formats in such a folder has errors of its own
        raise _not_loaded(name_or_path, location, error) from error
    if lacking := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise InputError(
            f"Expected model.name_or_path to be a causal language model with all of its tensors, got {name_or_path!r} "
            f"without {lacking[0]} and {len(lacking) - 1} others, which would be drawn at random"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"Expected a tokenizer with a pad or an end token beside {name_or_path!r}, got neither; name one in its "
            "tokenizer_config.json (pad_token)"
        )
    if dtype == "bfloat16" and not torch.cuda.is_available():
        # As in models.precision: on processors fused attention is slow in bfloat16, and rounds otherwise when padded.
        network.set_attn_implementation("eager")
    base = _frozen(network, tokenizer, published_as or name_or_path, head_is_drawn=False, task_type="CAUSAL_LM")
    check_token_loss(network)
    return base


def tiny_random_causal(
    *,
    seed: int,
    words: Sequence[str] = WORDS,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    max_length: int = 64,
) -> BaseModel:
    """Build a Llama with random weights over a small vocabulary of whole words: for tests that take seconds.

    Its pad token is its end mark, as that of many models is.
    """
    in_range(1, 256, num_layers=num_layers, num_heads=num_heads)
    in_range(8, 4096, hidden_size=hidden_size)
    in_range(8, 65536, max_length=max_length)
    if hidden_size % (2 * num_heads):
        raise InputError(f"Expected hidden_size to be a multiple of 2 * num_heads={2 * num_heads}, got {hidden_size}")
    tokenizer = chat_tokenizer(words, max_length=max_length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=max_length,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(seed):
        network = AutoModelForCausalLM.from_config(config)
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads, "max_length": max_length}
    made = {**({} if tuple(words) == WORDS else {"words": list(words)}), "seed": seed, **sizes}
    return _frozen(network, tokenizer, "tiny-random-causal", made=made, head_is_drawn=False, task_type="CAUSAL_LM")


def chat_tokenizer(words: Sequence[str], *, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Build a whole-word tokenizer with the turns of ChatML, whose pad token is its end mark."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    special = ["<|unknown|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, "system", "user", "assistant", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        model_max_length=max_length,
        chat_template=CHATML,
    )
