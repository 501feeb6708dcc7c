"""What a language model remembers of secrets planted in one client's rows: exposure with and without privacy.

`python -m fedlr.simulations.memorisation FOLDER [KEY=VALUE ...]` makes up questions for six clients, gives the first of
them secrets beside its own rows (each with a question of its own, in one, four or sixteen copies), trains a tiny
language model on all of them without and with privacy, and ranks each secret among all that it could have been, by the
likelihood that the model gives it. About two processor minutes; all rows are made up.

Exposure is log2 of the number of candidates less log2 of the secret's rank (Carlini, Liu, Erlingsson, Kos and Song
2019, "The Secret Sharer", section 4). Of a model that never saw the secret a rank is uniform and the mean exposure
1.44; the most, log2 of all candidates, says that the secret is likelier than everything else.

A copy of a row is a row: epsilon is about one of them, and says less of c copies, which are a group of c.
"""

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedlr.config.offline import go_offline
from fedlr.data.choices import Question
from fedlr.errors import InputError
from fedlr.files import make_folder, write_whole
from fedlr.runs.directory import SUMMARY, read_json, write_json
from fedlr.tasks.synthetic_chat import WORDS, synthetic_chat

COPIES = (1, 4, 16)
NUM_SECRETS = 4  # of each number of copies
NUM_WORDS, LENGTH = 16, 3  # candidates: so many words, that many in a secret
NUM_CLIENTS, NUM_ROWS = 6, 300
ARMS: Mapping[str, str] = {"no privacy": "privacy=none", "private": "privacy=dp"}
# A row's gradient counts for what a small model can remember: all layers, many rounds, whole cohorts.
RECIPE = (
    "experiment=tiny_lm",
    "data=chat",
    "data.max_length=32",
    "data.group_column=client",
    "data.num_test=null",
    "partition=by_group",
    f"num_clients={NUM_CLIENTS}",
    f"cohort_size={NUM_CLIENTS}",
    "num_rounds=40",
    "method=fedit",
    "adapter.rank=16",
    "adapter.lora_alpha=16",
    "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    "trainer.num_steps=4",
    "trainer.sample_rate=0.25",
    "trainer=adamw",
    "trainer.optimizer.lr=0.01",
    "data.public=true",
)


@dataclass(frozen=True)
class Secret:
    """A question that only one client has, its secret answer, and how often it stands there."""

    question: str
    answer: str
    copies: int


@dataclass(frozen=True)
class Remembered:
    """What a model makes of a secret; the rank counts from 1, among all candidates."""

    arm: str
    copies: int
    rank: int
    exposure: float  # bits
    extracted: bool  # said it, asked for it, the likeliest word each time


def candidates() -> list[str]:
    """Return every answer that a secret could have been, in one order."""
    words = WORDS[:: len(WORDS) // NUM_WORDS][:NUM_WORDS]
    return [" ".join(parts) for parts in itertools.product(words, repeat=LENGTH)]


def secrets(seed: int) -> list[Secret]:
    """Draw secrets, each with a question of its own."""
    generator = np.random.default_rng(seed)
    answers = generator.choice(candidates(), size=NUM_SECRETS * len(COPIES), replace=False)
    openings = generator.choice([f"{a} {b} {c}" for a, b, c in itertools.permutations(WORDS[-12:], 3)], 1000, False)
    return [
        Secret(f"what is {openings[place]}", str(answer), COPIES[place % len(COPIES)])
        for place, answer in enumerate(answers)
    ]


def exposure(rank: int, num_candidates: int) -> float:
    """Return the exposure of a secret of this rank, in bits.

    >>> exposure(1, 4096), exposure(4096, 4096)
    (12.0, 0.0)
    """
    return math.log2(num_candidates) - math.log2(rank)


def write_rows(folder: Path, planted: Sequence[Secret], *, seed: int) -> None:
    """Write what clients train on, and rows to score, which hold no secret."""
    rows = synthetic_chat(NUM_ROWS + 60, seed)
    turns = [[{"role": turn.role, "content": turn.text} for turn in row] for row in rows.turns]
    own = [{"messages": turns[n], "client": f"client{n % NUM_CLIENTS}"} for n in range(NUM_ROWS)]
    for secret in planted:
        asked = [{"role": "user", "content": secret.question}, {"role": "assistant", "content": secret.answer}]
        own += [{"messages": asked, "client": "client0"}] * secret.copies
    seen = {json.dumps(row["messages"]) for row in own}
    test = [{"messages": row, "client": "client0"} for row in turns[NUM_ROWS:] if json.dumps(row) not in seen]
    for name, some in (("train", own), ("test", test)):
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in some))


def remembered(run_dir: Path, planted: Sequence[Secret], *, arm: str, is_base: bool = False) -> list[Remembered]:
    """Return the rank of each secret by the released adapter of a run, or by its base model."""
    from fedlr.runs.directory import recorded_experiment
    from fedlr.simulations.evaluate import open_run
    from fedlr.tasks.greedy import Prompt, greedy_answers
    from fedlr.tasks.multiple_choice import likelihoods

    run = open_run(run_dir, recorded_experiment(run_dir), read_json(run_dir / SUMMARY))
    tokenizer, every = run.base.tokenizer, candidates()
    found = []
    with run.as_arm("base" if is_base else "released"):
        for secret in planted:
            turns = [{"role": "user", "content": secret.question}]
            prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
            nats = likelihoods(run.model, [Question(prompt, tuple(every), 0)], tokenizer, max_length=64)
            rank = 1 + int((nats > nats[every.index(secret.answer)]).sum())
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            (said,), _ = greedy_answers(
                run.model, [Prompt(tuple(ids), secret.question, secret.answer)], tokenizer, max_new_tokens=LENGTH
            )
            found.append(Remembered(arm, secret.copies, rank, exposure(rank, len(every)), said == secret.answer))
    return found


def measure(folder: Path, words: Sequence[str], *, seed: int) -> list[Remembered]:
    """Write the rows, train without and with privacy, and rank the secrets by each model."""
    from fedlr.runs.commands import ready
    from fedlr.simulations.simulate import simulate

    planted = secrets(seed)
    write_rows(folder, planted, seed=seed)
    found: list[Remembered] = []
    for arm, privacy in ARMS.items():
        paths = [f"data.path={folder / 'train.jsonl'}", f"data.test_path={folder / 'test.jsonl'}"]
        experiment = ready([*RECIPE, privacy, *paths, f"tracking.output_dir={folder}", f"seed={seed}", *words])
        run_dir = simulate(experiment, say=lambda line: None)
        summary = read_json(run_dir / SUMMARY)
        epsilon = summary["epsilon_max"]
        name = arm if epsilon is None else f"epsilon {epsilon:.3g}"
        if not found:
            found += remembered(run_dir, planted, arm="not trained", is_base=True)
        found += remembered(run_dir, planted, arm=name)
        print(f"{name}: perplexity {summary['start_score']:.4g} to {summary['final_score']:.4g}, {run_dir}", flush=True)
    return found


def table(found: Sequence[Remembered]) -> list[str]:
    """Return the lines of a table: mean exposure and extracted secrets by arm and copies."""
    told = [f"{'':<14}" + "".join(f"{_copies(copies):>18}" for copies in COPIES)]
    for arm in dict.fromkeys(one.arm for one in found):
        cells = []
        for copies in COPIES:
            own = [one for one in found if (one.arm, one.copies) == (arm, copies)]
            bits = fmean(one.exposure for one in own)
            cells.append(f"{bits:.1f} bits, {sum(one.extracted for one in own)} of {len(own)}")
        told.append(f"{arm:<14}" + "".join(f"{cell:>18}" for cell in cells))
    return told


def _copies(number: int) -> str:
    return "1 copy" if number == 1 else f"{number} copies"


def picture(found: Sequence[Remembered]) -> str:
    """Return an SVG: the exposure of each secret by arm, a panel for each number of copies."""
    from fedlr.runs.report.paper_files import for_print
    from fedlr.runs.report.picture import drawn
    from fedlr.runs.report.svg import SERIES, colour

    arms, most = list(dict.fromkeys(one.arm for one in found)), math.log2(len(candidates()))

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, len(COPIES), sharey=True, squeeze=False)[0]
        for axes, copies in zip(panels, COPIES, strict=True):
            axes.axhline(most, color=colour("ink"), linewidth=0.8)
            axes.axhline(1 / math.log(2), color=colour("ink"), linewidth=0.8, linestyle=":")
            for place, arm in enumerate(arms):
                bits = [one.exposure for one in found if (one.arm, one.copies) == (arm, copies)]
                shifts = np.linspace(-0.2, 0.2, len(bits))
                axes.plot(place + shifts, bits, "o", markersize=4, color=colour(SERIES[place % len(SERIES)]))
                axes.plot([place - 0.3, place + 0.3], [fmean(bits)] * 2, color=colour(SERIES[place % len(SERIES)]))
            axes.set_title(f"{_copies(copies)} of a secret", fontsize=9)
            axes.set_xticks(range(len(arms)), arms, fontsize=7)
            axes.set_ylim(-0.5, most + 0.8)
        panels[0].set_ylabel("Exposure (bits)")

    caption = "A dot is a secret; the line above is the most there is, the dotted one what chance gives."
    svg = drawn("memorisation", "What the model remembers", caption, paint, is_wide=True).svg
    assert svg is not None
    return for_print(svg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment into a new folder; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or "=" in words[0] or words[0].startswith("-"):
        print("python -m fedlr.simulations.memorisation FOLDER [KEY=VALUE ...]", file=sys.stderr)
        return 2
    go_offline(True)
    folder = Path(words[0])
    seeds = [word for word in words[1:] if word.startswith("seed=")]
    try:
        found = measure(make_folder(folder), words[1:], seed=int(seeds[-1].removeprefix("seed=")) if seeds else 0)
    except InputError as error:
        print(f"fedlr.simulations.memorisation: {error}", file=sys.stderr)
        return error.exit_code
    told: dict[str, Any] = {"candidates": len(candidates()), "secrets": [asdict(one) for one in found]}
    write_json(folder / "memorisation.json", told)
    write_whole(folder / "memorisation.svg", picture(found))
    print("\n".join(["", *table(found), "", f"written: {folder / 'memorisation.svg'}, memorisation.json"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
