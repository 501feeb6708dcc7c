"""`fedlr evaluate`: a finished run's adapter, scored on rows that its user names as public.

Mutants: a command that reads a changed adapter, that takes a configuration which names code, or that scores the rows
clients trained on under another name.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlr.config.schema import compose_experiment
from simulations.evaluate import Asked, evaluate_run
from simulations.simulate import simulate

FEW = ("num_rounds=2", "num_clients=3", "cohort_size=2", "tracking.run_alone=false", "tracking.run_no_privacy=false")


def run_of(folder: Path, *words: str) -> Path:
    return simulate(compose_experiment([*FEW, *words, f"tracking.output_dir={folder}"]), say=lambda line: None)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("language"), "experiment=tiny_lm", "data.num_examples=120")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda run_dir: Path(shutil.copytree(run_dir, tmp_path / "run"))


def scores(run_dir: Path, **asked: object) -> list:
    return evaluate_run(run_dir, Asked(**asked), say=lambda line: None)[0]  # type: ignore[arg-type]


def test_the_released_adapter_scores_what_the_run_scored_on_its_held_out_rows(language: Path) -> None:
    (rows,) = scores(language, on="held-out")
    states = [json.loads(line) for line in (language / "metrics.jsonl").read_text().splitlines()]
    for found, state in ((rows.base, states[0]), (rows.released, states[-1])):
        assert found["perplexity"] == pytest.approx(state["measures"]["perplexity"], rel=1e-4)
        assert found["macro_perplexity"] == pytest.approx(state["measures"]["macro_perplexity"], rel=1e-4)
        assert found["next tokens right"] == pytest.approx(state["accuracy"], abs=1e-6)


def test_answers_are_those_of_plain_transformers(language: Path) -> None:
    pytest.importorskip("rouge_score", reason="pip install 'fedlr[eval]'")
    rows, answers = scores(language, on="held-out", generate=12, show=3)
    from peft import PeftModel
    from transformers import AutoTokenizer

    from fedlr.models.causal import tiny_random_causal

    tokenizer = AutoTokenizer.from_pretrained(language / "adapter")
    for arm in ("base", "released"):
        model = tiny_random_causal(seed=0).network
        model = PeftModel.from_pretrained(model, language / "adapter").eval() if arm == "released" else model.eval()
        for sample in answers.samples:
            turns = [{"role": "user", "content": sample.prompt}]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
            assert tokenizer.decode(said, skip_special_tokens=True).strip() == getattr(sample, arm)
    assert answers.num_rows == rows.num_rows and 0 <= answers.released["exact_match"] <= 1


def questions(folder: Path) -> dict[str, str]:
    """Files of both formats, of words that the small model knows."""
    hellaswag = [
        {"ctx": f"what colour is the {thing}", "endings": ["red", "blue green", "small"], "label": str(place)}
        for place, thing in enumerate(("apple", "sky", "mouse"))
    ]
    mmlu = [{"question": "which is big", "choices": ["sky", "mouse"], "answer": place} for place in (0, 1)]
    found = {}
    for name, rows in (("hellaswag", hellaswag), ("mmlu", mmlu)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[name] = str(path)
    return found


def test_a_choice_is_the_likeliest_by_plain_logits(language: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from fedlr.models.causal import tiny_random_causal

    path = questions(tmp_path)["hellaswag"]
    (found,) = scores(language, questions={"hellaswag": path})
    tokenizer, model = AutoTokenizer.from_pretrained(language / "adapter"), tiny_random_causal(seed=0).network.eval()
    right = [0, 0]
    for row in map(json.loads, Path(path).read_text().splitlines()):
        sums = []
        for ending in row["endings"]:
            before = tokenizer(row["ctx"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([before + tokenizer(ending, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(float(logs.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum()))
        by_length = [value / len(ending) for value, ending in zip(sums, row["endings"], strict=True)]
        for place, values in enumerate((sums, by_length)):
            right[place] += max(range(3), key=values.__getitem__) == int(row["label"])
    assert [found.base["accuracy"], found.base["accuracy by length"]] == [right[0] / 3, right[1] / 3]
    assert found.base["chance"] == pytest.approx(1 / 3)


def harness_task(folder: Path, path: str) -> None:
    (folder / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {path}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{ctx}}'\ndoc_to_choice: endings\n"
        "doc_to_target: '{{label|int}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        encoding="utf-8",
    )


@pytest.mark.slow
def test_the_harness_finds_the_same_choices(language: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'fedlr[harness]'")
    path = questions(tmp_path)["hellaswag"]
    harness_task(tmp_path, path)
    ours, theirs = scores(language, questions={"hellaswag": path}, harness=("colours",), harness_tasks=str(tmp_path))
    for arm in ("base", "released"):
        own, other = getattr(ours, arm), getattr(theirs, arm)
        assert (own["accuracy"], own["accuracy by length"]) == (other["acc"], other["acc_norm"])
    assert theirs.num_rows == ours.num_rows == 3
