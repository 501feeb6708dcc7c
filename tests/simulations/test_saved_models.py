"""Checkpoints that were saved and loaded train with a head, and their model card gives the run's own score.

Every family is tiny and has random weights (`tests/families.py`). The Python of each card is run as it stands, in a
fresh process, in the adapter's folder.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.models.usage import code_of_card
from fedlr.runs.tables import load_examples
from fedlr.simulations.simulate import simulate
from fedlr.tasks.reading import _ending, num_positions
from fedlr.tasks.tokenise import TokenisedText
from tests.families import FAMILIES, NUM_TOKENS, end_tokenizer, save_family

FAST = (
    "experiment=tiny",
    "model=pretrained",
    "data.num_examples=60",
    "data.num_test=12",
    "data.max_length=32",
    "num_clients=2",
    "cohort_size=2",
    "num_rounds=1",
    "trainer.num_steps=2",
    "trainer.sample_rate=0.5",
    "trainer.divisor=10",
    "runtime.num_workers=1",
    "tracking.run_no_privacy=false",
    "tracking.run_alone=false",
    "adapter.train_head=true",
    "seed=3",
)

# Runs several cards one after another, each in its own folder and namespace, and scores the texts it is given.
RUNNER = """
import json, os, sys, torch
found = {}
for name, case in json.load(open(sys.argv[1])).items():
    os.chdir(case["folder"])
    space = {"__name__": "__main__"}
    exec(compile(case["code"], name, "exec"), space)
    chances = space["classify"](case["texts"])
    found[name] = -torch.log(chances[range(len(chances)), case["labels"]]).mean().item()
json.dump(found, open(sys.argv[2], "w"))
"""


def overrides(name: str, base: Path, output: Path) -> list[str]:
    family = FAMILIES[name]
    return [
        *FAST,
        f"model.name_or_path={base}",
        f"adapter.target_modules=[{','.join(family.targets)}]",
        f"tracking.output_dir={output}",
        *family.trainer,
    ]


def run(name: str, folder: Path, *more: str) -> tuple[Path, dict]:
    """Train a family; return its directory, and what its card is asked."""
    chosen = [*overrides(name, save_family(name, folder / "base"), folder / "out"), *more]
    run_dir = simulate(compose_experiment(chosen), say=lambda line: None)
    card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    _, held_out = load_examples(compose_experiment(chosen), seed=3)
    case = {"folder": str(run_dir / "adapter"), "code": code_of_card(card), "texts": list(held_out.texts)}
    return run_dir, {**case, "labels": held_out.labels.tolist()}


def own_loss(run_dir: Path) -> float:
    return float(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["loss"])


def card_losses(cases: dict[str, dict], folder: Path) -> dict[str, float]:
    asked, told = folder / "cases.json", folder / "found.json"
    asked.write_text(json.dumps(cases))
    call = [sys.executable, "-c", RUNNER, str(asked), str(told)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(told.read_text())


def test_every_family_trains_and_its_card_gives_the_runs_own_score(tmp_path: Path) -> None:
    runs = {name: run(name, tmp_path / name.replace(" ", "_")) for name in FAMILIES}
    found = card_losses({name: case for name, (_, case) in runs.items()}, tmp_path)
    differences = {name: abs(found[name] - own_loss(run_dir)) for name, (run_dir, _) in runs.items()}
    assert max(differences.values()) <= 1e-4, differences


POOLED = {
    "bert": ("cls", "mean_normalised"),
    "roberta": ("last",),
    "distilbert": ("mean",),
    "qwen2": ("last_normalised",),
}


def test_a_card_of_pooled_features_gives_the_runs_own_score_with_a_class_of_fifteen_lines(tmp_path: Path) -> None:
    runs = {
        f"{name} {pooling}": run(name, tmp_path / f"{name}_{pooling}", f"model.pooling={pooling}")
        for name, poolings in POOLED.items()
        for pooling in poolings
    }
    found = card_losses({name: case for name, (_, case) in runs.items()}, tmp_path)
    differences = {name: abs(found[name] - own_loss(run_dir)) for name, (run_dir, _) in runs.items()}
    assert max(differences.values()) <= 1e-4, differences
    for name, (run_dir, case) in runs.items():
        start, end = case["code"].index("class Classifier"), case["code"].index("@torch.no_grad")
        assert "fedlr" not in case["code"]
        assert len([line for line in case["code"][start:end].splitlines() if line.strip()]) <= 15, name
        card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
        assert f"pooling `{name.split()[1]}`" in card
        assert "class Classifier" in (run_dir / "report.html").read_text(encoding="utf-8")


def refused(folder: Path, name: str, *more: str, **tokenizer: object) -> str:
    """Return the one line that a configuration of a saved family is refused with; nothing is left behind."""
    base = save_family(name, folder / name.replace(" ", "_"), **tokenizer)
    with pytest.raises(InputError) as error:
        simulate(compose_experiment([*overrides(name, base, folder / "out"), *more]), say=lambda line: None)
    assert not (folder / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_head_or_an_embedding_is_no_place_for_an_adapter(tmp_path: Path) -> None:
    for name, targets in (("bert", "[query,classifier]"), ("llama", "[q_proj,score]"), ("t5", "[q,out_proj]")):
        said = refused(tmp_path, name, f"adapter.target_modules={targets}")
        assert "adapter.train_head=true" in said
    said = refused(tmp_path, "bert", "adapter.target_modules='.*(query|classifier)'")
    assert "adapter.train_head=true" in said
    said = refused(tmp_path, "bert", "adapter.target_modules=[word_embeddings]")
    assert "linear layers" in said and "word_embeddings" in said
    said = refused(tmp_path, "t5", "adapter.target_modules=[query]")
    assert "classification_head" not in said and "out_proj" not in said
    said = refused(tmp_path, "bert", "adapter.target_modules=[q_proj]")
    assert "classifier" not in said


def test_texts_are_no_longer_than_the_positions_of_the_model(tmp_path: Path) -> None:
    for name in ("bert", "roberta", "gpt2", "llama", "bart"):
        longest = FAMILIES[name].longest
        said = refused(tmp_path, name, f"data.max_length={longest + 1}")
        assert f"max_length <= {longest}" in said


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path: Path) -> None:
    base = save_family("bert", tmp_path / "base")
    tokenizer = end_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(NUM_TOKENS)])
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match=f"at most {NUM_TOKENS} tokens"):
        simulate(compose_experiment(overrides("bert", base, tmp_path / "out")), say=lambda line: None)


def test_a_model_that_reads_the_end_token_needs_a_tokenizer_that_writes_it(tmp_path: Path) -> None:
    assert "end token" in refused(tmp_path, "t5", ends=False)


def test_deberta_is_refused_with_the_way_out(tmp_path: Path) -> None:
    said = refused(tmp_path, "deberta", "trainer.engine=fused", "trainer.grad_sample_mode=hooks")
    assert "trainer.engine=opacus trainer.grad_sample_mode=loop" in said


def test_positions_are_those_of_the_family() -> None:
    for name, family in FAMILIES.items():
        network = AutoModelForSequenceClassification.from_config(family.build().config)
        assert num_positions(network) == family.longest, name


def test_an_end_token_inside_a_text_is_left_out() -> None:
    texts = TokenisedText(
        ids=np.array([2, 5, 3, 6, 3, 2, 3], dtype=np.int32),
        offsets=np.array([0, 5, 7]),
        labels=np.zeros(2, dtype=np.int64),
        pad_id=0,
        num_truncated=0,
    )
    found = _ending(texts, 3)
    assert found.ids.tolist() == [2, 5, 6, 3, 2, 3]
    assert found.offsets.tolist() == [0, 4, 6]


def test_the_adapters_configuration_names_what_has_an_adapter(tmp_path: Path) -> None:
    run_dir, _ = run("roberta", tmp_path, "adapter.target_modules=[dense]")
    claimed = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())["target_modules"]
    held = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    with_factors = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in held if ".lora_" in key}
    assert set(claimed) == with_factors
