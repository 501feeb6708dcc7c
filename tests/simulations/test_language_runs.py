"""A language model through the whole program: trained with privacy, scored, stated, exported, asked with plain PEFT."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.models.causal import pretrained_causal, tiny_random_causal
from fedlr.models.usage import code_of_card
from fedlr.simulations.federation import prepare
from fedlr.simulations.plan import make_plan
from fedlr.simulations.simulate import simulate
from fedlr.tasks.causal_lm import CausalLM
from tests.causal_families import save_causal

FEW = ("num_rounds=2", "num_clients=3", "cohort_size=2")
SMALL = ("experiment=tiny_lm", *FEW, "data.num_examples=120")
CHAT = ("experiment=chat", *FEW, "privacy.max_participations=2", "privacy.accountant=rdp")


def run(folder: Path, *words: str, small: Sequence[str] = SMALL) -> tuple[Path, list[dict], dict]:
    """Run a small experiment; return its directory, the lines of its metrics and its summary."""
    run_dir = simulate(compose_experiment([*small, f"tracking.output_dir={folder}", *words]), say=lambda line: None)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return run_dir, rows, json.loads((run_dir / "summary.json").read_text())


def adapter_of(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], dict]:
    return run(tmp_path_factory.mktemp("private"))


def test_a_private_run_is_scored_stated_and_judged(private) -> None:
    run_dir, rows, summary = private
    assert [row["rounds_completed"] for row in rows] == [0, 1, 2]
    assert {"perplexity", "macro_perplexity", "perplexity of colour", "loss_error", "nats of token 1"} <= set(
        rows[-1]["measures"]
    )
    assert rows[-1]["measures"]["perplexity"] < rows[0]["measures"]["perplexity"] == pytest.approx(143.6, abs=30)
    assert summary["measures"] == rows[-1]["measures"] and summary["verdict"]["word"] in ("learned", "cannot be told")
    assert "perplexity moved from" in summary["verdict"]["seen"] and summary["label_names"] == []
    assert json.loads((run_dir / "privacy.json").read_text())["unit"]
    assert (run_dir / "report.html").stat().st_size > 10_000
    partition = json.loads((run_dir / "partition.json").read_text())
    assert partition["labels"] == ["rows"] and len(partition["clients"]) == 3


def test_the_same_configuration_gives_the_same_adapter(private, tmp_path: Path) -> None:
    assert run(tmp_path)[2]["adapter_sha256"] == private[2]["adapter_sha256"]


@pytest.mark.parametrize("mode", ["hooks", "ghost", "loop"])
def test_other_engines_give_the_fused_engines_adapter(private, mode: str, tmp_path: Path) -> None:
    other = run(tmp_path, "trainer.engine=opacus", f"trainer.grad_sample_mode={mode}")
    wanted = adapter_of(private[0])
    for name, tensor in adapter_of(other[0]).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_kept_states_of_the_frozen_layers_give_the_adapter_of_the_whole_model(tmp_path: Path) -> None:
    words = ["adapter.layers=[1]", f"runtime.cache_dir={tmp_path / 'states'}", "trainer.optimizer.lr=4.0"]
    kept, rows, _ = run(tmp_path / "kept", *words, "runtime.cache_prefix=true")
    whole, wanted, _ = run(tmp_path / "whole", *words)
    assert len(list((tmp_path / "states").glob("*.table"))) == 2
    of_whole = adapter_of(whole)
    for name, tensor in adapter_of(kept).items():
        torch.testing.assert_close(tensor, of_whole[name], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(rows, wanted, strict=True):
        assert ours["measures"]["perplexity"] == pytest.approx(theirs["measures"]["perplexity"], rel=1e-4)


def test_the_adapter_opens_with_plain_peft_and_the_card_asks_it(
    private, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, rows, _ = private
    folder = run_dir / "adapter"
    federation = prepare(compose_experiment([*SMALL]), seed=0)
    base = tiny_random_causal(seed=0)
    model = PeftModel.from_pretrained(base.network, folder).eval()
    batch, task = federation.test.batch(range(len(federation.test))), CausalLM()
    found = task.evaluation([task.answers(model, batch)])
    assert found.measures["perplexity"] == pytest.approx(rows[-1]["measures"]["perplexity"], rel=1e-4)
    card = (folder / "README.md").read_text()
    assert "chat template of SHA-256" in card and "Labels" not in card
    monkeypatch.chdir(folder)
    exec(compile(code_of_card(card) or "", "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_plan_says_what_will_be_spent() -> None:
    told = make_plan(compose_experiment([*SMALL]))
    assert "held-out rows, whose loss at the end must be below" in told and "epsilon" in told and "time" in told


def chats(path: Path, num_rows: int = 60) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"word{i}"}, {"role": "assistant", "content": f"word{i % 7}"}]}
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_strangers_chats_train_a_model_of_his_own(tmp_path: Path) -> None:
    folder = save_causal("qwen2", tmp_path / "model")
    words = [f"data.path={chats(tmp_path / 'c.jsonl')}", "data.max_length=32", f"model.name_or_path={folder}"]
    run_dir, rows, _ = run(tmp_path, *words, small=CHAT)
    assert rows[-1]["num_trained"] == 2
    model = PeftModel.from_pretrained(pretrained_causal(name_or_path=str(folder)).network, run_dir / "adapter")
    assert type(model).__name__ == "PeftModelForCausalLM"


REFUSED: Sequence[tuple[str, str]] = [
    ("adapter.train_head=true", "adapter.train_head=false with task=causal_lm"),
    ("partition=dirichlet", "partition=iid, by_group or by_file"),
    ("model=tiny", "model=causal"),
    ("data=synthetic", "Expected data=chat (or dictionaries, synthetic_chat) with task=causal_lm"),
    ("data=vader", "got table, whose rows have labels"),
    ("task=text_classification", "task=causal_lm with model._target_=tiny_random_causal"),
    ("task.template=llama", "task.template to be null or one of chatml, plain, alpaca"),
    ("task.max_response=0", "task.max_response in"),
    ("data.max_length=65", "data.max_length <= model.max_length=64"),
    ("adapter.target_modules=[lm_head]", "lm_head"),
    ("runtime=flower runtime.cache_prefix=true", "runtime.cache_prefix=false with task=causal_lm and runtime=flower"),
    ("runtime=superlink runtime.cache_prefix=true", "cache_prefix=false with task=causal_lm and runtime=superlink"),
]


@pytest.mark.parametrize(("word", "told"), REFUSED, ids=[word for word, _ in REFUSED])
def test_what_does_not_fit_is_one_sentence_before_any_work(word: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        prepare(compose_experiment([*SMALL, *word.split()]), seed=0)
    assert told in str(error.value)
