"""Devices train language models, pictures and numbers as the simulation does, and refuse what they are not for.

Mutants these tests reject: terms that do not say which tokenizer or template reads a row; rows written for devices in
another order or with other pixels.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlr.client.doctor import read_terms
from fedlr.client.own_rows import read_rows
from fedlr.client.policy import check_terms
from fedlr.client.settings import Settings, load_settings
from fedlr.client.trainee import Trainee
from fedlr.config.build import build
from fedlr.config.schema import Experiment, compose_experiment
from fedlr.errors import InputError
from fedlr.flower.task_terms import reading_sha256
from fedlr.flower.terms import Terms
from fedlr.models.causal import tiny_random_causal
from fedlr.models.network import BaseModel
from fedlr.runs.directory import LEDGER
from fedlr.server.federation import assemble as assemble_served
from fedlr.server.terms import write_terms
from fedlr.simulations.federation import assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.simulate import run_rounds
from fedlr.tasks.synthetic_chat import WORDS
from fedlr.training.threads import torch_threads
from tests.client.device_files import (
    device_settings,
    tiny_language_model,
    tiny_picture_model,
    write_chats,
    write_pictures,
)
from tests.server.live_superlink import ROOT
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


def several_labels(folder: Path) -> tuple[str, ...]:
    """Write made-up texts of several labels each; return the words that train on them."""
    path = folder / "labels.jsonl"
    names = ("odd", "round", "late")
    rows = [{"text": f"word number {n} of the letters", "labels": names[: n % 4]} for n in range(60)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    given = ("task=text_multilabel", "data=multilabel_table", "partition=iid", "data.public=true", "data.num_test=12")
    return ("experiment=tiny", *given, f"data.path={path}", "data.labels=[odd,round,late]", "data.max_length=32", *SIZE)


@pytest.mark.parametrize(
    "words",
    [
        LANGUAGE,
        (*LANGUAGE, "privacy=none", "trainer.engine=opacus", "task.template=plain", "task.max_response=4"),
        PICTURES,
        (*PICTURES, "method=fedavg", "adapter.train_head=true", "trainer.engine=opacus"),
        ("scores",),
        ("several labels", "adapter.train_head=true"),
    ],
    ids=["conversations", "conversations, a limit", "pictures", "pictures, a head", "scores", "several labels"],
)
def test_devices_train_what_the_simulation_trains(words: tuple[str, ...], tmp_path: Path) -> None:
    rows = {"scores": scores_of, "several labels": several_labels}.get(words[0])
    words = words if rows is None else (*rows(tmp_path), *words[1:])
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
            settings = load_settings(f.files[0])
            Trainee.prepare(settings, wrong, read_rows(settings), say=f.said.append)


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


def words_of_page() -> list[str]:
    """Return the overrides that docs/operator.md has for other tasks, one line for each."""
    page = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]


def settings_of_page(folder: Path, number: int, state: Path) -> Settings:
    """Return the settings of docs/client_yaml.md for conversations or pictures, with what else a device needs."""
    page = (ROOT / "docs" / "client_yaml.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[number])
    shown["model"]["name_or_path"] = str(folder / "model")
    shown["data"]["path"] = str(folder / ("rows.jsonl" if number == 0 else "rows"))
    if "image_size" in shown["data"]:
        shown["data"]["image_size"] = 16
    policy = {**shown.pop("policy", {}), "allowed_models": ["0" * 64]}
    return device_settings(state, **shown, **{f"policy__{key}": value for key, value in policy.items()})


@pytest.mark.parametrize("number", [0, 1], ids=["conversations", "pictures"])
def test_what_the_pages_say_of_other_tasks_goes_together(number: int, tmp_path: Path) -> None:
    base = [tiny_language_model(), tiny_picture_model()][number]
    base.network.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(str(tmp_path / "model"))
    write_chats(tmp_path / "rows.jsonl")
    write_pictures(tmp_path / "rows", labels=("cat", "dog"))
    words = words_of_page()[number].split()
    replaced = {"model.name_or_path": tmp_path / "model", "data.path": tmp_path / ("rows.jsonl", "rows")[number]}
    words = [next((f"{k}={v}" for k, v in replaced.items() if word.startswith(f"{k}=")), word) for word in words]
    words += ["data.max_length=32"] if number == 0 else []  # a tiny model reads no more
    out = tmp_path / "terms.json"
    said = write_terms(compose_experiment(["runtime=superlink", "privacy.accountant=rdp", *words]), out, run_dir=None)
    assert ("causal_lm", "image_classification")[number] in said
    settings = settings_of_page(tmp_path, number, tmp_path / "device")
    terms = read_terms(out)
    loaded = own_model_unchecked(settings, terms)
    policy = settings.policy.model_copy(update={"allowed_models": [loaded]})
    check_terms(terms, settings.model_copy(update={"policy": policy}))
    made = Trainee.prepare(settings.model_copy(update={"policy": policy}), terms, read_rows(settings), say=print)
    assert len(made.share) == 40


def own_model_unchecked(settings: Settings, terms: Terms) -> str:
    """Return the hash that an owner copies into the policy."""
    base: BaseModel = build(settings.model.section(), "model", label_names=settings.output_names, seed=terms.seed)
    return base.body_sha256
