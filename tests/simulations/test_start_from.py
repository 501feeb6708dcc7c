"""A run that begins with the adapter of an earlier one: the same model, a folder that is believed nothing, own noise.

Mutant this file kills: a second run of the same seed that draws the noise of the first again.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.models.adapter_config import AdapterConfig
from fedlr.privacy.statement import recompute
from fedlr.simulations.federation import Federation, prepare
from fedlr.simulations.simulate import simulate
from fedlr.streams import SeededRandomness
from tests.simulations.small_runs import experiment, lines

WORDS = ("method=ffa_lora", "adapter.train_head=true", "trainer.optimizer.lr=8")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    return simulate(experiment(*WORDS, f"tracking.output_dir={folder}"), say=lambda line: None)


@pytest.fixture
def copy(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first / "adapter", tmp_path / "adapter"))


def started(folder: Path, *words: str) -> Federation:
    return prepare(experiment(*WORDS, f"adapter.start_from={folder}", *words), seed=0)


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_second_run_begins_where_the_first_ended_and_its_statement_counts_both(first: Path, tmp_path: Path) -> None:
    words = (*WORDS, f"adapter.start_from={first / 'adapter'}", "num_rounds=1", f"tracking.output_dir={tmp_path}")
    second = simulate(experiment(*words), say=lambda line: None)
    ended, begun = lines(first / "metrics.jsonl")[-1], lines(second / "metrics.jsonl")[0]
    assert begun["accuracy"] == ended["accuracy"] and begun["loss"] == pytest.approx(ended["loss"])
    before, found = read(first / "privacy.json"), read(second / "privacy.json")
    record = found["started_from"]
    assert record["adapter_sha256"] == read(first / "summary.json")["adapter_sha256"]  # type: ignore[index]
    total = before["epsilon"]["maximum"] + found["epsilon"]["maximum"]  # type: ignore[index]
    assert record["epsilon_sum"] == pytest.approx(total)  # type: ignore[index]
    assert recompute(second) == found
    for path in (second / "report.html", second / "adapter" / "README.md"):
        assert "for a row that both runs read the two add up to" in path.read_text(encoding="utf-8")
    forged = found | {"started_from": {**record, "epsilon_sum": 0.1}}  # type: ignore[dict-item]
    (second / "privacy.json").write_text(json.dumps(forged), encoding="utf-8")
    with pytest.raises(InputError, match="other values of started_from"):
        recompute(second)


def test_the_start_is_the_exported_adapter_to_the_bit(first: Path) -> None:
    f = started(first / "adapter")
    assert f.start.adapter.fingerprint() == read(first / "summary.json")["adapter_sha256"]


def draws_the_same_noise(f: Federation) -> bool:
    key = {"client": 0, "round_index": 0, "step": 0}
    return bool(SeededRandomness(0).noise(**key).normal() == f.randomness.noise(**key).normal())


def test_a_run_of_the_same_seed_draws_other_noise_than_its_start_did(first: Path) -> None:
    assert not draws_the_same_noise(started(first / "adapter"))
    assert draws_the_same_noise(prepare(experiment(*WORDS), seed=0))
    assert started(first / "adapter").randomness == started(first / "adapter").randomness


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("adapter.rank=2", "adapter.lora_alpha=2"), "got base_model.model.bert.encoder.layer.0"),
        (("adapter.lora_alpha=8",), "Expected the scale lora_alpha / rank = 2 of this run's adapter"),
        (("model.hidden_size=64",), "Expected an adapter of this run's base model, SHA-256"),
        (("adapter.target_modules=[query]",), "take adapter.rank, adapter.layers, adapter.target_modules"),
        (("adapter.init_lora_weights=pissa",), "Expected adapter.init_lora_weights=true with adapter.start_from"),
        (("adapter=vera", "method=fedavg", "trainer.engine=opacus"), "Expected adapter=lora with adapter.start_from"),
        (("runtime=flower",), "Expected privacy.randomness=os seed=null with adapter.start_from and runtime=flower"),
    ],
)
def test_what_differs_from_the_earlier_run_is_one_error(first: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        started(first / "adapter", *words)
    assert message in str(error.value) and str(error.value).count("Expected") == 1


def change_card(folder: Path, old: str, new: str) -> None:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    assert old in text
    card.write_text(text.replace(old, new), encoding="utf-8")


def change_number(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1}, folder / "adapter_model.safetensors")


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] * float("nan")}, folder / "adapter_model.safetensors")


CHANGES = {
    "a number": (change_number, "Expected the adapter of its model card"),
    "no number": (not_a_number, "Expected finite numbers of torch.float32"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "Expected the tensors of an adapter in"),
    "broken weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"pickle"), "Expected the tensors of"),
    "no card": (lambda f: (f / "README.md").unlink(), "RUN_DIR/adapter, got"),
    "another's card": (lambda f: (f / "README.md").write_text("# LoRA"), "Expected a model card of fedlr in"),
    "labels": (lambda f: change_card(f, "Labels: 0 =", "Labels: 1 ="), "Expected an adapter of these labels"),
    "statement": (lambda f: change_card(f, '"delta": 1e-05', '"delta": 7'), "Expected the privacy statement of the"),
    "no statement": (lambda f: change_card(f, "```json", "```"), "Expected the privacy statement of the earlier run"),
    "configuration": (
        lambda f: (f / "adapter_config.json").write_text("[" * 99_999),
        "Expected the configuration of a",
    ),
    "dora": (
        lambda f: (f / "adapter_config.json").write_text(
            '{"r": 4, "lora_alpha": 4, "peft_type": "LORA", "use_dora": 1}'
        ),
        "Expected plain LoRA of one scale",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_was_changed_is_refused_with_one_line(copy: Path, change: str) -> None:
    act, message = CHANGES[change]
    act(copy)  # type: ignore[no-untyped-call]
    with pytest.raises(InputError) as error:
        started(copy)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_devices_are_given_the_start_and_hear_nothing_of_the_folder(first: Path) -> None:
    e = experiment(*WORDS, f"adapter.start_from={first / 'adapter'}")
    about = {"experiment_id": "0" * 32, "seed": 0, "model_sha256": "0" * 64, "label_names": ["a", "b"]}
    assert "start_from" not in Terms.of(e, None, **about).text()  # type: ignore[arg-type]
    config = AdapterConfig(rank=1, lora_alpha=1.0, target_modules=["x"])
    assert "start_from" not in config.model_dump()
