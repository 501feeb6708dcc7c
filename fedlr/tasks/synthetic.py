"""Made-up labelled sentences that a tiny model with random weights can learn: for tests, and for a first run
offline.

Each sentence has one or more signal words of its label among filler words, for example "the film is so good
and the actor seems really happy". The nouns tell the domain (the `groups`), not the label.
"""

import numpy as np

from fedlr.data.table import LabelledText
from fedlr.errors import InputError, in_range
from fedlr.streams import Purpose, stream

_SIGNALS = {
    "negative": "bad awful sad boring broken ugly angry poor",
    "positive": "good great happy lovely perfect pretty kind rich",
    "cold": "icy frozen snowy chilly frosty wintry",
    "warm": "sunny hot tropical mild toasty summery",
    "loud": "noisy booming shrill roaring blaring thundering",
    "quiet": "silent hushed muted still whispered soft",
    "old": "ancient antique rusty faded aged historic",
    "new": "modern recent fresh latest novel upcoming",
}
_NOUNS = {
    "film": "film actor story scene director ending song plot",
    "home": "house kitchen garden window door chair table roof",
    "shop": "shop price box phone cable seller camera battery",
    "town": "street park bridge market station bus museum crowd",
}
_VERBS = "is was seems looks feels became remains sounds".split()
_ADVERBS = "very so really quite rather often always again today somehow".split()
_JOINTS = "and while because but since though".split()
_ARTICLES = "the this that my our their".split()

MAX_LABELS = len(_SIGNALS)
MAX_CLAUSES = 500_000  # of all sentences together: some 10 s

# Every word that can occur, sorted: a word-level tokenizer built on it knows every text.
VOCABULARY: tuple[str, ...] = tuple(
    sorted({w for words in [*_SIGNALS.values(), *_NOUNS.values()] for w in words.split()}
           | {*_VERBS, *_ADVERBS, *_JOINTS, *_ARTICLES})
)  # fmt: skip


def synthetic_text(
    num_examples: int, seed: int, *, num_labels: int = 2, num_clauses: int = 2, label_noise: float = 0.0
) -> LabelledText:
    """Make `num_examples` sentences of `num_clauses` clauses (4 or 5 words each, and a joint) with labels in
    equal number.

    Every clause has one signal word. A share of about `label_noise` of the examples carries a wrong label.
    `groups` is one of four domains. The same arguments give the same texts, and all words are in
    `VOCABULARY`.

    Raises:
        InputError: for a number out of range.
    """
    in_range(2, MAX_LABELS, num_labels=num_labels)
    in_range(1, 200_000, num_examples=num_examples)
    in_range(1, 100, num_clauses=num_clauses)
    if num_examples < num_labels:
        raise InputError(f"Expected num_examples >= num_labels ({num_labels}), got {num_examples}")
    if num_examples * num_clauses > MAX_CLAUSES:
        raise InputError(
            f"Expected num_examples <= {MAX_CLAUSES // num_clauses} of num_clauses={num_clauses}, got {num_examples}"
        )
    if not 0 <= label_noise < 1:
        raise InputError(f"Expected label_noise in [0, 1), got {label_noise}")
    generator = stream(seed, Purpose.DATA)
    names, domains = tuple(_SIGNALS)[:num_labels], tuple(_NOUNS)
    meant = generator.permutation(np.arange(num_examples, dtype=np.int64) % num_labels)
    groups = tuple(domains[i] for i in generator.integers(len(domains), size=num_examples))
    subjects = zip(meant, groups, strict=True)
    texts = tuple(_sentence(names[label], domain, num_clauses, generator) for label, domain in subjects)
    wrong = generator.random(num_examples) < label_noise
    shift = generator.integers(1, num_labels, size=num_examples)
    labels = np.where(wrong, (meant + shift) % num_labels, meant)
    return LabelledText(texts, labels, names, groups, f"synthetic text (seed {seed})")


def _sentence(label: str, domain: str, num_clauses: int, generator: np.random.Generator) -> str:
    nouns, signals = _NOUNS[domain].split(), _SIGNALS[label].split()

    def clause() -> str:
        adverbs = [_pick(_ADVERBS, generator)] if generator.random() < 0.5 else []
        words = [_pick(_ARTICLES, generator), _pick(nouns, generator), _pick(_VERBS, generator), *adverbs]
        return " ".join([*words, _pick(signals, generator)])

    sentence = clause()
    for _ in range(num_clauses - 1):
        sentence += f" {_pick(_JOINTS, generator)} {clause()}"
    return sentence


def _pick(words: list[str], generator: np.random.Generator) -> str:
    return words[int(generator.integers(len(words)))]
