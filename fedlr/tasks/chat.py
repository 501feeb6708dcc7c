"""Conversations to tokens, through the tokenizer's own chat template, and which of the tokens are scored.

Scored are the answers, each with its end mark; of a plain text all tokens. A template is rendered once per sequence of
roles, with placeholders in place of the texts, which shows where each text lies; the whole conversation is then
tokenised in one piece, as it is when the model is asked, and a token is scored where it overlaps an answer.

Notable choices:

* No special tokens are added: the template writes those that the model expects.
* What is scored is found by place, never by token: a pad token that is also the end mark stays scored at the end.
* An answer that is cut loses its end mark: it would teach the model to stop there.
* Every conversation is also rendered as it is, and refused where the template changes its texts: what is trained on
  would not be what is asked later.
* Packing several conversations into one example is not offered: an example would hold rows of several people, and the
  clip bound would be of none of them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fedlr.data.conversations import ASSISTANT, TEXT, Conversations, Turn
from fedlr.errors import InputError
from fedlr.errors.messages import first_line

# ChatML without the system turn that some models' own template puts first.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# For models that know no turns: each on lines of its own, ended by the tokenizer's end token.
PLAIN = (
    "{% if bos_token and adds_bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
# How Alpaca, FlowerTune, OpenFedLLM and Shepherd write an instruction, for models without turns of their own.
ALPACA = (
    "{% if bos_token and adds_bos_token %}{{ bos_token }}{% endif %}"
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
)
TEMPLATES: Mapping[str, str] = {"chatml": CHATML, "plain": PLAIN, "alpaca": ALPACA}

Spans = list[tuple[int, int]]  # first character, and the one after the last

_CALL = 1024  # conversations tokenised at once


class EncodedTurns(NamedTuple):
    """The tokens of one conversation; `cut` says whether some were left out."""

    ids: list[int]
    scored: list[bool]
    cut: bool


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the texts of a sequence of roles.

    `ends` counts the characters of the end mark after each text; `strips` says whether the template takes white space
    off the ends of texts.
    """

    pieces: tuple[str, ...]  # one before each text, one after the last
    ends: tuple[int, ...]
    strips: bool


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """Give a tokenizer the template of a name, and return it; None keeps its own.

    Raises:
        InputError: if it has none of its own, or the name is unknown.
    """
    if template is None:
        if not isinstance(tokenizer.chat_template, str):
            raise InputError(
                "Expected a tokenizer with a chat template for task.template=null, got one without (or with several); "
                f"set task.template to one of {', '.join(TEMPLATES)}"
            )
        return tokenizer
    if template not in TEMPLATES:
        raise InputError(f"Expected task.template to be null or one of {', '.join(TEMPLATES)}, got {template!r}")
    bos = "bos_token" if adds_bos(tokenizer) else "false"
    tokenizer.chat_template = TEMPLATES[template].replace("bos_token and adds_bos_token", bos)
    return tokenizer


def encode_conversations(
    data: Conversations, tokenizer: PreTrainedTokenizerBase, *, max_length: int, max_response: int | None = None
) -> Iterator[EncodedTurns]:
    """Yield the tokens of each conversation, cut to `max_length`, and before that each answer to `max_response`.

    What follows an answer that was cut is left out with it.

    Raises:
        InputError: for a template that refuses or changes a conversation, which names the row.
    """
    template = _Template(tokenizer)
    waiting: list[tuple[str, Spans]] = []
    for row, number in zip(data.turns, data.numbers.tolist(), strict=True):
        try:
            waiting.append(template.text_of(row))
        except InputError as error:
            raise InputError(f"{data.source}, row {number}: {error}") from error
        if len(waiting) == _CALL:
            yield from _encoded(waiting, tokenizer, max_length, max_response)
            waiting = []
    yield from _encoded(waiting, tokenizer, max_length, max_response)


def encode_turns(row: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> EncodedTurns:
    """Return the tokens of one conversation, whole.

    Raises:
        InputError: for a template that refuses or changes it.
    """
    (found,) = _encoded([_Template(tokenizer).text_of(row)], tokenizer, 10**9, None)
    return found


def adds_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer begins a text with its own beginning token."""
    ids = tokenizer("")["input_ids"]
    return tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id]


def _encoded(
    rows: Sequence[tuple[str, Spans]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_response: int | None,
) -> Iterator[EncodedTurns]:
    if not rows:
        return
    batch = tokenizer(
        [text for text, _ in rows], add_special_tokens=False, return_offsets_mapping=True, padding=False, verbose=False
    )
    for (_, spans), ids, places in zip(rows, batch["input_ids"], batch["offset_mapping"], strict=True):
        yield _cut(ids, _scored(places, spans), max_length, max_response, tokenizer)


def _scored(places: Sequence[tuple[int, int]], spans: Spans) -> list[int]:
    """Return for each token the number of the answer that it overlaps, counted from 1; 0 for none.

    Some tokenizers place white space nowhere (`trim_offsets`): it belongs to the token before it.
    """
    found: list[int] = []
    span = 0
    for start, end in places:
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        inside = span < len(spans) and (end > spans[span][0] if start < end else found[-1:] == [span + 1])
        found.append(span + 1 if inside else 0)
    return found


def _cut(
    ids: Sequence[int],
    answers: Sequence[int],
    max_length: int,
    max_response: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> EncodedTurns:
    kept = min(len(ids), max_length)
    if max_response is not None:
        seen: dict[int, int] = {}
        for place, answer in enumerate(answers[:kept]):
            seen[answer] = seen.get(answer, 0) + 1
            if answer and seen[answer] > max_response:
                kept = place
                break
    # What is left out after the last scored token (a line break after the end mark) taught nothing.
    last = max((place for place, answer in enumerate(answers) if answer), default=len(ids) - 1)
    cut, kept = kept <= last, min(kept, last + 1)
    if kept == 0:
        return EncodedTurns([int(tokenizer.pad_token_id or 0)], [False], cut)
    return EncodedTurns(list(ids[:kept]), [answer > 0 for answer in answers[:kept]], cut)


class _Template:
    """A tokenizer's template, with what it writes around each sequence of roles that was seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}
        self._before = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""

    def text_of(self, row: Sequence[Turn]) -> tuple[str, Spans]:
        """Return a conversation as one text, and where its answers with their end marks lie in it."""
        if row[0].role == TEXT:
            text = self._before + row[0].text + str(self._tokenizer.eos_token or "")
            return text, [(len(self._before), len(text))]
        roles = tuple(turn.role for turn in row)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        skeleton = self._skeletons[roles]
        parts, spans, length = [], Spans(), 0
        for piece, turn, end in zip(skeleton.pieces[:-1], row, skeleton.ends, strict=True):
            text = turn.text.strip() if skeleton.strips else turn.text
            start = length + len(piece)
            length = start + len(text)
            parts += [piece, text]
            if turn.role == ASSISTANT:
                spans.append((start, length + end))
        whole = "".join(parts) + skeleton.pieces[-1]
        if self._rendered(row) != whole:
            raise InputError(
                "the chat template changes the texts of this conversation, so that the model would not be trained on "
                "what it says; fix the row, or set task.template"
            )
        return whole, spans

    def _skeleton(self, roles: Sequence[str]) -> Skeleton:
        marks = [f"placeholder{number}z" for number in range(len(roles))]
        rest = self._rendered([Turn(role, f" {mark} ") for role, mark in zip(roles, marks, strict=True)])
        strips = f" {marks[-1]} " not in rest
        pieces = []
        for mark in marks:
            piece, one, rest = rest.partition(mark if strips else f" {mark} ")
            if not one:
                raise InputError("the chat template leaves out a turn; set task.template")
            pieces.append(piece)
        pieces.append(rest)
        return Skeleton(tuple(pieces), tuple(_end_mark(after, self._tokenizer) for after in pieces[1:]), strips)

    def _rendered(self, row: Sequence[Turn]) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in row]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # whatever Jinja raises, and what a template itself does
            raise InputError(f"the chat template refuses such a conversation: {first_line(error)}") from error


def _end_mark(after: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many characters after an answer end it: up to its first special token, 0 where there is none."""
    special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    special += [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = re.match(rf"\s*?({'|'.join(map(re.escape, special))})", after) if special else None
    return found.end() if found else 0
