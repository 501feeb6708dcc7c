"""docs/language_models.md does what it says: its commands and its Python run, on a small model and small files."""

import json
import re
import shlex
from pathlib import Path

import pytest

from fedlr.simulations import cli
from fedlr.simulations.evaluate_command import evaluate
from tests.causal_families import save_causal

PAGE = (Path(__file__).parents[1] / "docs" / "language_models.md").read_text(encoding="utf-8")
FEW = ["num_rounds=1", "num_clients=2", "cohort_size=2", "privacy.max_participations=1", "privacy.accountant=rdp"]
WORDS = [f"word{number}" for number in range(60)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def lines(path: str, rows: list[dict[str, object]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat(first: int, last: int) -> list[dict[str, object]]:
    turns = [({"role": "user", "content": word}, {"role": "assistant", "content": f"{word} it is"}) for word in WORDS]
    return [{"messages": list(pair)} for pair in turns[first:last]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's run in a folder with the files that it names."""
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_causal("llama", folder / "my-model")
        lines("chats.jsonl", chat(0, 40))
        lines("questions.jsonl", chat(40, 44))
        pairs = [f"say {word},the {word},{'ab'[n % 2]}" for n, word in enumerate(WORDS[50:54])]
        Path("pairs.csv").write_text("\n".join(["prompt,response,topic", *pairs]) + "\n", encoding="utf-8")
        lines("mmlu.jsonl", [{"question": "which", "choices": ["one", "two"], "answer": "B"}])
        lines("hellaswag.jsonl", [{"ctx": "it is", "endings": ["one", "two words"], "label": 1}])
        plan, simulate = (shlex.split(line)[1:] for line in blocks("sh")[0].splitlines())
        assert cli.plan([*plan[1:], *FEW, "data.max_length=48"]) == 0
        assert cli.simulate([*simulate[1:], *FEW, "data.max_length=48"]) == 0
    return next((folder / "outputs" / "chat").iterdir())


@pytest.mark.parametrize("line", blocks("sh")[1].splitlines(), ids=lambda line: line.split("RUN_DIR ")[1][:20])
def test_its_scores_are_told(line: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--generate" in line:
        pytest.importorskip("rouge_score")
    if "--harness" in line:
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(run_dir.parents[2])
    Path("my-tasks").mkdir(exist_ok=True)
    Path("my-tasks/colours.yaml").write_text(
        "task: colours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: hellaswag.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{ctx}}'\ndoc_to_choice: endings\n"
        "doc_to_target: '{{label}}'\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    _, name, *words = shlex.split(line.replace("RUN_DIR", str(run_dir)))
    assert name == "evaluate" and evaluate(words) == 0
    assert json.loads((run_dir / "evaluation.json").read_text())["evaluations"]


def test_its_python_merges_the_adapter(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parents[2])
    (code,) = blocks("python")
    exec(compile(code.replace("RUN_DIR", str(run_dir)), "page", "exec"), {})
    assert (Path("merged") / "model.safetensors").exists() and (Path("merged") / "chat_template.jinja").exists()
