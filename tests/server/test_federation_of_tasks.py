"""Devices train language models, pictures and numbers as the simulation does, and refuse what they are not for.

Mutants these tests reject: terms that do not say which tokenizer or template reads a row; rows written for devices in
another order or with other pixels.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.settings import load_settings
from client.trainee import Trainee
from fedlr.config.schema import Experiment, compose_experiment
from fedlr.errors import InputError
from fedlr.flower.task_terms import reading_sha256
from fedlr.models.causal import tiny_random_causal
from fedlr.runs.directory import LEDGER
from fedlr.tasks.synthetic_chat import WORDS
from fedlr.training.threads import torch_threads
from server.federation import assemble as assemble_served
from simulations.federation import assemble
from simulations.ledgers import create_ledger
from simulations.simulate import run_rounds
from tests.server.whole_federation import Federation, close_all, difference, lines
from tests.simulations.small_runs import quiet

SIZE = ("num_clients=3", "cohort_size=3", "num_rounds=2", "runtime.num_workers=1")
LANGUAGE = ("experiment=tiny_lm", "data.num_examples=90", *SIZE)
PICTURES = ("experiment=tiny_images", "data.num_examples=90", "data.num_test=24", "partition=iid", *SIZE)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    close_all()


def served(*words: str) -> Experiment:
    return compose_experiment([*words, "runtime=flower"])


def simulated(folder: Path, *words: str) -> Any:
    """Return the last state of the same experiment in one process."""
    e = compose_experiment(list(words))
    folder.mkdir()
    with torch_threads(1):
        f = assemble(e, seed=e.seed or 0)
        state, *_ = run_rounds(f, folder, ledger=create_ledger(f, folder / LEDGER), progress=quiet(e))
    return state


def scores_of(folder: Path) -> tuple[str, ...]:
    """Write made-up texts with numbers; return the words that train on them."""
    path = folder / "scores.jsonl"
    rows = [{"text": f"word number {n} of the letters", "score": n % 6} for n in range(60)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    given = ("task=text_regression", "data=scored_table", "partition=iid", "data.public=true", "data.num_test=12")
    return ("experiment=tiny", *given, f"data.path={path}", "data.score_range=[0,5]", "data.max_length=32", *SIZE)


@pytest.mark.parametrize(
    "words",
    [
        LANGUAGE,
        (*LANGUAGE, "privacy=none", "trainer.engine=opacus", "task.template=plain", "task.max_response=4"),
        PICTURES,
        (*PICTURES, "method=fedavg", "adapter.train_head=true", "trainer.engine=opacus"),
        ("scores",),
    ],
    ids=["conversations", "conversations, a limit", "pictures", "pictures, a head", "scores"],
)
def test_devices_train_what_the_simulation_trains(words: tuple[str, ...], tmp_path: Path) -> None:
    words = scores_of(tmp_path) if words == ("scores",) else words
    run = Federation(served(*words), tmp_path).finish()
    expected = simulated(tmp_path / "simulated", *words)
    assert run.progress.state.round_index == expected.round_index == 2
    assert difference(run.progress.state, expected) <= 1e-6
    ours, theirs = (lines(folder / "metrics.jsonl") for folder in (run.run_dir, tmp_path / "simulated"))
    assert [row["num_trained"] for row in ours] == [row["num_trained"] for row in theirs] == [0, 3, 3]
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], abs=1e-5)
    run.leave_behind()
    summary = json.loads((run.run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["final_score"] == pytest.approx(
        summary["measures"].get(summary["metric"]["name"], ours[-1]["accuracy"])
    )
    assert (run.run_dir / "adapter" / "README.md").is_file()


def test_plain_texts_are_learnt_without_a_template(tmp_path: Path) -> None:
    rows = [{"text": " ".join(WORDS[n % 40 : n % 40 + 6])} for n in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    words = [word for word in LANGUAGE if not word.startswith("data.")]
    words += ["data=chat", "data.format=text", f"data.path={path}", "data.public=true", "data.max_length=32"]
    run = Federation(served(*words), tmp_path).finish()
    assert difference(run.progress.state, simulated(tmp_path / "simulated", *words)) <= 1e-6
    asked = run.served.terms.task
    assert asked is not None and asked.name == "causal_lm" and not asked.has_turns


def test_the_rows_of_a_device_are_those_of_its_settings_and_no_other_kind(tmp_path: Path) -> None:
    f = Federation(served(*LANGUAGE), tmp_path)
    terms = assemble_served(f.experiment, seed=0, experiment_id="0" * 32).terms
    assert terms.task is not None and terms.task.name == "causal_lm"
    plain = terms.model_copy(update={"task": terms.task.model_copy(update={"has_turns": False})})
    for wrong, words in ((plain, "tokenizer"), (terms.model_copy(update={"model_sha256": "0" * 64}), "base model")):
        with pytest.raises(InputError, match=f"Expected the {words}"):
            Trainee.prepare(load_settings(f.files[0]), wrong, say=f.said.append)


def test_a_tokenizer_has_one_hash_whatever_it_was_last_asked_for() -> None:
    base = tiny_random_causal(seed=0)
    before = reading_sha256(base, has_turns=True)
    base.tokenizer("red green", truncation=True, max_length=1, padding="max_length")
    assert reading_sha256(base, has_turns=True) == before
    others = [
        reading_sha256(base),
        reading_sha256(base, template="plain", has_turns=True),
        reading_sha256(tiny_random_causal(seed=0, words=[*WORDS, "unheard"]), has_turns=True),
        reading_sha256(replace(base, tokenizer=_with_other_end(base.tokenizer)), has_turns=True),
    ]
    assert len({before, *others}) == 5
    assert reading_sha256(tiny_random_causal(seed=1), has_turns=True) == before, "weights are no part of it"


def _with_other_end(tokenizer: Any) -> Any:
    tokenizer.eos_token = "<|im_start|>"
    return tokenizer
