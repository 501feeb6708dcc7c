"""Made-up questions and answers that a tiny language model with random weights can learn: for tests, and a first run.

A question names a thing and asks for a property of it, such as "what colour is the apple"; the answer says it in a
sentence, "the apple is red". The topic of the question is the group of the row.
"""

import numpy as np

from fedlr.data.conversations import ASSISTANT, USER, Conversations, Turn
from fedlr.errors import in_range
from fedlr.streams import Purpose, stream

_TOPICS = {
    "colour": ("red green blue yellow white black", "apple leaf sky lemon snow coal rose grass sea sun"),
    "size": ("tiny small large huge wide narrow", "ant mouse horse whale river path tower pin"),
    "taste": ("sweet sour bitter salty fresh plain", "honey vinegar coffee soup bread melon rice plum"),
    "sound": ("loud quiet shrill soft deep clear", "drum whisper whistle flute bell thunder clock rain"),
}
_OPENINGS = "tell me please say now".split()
_ENDINGS = "today always indeed here".split()

# Every word that can occur, sorted: a word-level tokenizer built on it knows every text.
WORDS: tuple[str, ...] = tuple(
    sorted({word for values, things in _TOPICS.values() for word in f"{values} {things}".split()}
           | {*_TOPICS, *_OPENINGS, *_ENDINGS, "what", "is", "the", "has"})
)  # fmt: skip


def synthetic_chat(num_examples: int, seed: int) -> Conversations:
    """Make so many questions with answers; the same arguments give the same ones.

    The property of a thing is drawn once, so that it can be learnt.

    Raises:
        InputError: for a number out of range.
    """
    in_range(2, 200_000, num_examples=num_examples)
    generator = stream(seed, Purpose.DATA)
    facts = {
        topic: {thing: str(generator.choice(values.split())) for thing in things.split()}
        for topic, (values, things) in _TOPICS.items()
    }
    topics = [str(topic) for topic in generator.choice(list(_TOPICS), size=num_examples)]
    rows = []
    for topic in topics:
        thing = str(generator.choice(list(facts[topic])))
        opening, ending = str(generator.choice(_OPENINGS)), str(generator.choice(_ENDINGS))
        answer = f"the {thing} is {facts[topic][thing]} {ending}"
        rows.append((Turn(USER, f"{opening} what {topic} has the {thing}"), Turn(ASSISTANT, answer)))
    numbers = np.arange(1, num_examples + 1, dtype=np.int64)
    return Conversations(tuple(rows), numbers, tuple(topics), f"synthetic chat (seed {seed})")
