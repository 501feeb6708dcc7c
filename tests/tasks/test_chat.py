"""What is tokenised is what the template writes, and what is scored are the answers with their end marks.

Mutant this file kills: an end mark that is also the pad token unscored, as masking by token and not by length makes it.
"""

from types import ModuleType

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fedlr.data.conversations import ASSISTANT, SYSTEM, TEXT, USER, Conversations, Turn
from fedlr.errors import InputError
from fedlr.models.causal import chat_tokenizer, tiny_random_causal
from fedlr.tasks import tokenised_turns
from fedlr.tasks.causal_lm import CausalLM, causal_lm
from fedlr.tasks.chat import CHATML, EncodedTurns, encode_conversations, with_template
from fedlr.tasks.losses import IGNORED_LABEL
from tests.training.small_models import mutant

WORDS = [f"w{i}" for i in range(12)]
# As Gemma and Qwen 3: white space taken off the ends of texts, and an empty thought before the last answer.
GEMMA = (
    "{{ '<|im_start|>' }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<|im_start|> ' + m['role'] + ' ' }}"
    "{{ m['content'] | trim + '<|im_end|> ' }}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}{% if loop.last %}{{ 'w10 w11 ' }}{% endif %}"
    "{{ m['content'].replace('w9', '') + '<|im_end|> ' }}{% endfor %}"
)


def table(*rows: tuple[Turn, ...]) -> Conversations:
    return Conversations(rows, np.arange(11, 11 + len(rows)), None, "chats")


def chat(*texts: str, system: str = "") -> tuple[Turn, ...]:
    sides = [Turn((USER, ASSISTANT)[i % 2], text) for i, text in enumerate(texts)]
    return (*([Turn(SYSTEM, system)] if system else []), *sides)


def tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    made = chat_tokenizer(WORDS)
    made.chat_template = template
    return made


def encoded(row: tuple[Turn, ...], template: str = CHATML, **limits: int) -> EncodedTurns:
    limits = {"max_length": 100, **limits}
    (found,) = encode_conversations(table(row), tokenizer(template), **limits)
    return found


def scored(found: EncodedTurns) -> str:
    ids = [token for token, is_scored in zip(found.ids, found.scored, strict=True) if is_scored]
    return " ".join(tokenizer().convert_ids_to_tokens(ids))


def test_the_tokens_are_those_of_the_template_up_to_the_last_end_mark() -> None:
    row = chat("w1 w2", "w3", "user", "assistant", system="w4")
    messages = [{"role": turn.role, "content": turn.text} for turn in row]
    whole = tokenizer().apply_chat_template(messages, return_dict=False)
    found = encoded(row)
    assert found.ids == whole[: len(found.ids)] and not found.cut
    assert scored(found) == "w3 <|im_end|> assistant <|im_end|>"


@pytest.mark.parametrize("template", [GEMMA, QWEN])
def test_templates_that_change_what_is_around_a_text_are_followed(template: str) -> None:
    assert scored(encoded(chat("w1", " w2 ", "w3", "w4 "), template)) == "w2 <|im_end|> w4 <|im_end|>"


def test_a_row_that_the_template_refuses_or_changes_is_named() -> None:
    refused = table(chat("w1", "w2"), chat("w1", "w2", system="w3"))
    with pytest.raises(InputError, match=r"chats, row 12: the chat template refuses.*alternate"):
        list(encode_conversations(refused, tokenizer(GEMMA), max_length=50))
    with pytest.raises(InputError, match=r"chats, row 11: the chat template changes the texts"):
        encoded(chat("w1", "w9 w2"), QWEN)


def test_a_cut_answer_has_no_end_mark_and_what_follows_goes_with_it() -> None:
    row = chat("w1", "w2 w3 w4", "w5", "w6")
    found = encoded(row, max_response=2)
    assert (scored(found), found.cut) == ("w2 w3", True)
    assert (scored(encoded(row, max_response=3)), encoded(row, max_response=4).cut) == ("w2 w3 w4", False)
    short = encoded(row, max_length=8)
    assert (len(short.ids), scored(short), short.cut) == (8, "w2 w3", True)
    assert scored(encoded(row, max_length=3)) == ""


def test_a_plain_text_is_scored_whole_with_its_end() -> None:
    assert scored(encoded((Turn(TEXT, "w1 w2"),))) == "w1 w2 <|im_end|>"


def test_templates_by_name() -> None:
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match=r"task\.template=null.*chatml, plain, alpaca"):
        with_template(bare, None)
    with pytest.raises(InputError, match="chatml, plain, alpaca, got 'llama'"):
        with_template(bare, "llama")
    (found,) = encode_conversations(table(chat("w1", "w2")), with_template(bare, "plain"), max_length=9)
    assert bare.convert_ids_to_tokens(found.ids) == ["w1", "w2", "<|im_end|>"] and scored(found) == "w2 <|im_end|>"
    row = chat("w1", "w2", "w3", "w4", system="w5")
    asked = with_template(bare, "alpaca").apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)
    assert asked.endswith("### Instruction:\nw1\n\n### Response:\n")
    (found,) = encode_conversations(table(row), bare, max_length=90)
    assert scored(found) == "w2 <|im_end|> w4 <|im_end|>"


def test_an_end_mark_that_pads_stays_scored() -> None:
    base = tiny_random_causal(words=WORDS, seed=1, num_layers=1)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id
    table_of_two = table(chat("w1", "w2"), chat("w1 w2 w3", "w4 w5"))
    examples = CausalLM().encode(base, table_of_two, max_length=50)
    by_token = mutant(
        tokenised_turns, ("np.where(chosen.scored,", "np.where(chosen.scored & (chosen.ids != self.pad_id),")
    )

    def ends(module: ModuleType) -> list[bool]:
        batch = module.TokenisedTurns(examples.ids, examples.scored, examples.offsets, examples.pad_id, 0).batch([0, 1])
        assert batch.inputs["attention_mask"].sum(1).tolist() == examples.lengths.tolist()
        return (batch.targets == examples.pad_id).any(dim=1).tolist()

    assert ends(tokenised_turns) == [True, True] != ends(by_token)
    batch = examples.batch([0, 1])
    assert (batch.targets != IGNORED_LABEL).sum(1).tolist() == examples.num_scored.tolist() == [2, 3]


def test_rows_are_cut_counted_and_chosen() -> None:
    base = tiny_random_causal(words=WORDS, seed=1, num_layers=1)
    data = table(chat("w1", "w2"), chat("w1", "w2 w3 w4"), (Turn(TEXT, "w5"),))
    examples = causal_lm(max_response=2).encode(base, data, max_length=50)
    assert examples.num_truncated == 1 and len(examples) == 3
    part = examples.subset([2, 1])
    assert part.lengths.tolist() == examples.lengths[[2, 1]].tolist()
    assert part.num_scored.tolist() == examples.num_scored[[2, 1]].tolist() == [1, 2]
    assert part.batch([]).targets.shape == (0, 0)
    with pytest.raises(InputError, match="max_response"):
        causal_lm(max_response=0)
