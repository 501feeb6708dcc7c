"""What one client's update of B tells of its row: words are read back from its row space, with noise and without.

    python examples/gradient_inversion.py [NUM_TEXTS] [PICTURE.svg]

One step on one text, by the client's own code. With A frozen and known (FFA-LoRA), the gradient of B is a sum over the
text's tokens of (error of the output) (A x)^T, x being a token's input: its rows lie in the span of the A x. In the
first layer x is a public vector for each word and place. So whoever knows the base tries all words at each place, and
keeps the one whose A x lies nearest to that span. Nothing is guessed of the text but its length, and it works while the
text has fewer tokens than the adapter has ranks. After Petrov et al. 2024 (DAGER), section 4; here from B alone.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fedlr
from fedlr.adapters.state import LORA_A, LORA_B, ClientUpdate
from fedlr.data import from_frame
from fedlr.data.partition import Partition
from fedlr.data.table import LabelledText
from fedlr.runs.report.svg import FULL_WIDTH_IN, colour, inline_svg, standing_alone
from fedlr.simulations.federation import Federation
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.runtime import make_pool

TABLE = Path(".assets/vader.csv")
MOST_WORDS = 14  # of a text
WORDS = (
    *(
        "experiment=text",
        "method=ffa_lora",
        "partition=iid",
        "data.public=true",
        "data.num_test=2",
        "data.max_length=32",
    ),
    *("adapter.rank=32", "adapter.layers=[0]", "adapter.target_modules=[query,value]", "adapter.train_head=false"),
    *("model=minilm", "model.pooling=null", "model.head_std=0.1", "runtime.cache_prefix=false", "seed=0"),
    "privacy.max_grad_norm=0.0005",  # below every gradient here, so that noise is measured by what it hides
    *("trainer.divisor=1", "trainer.optimizer.lr=1", "runtime.num_workers=1"),
)
WEAK = ("num_rounds=1", "privacy.accountant=rdp")
# What is added to the one clipped gradient; the last is the noise of experiment=demo, whose 20 rounds spend 6.
ARMS: Mapping[str, tuple[str, ...]] = {
    "no privacy": ("privacy=none", "num_rounds=1"),
    "sigma 0.001": (*WEAK, "privacy.epsilon=1e6", "privacy.noise_multiplier=0.001"),
    "sigma 0.01": (*WEAK, "privacy.epsilon=1e5", "privacy.noise_multiplier=0.01"),
    "epsilon 6": ("privacy.epsilon=6", "num_rounds=20"),
}


@dataclass(frozen=True)
class Read:
    """One text, by its tokens, and what an update gave away of it at each place."""

    tokens: tuple[int, ...]
    found: tuple[int, ...]

    @property
    def num_right(self) -> int:
        return sum(token == guess for token, guess in zip(self.tokens, self.found, strict=True))


def short_texts(seed: int, num_texts: int) -> LabelledText:
    """Return short texts of VADER's public table, of each label as many: two more than are held."""
    frame = pandas.read_csv(TABLE)
    short = frame[frame["text"].str.split().str.len().between(5, MOST_WORDS)]
    chosen = short.groupby("label").sample(num_texts // 2 + 1, random_state=seed)
    return from_frame(chosen, labels=["negative", "positive"], name="vader")


def one_each(data: LabelledText, *, num_clients: int, seed: int) -> Partition:
    """Give each text to a client of its own."""
    return Partition(tuple(np.array([row]) for row in range(len(data))), depends_on="")


def updates_of(federation: Federation, folder: Path) -> Iterator[tuple[tuple[int, ...], ClientUpdate]]:
    """Yield the tokens of each client's text, and what the client sends after one step on it."""
    ledger = create_ledger(federation, folder / "ledger.jsonl")
    pool = make_pool(federation, ledger)
    for outcome in pool.train(federation.request(), range(len(federation.clients))):
        if isinstance(outcome, ClientUpdate):
            text = federation.clients[outcome.client_id]
            inputs = text.table.batch(text.rows).inputs
            yield tuple(inputs["input_ids"][0][: int(inputs["attention_mask"][0].sum())].tolist()), outcome
    pool.close()


class Reader:
    """Reads words back from updates of B: knows the base, A, and nothing of any client.

    Args:
        federation: whose start and base everybody has.
    """

    def __init__(self, federation: Federation) -> None:
        self._start = federation.start.adapter.tensors
        self._embeddings = federation.base.network.base_model.embeddings
        self._seen: dict[int, dict[str, Tensor]] = {}  # by place and layer: A x of each word, (V, R)

    @torch.no_grad()
    def read(self, update: ClientUpdate, *, num_tokens: int) -> tuple[int, ...]:
        """Return the word at each place whose A x lies nearest to the row space of B's step, over all layers."""
        spans = {}
        for slot, sent in update.tensors.items():
            if slot.role == LORA_B:
                spans[slot.path] = torch.linalg.svd(sent - self._start[slot], full_matrices=False)[2][:num_tokens]
        found = []
        for place in range(num_tokens):
            distances = [far_from(seen, spans[path]) for path, seen in self.seen(place).items()]
            found.append(int(sum(distances, torch.zeros(1)).argmin()))
        return tuple(found)

    def seen(self, place: int) -> dict[str, Tensor]:
        """Return A x of every word of the vocabulary at a place, by layer, (V, R)."""
        if place not in self._seen:
            words = torch.arange(self._embeddings.word_embeddings.num_embeddings)[:, None]
            x = self._embeddings(input_ids=words, position_ids=torch.full_like(words, place))[:, 0]
            factors = {slot.path: a for slot, a in self._start.items() if slot.role == LORA_A}
            self._seen[place] = {path: x @ a.T for path, a in factors.items()}
        return self._seen[place]


def far_from(vectors: Tensor, directions: Tensor) -> Tensor:
    """Return how far vectors (V, R) lie from the span of orthonormal directions (T, R), relative to their length."""
    outside = vectors - vectors @ directions.T @ directions
    return outside.norm(dim=1) / vectors.norm(dim=1)


def read_arm(words: Sequence[str], num_texts: int) -> tuple[Federation, list[Read]]:
    """Train each of `num_texts` clients for one step, and read its text back from what it sends."""
    words = [*WORDS, *words, f"data.num_texts={num_texts}", f"num_clients={num_texts}", "cohort_size=null"]
    parts = {"data": short_texts, "partition": one_each}
    federation = fedlr.federation(*words, parts=parts, say=None)
    reader = Reader(federation)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            Read(tokens, reader.read(update, num_tokens=len(tokens)))
            for tokens, update in updates_of(federation, Path(folder))
        ]
    return federation, found


def share_right(found: Sequence[Read]) -> float:
    """Return the share of all places whose word was found, both marks of the ends left out."""
    right = sum(Read(one.tokens[1:-1], one.found[1:-1]).num_right for one in found)
    return right / sum(len(one.tokens) - 2 for one in found)


def picture(arms: Mapping[str, Sequence[Read]], names: Sequence[str]) -> str:
    """Return an SVG: the shortest text as it is, and as each arm's update gives it away."""
    reads = {name: min(found, key=lambda one: len(one.tokens)) for name, found in arms.items()}
    row = next(iter(reads.values())).tokens[1:-1]
    lines = [("the row", row), *((name, one.found[1:-1]) for name, one in reads.items())]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axis("off")
        for y, (name, tokens) in enumerate(lines):
            axes.text(0, -y, name, fontweight="bold", va="center")
            for place, (token, right) in enumerate(zip(tokens, row, strict=True)):
                is_read = bool(y) and token == right
                shade = colour("vermillion" if is_read else "muted" if y else "ink")
                weight = "bold" if is_read else "normal"
                axes.text(1.6 + place, -y, names[token][:11], va="center", fontsize=8, color=shade, fontweight=weight)
        axes.set_xlim(0, 1.8 + len(row))
        axes.set_ylim(0.6 - len(lines), 0.6)

    title = "What one update of B gives away of its row: words that are read back right are bold"
    return standing_alone(inline_svg("inversion", title, paint, width_in=FULL_WIDTH_IN, height_in=1.7))


def main(arguments: Sequence[str]) -> None:
    """Print what each arm gives away, and draw the first text."""
    num_texts = int(arguments[0]) if arguments else 20
    path = Path(arguments[1] if len(arguments) > 1 else "gradient_inversion.svg")
    arms: dict[str, list[Read]] = {}
    names: list[str] = []
    for name, words in ARMS.items():
        federation, arms[name] = read_arm(words, num_texts)
        names = federation.base.tokenizer.convert_ids_to_tokens(range(len(federation.base.tokenizer)))
        num_words = sum(len(one.tokens) - 2 for one in arms[name])
        print(f"{name:<12} {100 * share_right(arms[name]):5.1f} % of {num_words} words are read back", flush=True)
    path.write_text(picture(arms, names), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
