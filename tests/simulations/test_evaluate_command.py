"""`fedlr evaluate`: a finished run's adapter, scored on rows that its user names as public.

Mutants: a command that reads a changed adapter, that takes a configuration which names code, or that scores the rows
clients trained on under another name.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.models import released
from fedlr.runs.evaluations import EvaluationEntry, add_evaluations
from fedlr.simulations.evaluate import Asked, chose_by, evaluate_run
from fedlr.simulations.evaluate_command import evaluate, lines_of
from fedlr.simulations.simulate import simulate

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


def conversations(path: Path, words: str) -> Path:
    """A file with one conversation for each word."""
    rows = [
        [
            {"role": "user", "content": f"what colour is the {word}"},
            {"role": "assistant", "content": f"the {word} is red"},
        ]
        for word in words.split()
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run on a file of conversations."""
    folder = tmp_path_factory.mktemp("private")
    own = conversations(folder / "own.jsonl", "apple leaf sky lemon snow coal rose grass sea sun " * 4)
    words = ["experiment=tiny_lm", "data=chat", f"data.path={own}", "data.max_length=32", "num_rounds=1"]
    return run_of(folder, *words, "num_clients=2", "trainer.num_steps=1")


def test_a_public_table_is_read_as_the_runs_rows_were_and_by_group(private: Path, tmp_path: Path) -> None:
    table = conversations(tmp_path / "public.jsonl", "ant mouse horse")
    (rows,) = scores(private, on=str(table))
    assert rows.num_rows == 3 and rows.sha256 is not None and set(rows.released) >= {"perplexity", "next tokens right"}
    grouped, topics = tmp_path / "grouped.jsonl", zip("aba", "ant sea sun".split(), strict=True)
    lines = [{"prompt": f"say {word}", "response": f"the {word}", "of": topic} for topic, word in topics]
    grouped.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (rows,) = scores(private, on=str(grouped), changes={"format": "prompt_response", "group_column": "of"})
    by_group = [rows.released[f"perplexity of {name}"] for name in "ab"]
    assert rows.released["macro_perplexity"] == pytest.approx((by_group[0] * by_group[1]) ** 0.5)


@pytest.mark.parametrize("how", ["itself", "a copy", "one of its rows"])
def test_rows_that_clients_train_on_are_refused(private: Path, how: str, tmp_path: Path) -> None:
    own = private.parents[1] / "own.jsonl"
    table = {
        "itself": lambda: own,
        "a copy": lambda: Path(shutil.copy(own, tmp_path / "copy.jsonl")),
        "one of its rows": lambda: conversations(
            tmp_path / "some.jsonl", "ant mouse apple leaf sky lemon snow coal rose"
        ),
    }[how]()
    with pytest.raises(InputError, match="holds some; those are private: no score is noised"):
        scores(private, on=str(table))


def test_a_changed_adapter_is_refused_and_nothing_else_sees_it(
    language: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = copy_of(language)
    path = run_dir / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # of a number: safetensors reads it as another one
    path.write_bytes(data)
    with pytest.raises(InputError, match="adapter_model.safetensors as the run wrote it"):
        scores(run_dir, on="held-out")
    recorded = json.loads((run_dir / "summary.json").read_text())["adapter_files"]
    monkeypatch.setattr(released, "released_files", lambda folder: recorded)  # the mutant: it believes the record
    assert scores(run_dir, on="held-out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"base_model_class": "Popen", "parent_library": "subprocess"}),
        ("megatron_config", {"tensor_model_parallel_size": 1}),
    ],
)
def test_an_adapter_whose_configuration_names_code_is_refused(
    language: Path, copy_of: Callable[[Path], Path], key: str, value: object
) -> None:
    run_dir = copy_of(language)
    path = run_dir / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    recorded = json.loads((run_dir / "summary.json").read_text())
    recorded["adapter_files"] = released.released_files(run_dir / "adapter")  # by a stranger, who wrote both
    (run_dir / "summary.json").write_text(json.dumps(recorded))
    with pytest.raises(InputError, match=f"Expected {key} to be null"):
        scores(run_dir, on="held-out")


def edited(run_dir: Path, **changes: object) -> Path:
    path = run_dir / "summary.json"
    summary = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in summary.items() if value != "gone"}))
    return run_dir


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"finished": False}, "Expected a finished run"),
        ({"adapter_files": "gone"}, "an older version wrote it"),
        ({"base_sha256": "00ff"}, "Expected the base model of the run"),
        ({"label_names": None}, "an older version wrote it"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(
    language: Path, copy_of: Callable[[Path], Path], changes: dict[str, object], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        scores(edited(copy_of(language), **changes), on="held-out")


ASKED = [
    ({}, "Expected --on TABLE"),
    ({"generate": 4, "questions": {"mmlu": "x.jsonl"}}, "Expected --on TABLE .* with --generate"),
    ({"on": "held-out", "show": 2}, "with --show"),
    ({"on": "held-out", "changes": {"format": "alpaca"}}, "Expected no data.format with --on held-out"),
    ({"on": "no-such.jsonl"}, "no-such.jsonl"),
    ({"questions": {"mmlu": "no-such.jsonl"}}, "no-such.jsonl"),
    ({"questions": {"mmlu": "questions.txt"}}, "file of questions"),
]


@pytest.mark.parametrize(("asked", "told"), ASKED, ids=[told for _, told in ASKED])
def test_what_cannot_be_scored_is_one_sentence(language: Path, asked: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        scores(language, **asked)


def test_scores_stand_in_the_run_its_report_and_the_terminal(
    language: Path, copy_of: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, path = copy_of(language), questions(tmp_path)["mmlu"]
    for _ in range(2):
        assert evaluate([str(run_dir), "--mmlu", path]) == 0
    printed = capsys.readouterr().out
    assert "accuracy by length" in printed and "released" in printed and "evaluation.json" in printed
    (entry,) = json.loads((run_dir / "evaluation.json").read_text())["evaluations"]
    assert entry["kind"] == "mmlu" and entry["num_rows"] == 2 and entry["base"].keys() == entry["released"].keys()
    page = (run_dir / "report.html").read_text()
    assert "Scored afterwards" in page and "another adapter" not in page
    assert evaluate([str(run_dir), "--mmlu"]) == 2
    assert evaluate([str(run_dir), "--mmlu", path, "name=x"]) == 2


def test_a_table_is_added_to_others_and_takes_its_own_place(tmp_path: Path) -> None:
    def names() -> list[tuple[str, float]]:
        found = json.loads((tmp_path / "evaluation.json").read_text())["evaluations"]
        return [(one["of"], one["released"]["loss"]) for one in found]

    for of, loss in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        add_evaluations(tmp_path, [EvaluationEntry("rows", of, None, 1, {"loss": loss})], adapter_sha256="ff")
    assert names() == [("b", 2.0), ("a", 3.0)]
    (tmp_path / "evaluation.json").write_text('{"evaluations": 3}')
    with pytest.raises(InputError, match="Expected a list of evaluations"):
        add_evaluations(tmp_path, [], adapter_sha256="ff")
    assert (tmp_path / "evaluation.json").read_text() == '{"evaluations": 3}'


@pytest.mark.parametrize("words", [("experiment=tiny",), ("experiment=tiny_images",)], ids=["texts", "pictures"])
def test_classifiers_score_what_their_run_scored(words: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, *words, "data.num_examples=120", "data.num_test=0.3")
    (rows,) = scores(run_dir, on="held-out")
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert rows.base is None and rows.released["accuracy"] == pytest.approx(last["accuracy"])
    assert rows.released["loss"] == pytest.approx(last["loss"], rel=1e-4) and "macro_f1" in rows.released
    with pytest.raises(InputError, match="Expected --generate of a language model"):
        scores(run_dir, on="held-out", generate=3)


def test_a_run_of_another_machine_and_of_personal_parts_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_of(tmp_path, "experiment=tiny_lm", "data.num_examples=60", "method=fedsa_lora")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path, told = run_dir / "config.yaml", list[str]()
    monkeypatch.setattr("fedlr.models.products.has_onednn", lambda: False)
    monkeypatch.setattr("fedlr.simulations.evaluate.has_onednn", lambda: False)
    text = path.read_text().replace("device: cpu", "device: cuda")
    path.write_text(re.sub("matmul: .*", "matmul: onednn", text))
    (rows,), _ = evaluate_run(run_dir, Asked(on="held-out"), say=told.append)
    assert rows.base is not None and "which is not here" in told[0]
    assert "by oneDNN, which this PyTorch lacks" in told[1] and "each client kept its own lora_B" in told[2]


def test_a_table_in_the_terminal_has_a_column_for_the_base_only_where_it_answers() -> None:
    of_classes = EvaluationEntry("rows", "a.csv", None, 8, {"accuracy": 0.75}, None)
    of_language = EvaluationEntry("rows", "b.csv", None, 8, {"loss": 3.5}, {"loss": 4.25})
    assert lines_of([of_classes])[-1].split() == ["accuracy", "0.75"] and "base" not in lines_of([of_classes])[0]
    assert lines_of([of_classes, of_language])[-1].split() == ["loss", "4.25", "3.5"]


def test_scores_on_the_rows_that_chose_the_model_are_said_to_flatter_it(tmp_path: Path) -> None:
    mine, copy, other = (tmp_path / name for name in ("mine.csv", "copy.csv", "other.csv"))
    for path, row in ((mine, "a,b"), (copy, "a,b"), (other, "c,d")):
        path.write_text(f"text,label\n{row}\n", encoding="utf-8")
    words = ["experiment=text", f"data.path={other}", "data.labels=[b,d]", f"data.validation_path={mine}"]
    chooses, last = (compose_experiment([*words, f"release={release}"]) for release in ("best", "last"))
    assert chose_by(chooses, str(mine)) and chose_by(chooses, str(copy))
    assert not any(chose_by(chooses, table) for table in (str(other), "held-out", None))
    assert not chose_by(last, str(mine))
    mine.unlink()
    assert not chose_by(chooses, str(copy))
