"""Reports of one, three and twenty rounds, of runs for nothing, and of base models that are nowhere.

Mutants: ticks where no round was; epsilon rounded to the nearest, or in two ways on one page.
"""

import json
import re
from pathlib import Path

import pytest

from fedlr.runs.report import write_comparison, write_report
from fedlr.runs.report.page import report_page
from fedlr.runs.report.reproduce import is_folder
from fedlr.runs.report.run_files import read_run
from fedlr.simulations import cli
from tests.report.run_directory import write_lines, write_run


def labels_of_rounds(page: str, picture: str) -> list[str]:
    """Return the tick labels of a picture that are whole numbers, those of the first axes alone."""
    (figure,) = re.findall(rf'<figure id="{picture}".*?</figure>', page, flags=re.DOTALL)
    return re.findall(r'<g id="[^"]*xtick_\d+">.*?>([-−\d]+)</text>', figure, flags=re.DOTALL)


@pytest.mark.parametrize(("num_rounds", "most"), [(1, 1), (3, 3), (20, 9)])
def test_bars_have_ticks_where_rounds_are_and_nowhere_else(tmp_path: Path, num_rounds: int, most: int) -> None:
    page = write_report(write_run(tmp_path / "run", num_rounds=num_rounds)).read_text()
    for picture in ("time", "traffic"):
        ticks = labels_of_rounds(page, picture)
        assert ticks and {int(tick.replace("−", "-")) for tick in ticks} <= set(range(1, num_rounds + 1)), ticks
        assert str(num_rounds) in ticks and len(set(ticks)) <= most + 1


def test_one_epsilon_is_written_in_one_way_on_a_page(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", budget=5.24)  # the largest is 5.18236
    (run_dir / "privacy.json").write_text('{"unit": "one example"}')
    text = re.sub(r"<details>.*?</details>|<svg.*?</svg>", "", report_page(read_run(run_dir)), flags=re.DOTALL)
    assert set(re.findall(r"5\.1[89]\d*", text)) == {"5.183"}


@pytest.mark.parametrize(
    ("model", "base", "told", "absent"),
    [
        ("tiny_random\n  hidden_size: 32", "tiny-random", "made up from its seed", "from_pretrained"),
        ("pretrained\n  name_or_path: ./enc", "./enc", "put your own path", "hub)"),
        (
            "pretrained\n  name_or_path: pkg:a/model",
            "pkg:a/model",
            "resolve(&#x27;pkg:a/model&#x27;)",
            "no fedlr needed",
        ),
        ("pretrained\n  name_or_path: a/b", "a/b", "no fedlr needed", "put your own path"),
    ],
)
def test_the_page_says_where_the_base_model_is(tmp_path: Path, model: str, base: str, told: str, absent: str) -> None:
    run_dir = write_run(tmp_path / "run")
    with (run_dir / "config.yaml").open("a") as file:
        file.write(f"model:\n  _target_: fedlr.models.network.{model}\n")
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    (run_dir / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    page = report_page(read_run(run_dir))
    assert told in page and absent not in page
    assert is_folder(base) == base.startswith(".")


def test_rounds_and_runs_for_nothing_are_warned_of(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", change={"problem": "Expected an update, got none"})
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows[2:4]:
        row |= {"num_trained": 0, "reasons": {"too_large": 5}}
    write_lines(run_dir / "metrics.jsonl", rows)
    page = report_page(read_run(run_dir))
    assert "Nothing was learnt: Expected an update, got none." in page
    assert "Rounds 2, 3 (2 of 6) had no usable update: the model stayed as it was (too_large)." in page
    both = write_comparison([run_dir, write_run(tmp_path / "other", seed=2)], tmp_path / "c.html").read_text()
    assert "Nothing was learnt by fedsvd, seed 1" in both and "seed 2: Expected" not in both


def test_a_folder_of_runs_stands_for_its_finished_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "outputs" / "x" / name, seed=seed) for seed, name in enumerate(("t1", "t2", "t3"))]
    (runs[2] / "summary.json").unlink()
    assert cli.finished_runs("outputs/x") == [Path("outputs/x/t1"), Path("outputs/x/t2")]
    assert "1 of 3 runs in outputs/x are not finished" in capsys.readouterr().out
    assert cli.compare(["outputs/x"]) == 0 and (tmp_path / "comparison.html").exists()
    assert cli.compare(["outputs/x", "outputs/x/t1"]) == 0, "a run that is named twice counts once"
    assert "2 runs compared" in (tmp_path / "comparison-2.html").read_text()
