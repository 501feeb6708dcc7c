"""The commands, end to end on the tiny experiment: runs, sweeps, comparisons, and statements that can fail.

Mutants this file kills: a comparison written over another one; a sweep that stops at its first bad run; a statement
that repeats privacy.json instead of reading the ledger.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedlr.config.schema import CONFIGS
from fedlr.simulations import cli
from fedlr.streams import Purpose, stream
from tests.painted import drawn_by, inline_svg
from tests.simulations.small_runs import RUN_FILES

METHODS = tuple(sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml") if path.stem != "head"))  # LoRA's
TINY = ("experiment=tiny", "num_rounds=1", "runtime.num_workers=1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # the command sets them itself: restored after the test
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One private run; tests change copies of it."""
    out = tmp_path_factory.mktemp("finished")
    with drawn_by(inline_svg):
        assert cli.simulate([*TINY, f"tracking.output_dir={out}"]) == 0
    return only_run(out / "tiny")


@pytest.fixture
def copied(finished: Path, here: Path) -> Path:
    return Path(shutil.copytree(finished, here / "copied"))


def only_run(folder: Path) -> Path:
    (run_dir,) = (path for path in folder.iterdir() if path.is_dir())
    return run_dir


def table_rows(text: str) -> list[str]:
    """Return the rows of the last table of a run's output: those after its header."""
    lines = text.rstrip().splitlines()
    header = max(number for number, line in enumerate(lines) if line.startswith("method "))
    return lines[header + 1 : -1]


@pytest.mark.parametrize(
    ("methods", "privacy"),
    [
        pytest.param(METHODS, ("dp",), id="private"),
        pytest.param(("fedit", "fedsa_lora", "fedsvd"), ("none", "dp"), id="a few of both"),
        pytest.param(METHODS, ("none",), id="not private", marks=pytest.mark.slow),
    ],
)
def test_every_method_with_and_without_privacy_ends_in_one_table(
    methods: Sequence[str], privacy: Sequence[str], here: Path, capsys
) -> None:
    asked = [f"method={','.join(methods)}", f"privacy={','.join(privacy)}"]
    few = ("data.num_examples=120", "data.num_test=24", "cohort_size=5")  # multi-Krum needs five clients
    words = [*TINY, *few, "-m", *asked]
    assert cli.simulate(words) == 0
    out = capsys.readouterr().out
    rows = table_rows(out)
    assert {(row.split()[0], "no DP" in row) for row in rows} == {(m, p == "none") for m in methods for p in privacy}
    assert len(rows) == len(methods) * len(privacy)
    page = here / "outputs" / "tiny" / "comparison.html"
    assert page.is_file() and out.rstrip().endswith("comparison in outputs/tiny/comparison.html")
    run_dirs = [path for path in page.parent.iterdir() if path.is_dir()]
    assert len(run_dirs) == len(rows)
    for run_dir in run_dirs:
        private = json.loads((run_dir / "summary.json").read_text())["privacy"] == "dp"
        assert {path.name for path in run_dir.iterdir()} == RUN_FILES | ({"ledger.jsonl"} if private else set())


def test_a_second_sweep_leaves_the_first_comparison_alone(here: Path, capsys) -> None:
    sweep = [*TINY, "-m", "seed=0,1", "privacy=none", "adapter.layers=[1]", "model.hidden_size=8", "adapter.rank=2"]
    folder = here / "outputs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "comparison.html").write_text("mine")
    assert cli.simulate(sweep) == 0
    assert (folder / "comparison.html").read_text() == "mine"
    assert "2 runs compared" in (folder / "comparison-2.html").read_text()
    assert "outputs/tiny/comparison-2.html" in capsys.readouterr().out


def test_a_sweep_over_names_puts_its_table_above_them() -> None:
    runs = [Path("outputs/one/t1"), Path("outputs/two/t1")]
    assert cli.shared_folder(runs) == Path("outputs")
    assert cli.shared_folder([Path("outputs/one/t1"), Path("outputs/one/t2")]) == Path("outputs/one")


def test_a_sweep_goes_on_after_a_run_that_cannot_start(here: Path, capsys) -> None:
    assert cli.simulate([*TINY, "-m", "privacy=none", "num_clients=1000,4"]) == 2
    told = capsys.readouterr()
    assert "1 of 2 runs failed" in told.err and "1000 clients" in told.err
    assert len(table_rows(told.out)) == 1
    only_run(here / "outputs" / "tiny")


def test_expansion_changes_the_last_key_fastest() -> None:
    jobs = cli.expand(["a=1", "-m", "seed=range(2)", "method=fedsvd,fedit"])
    assert jobs[1] == ["a=1", "seed=0", "method=fedit"] and len(jobs) == 4


def test_a_run_without_a_seed_writes_down_the_one_it_drew(here: Path) -> None:
    assert cli.simulate([*TINY, "seed=null", "privacy.randomness=os"]) == 0
    run_dir = only_run(here / "outputs" / "tiny")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert isinstance(summary["seed"], int)
    assert json.loads((run_dir / "privacy.json").read_text())["randomness"]["kind"] == "os"


def examples(num_examples: int) -> Sequence[dict[str, str]]:
    """Short texts of words that the tiny model knows."""
    draw = stream(0, Purpose.DATA).integers(2, size=num_examples)
    return [
        {"review": f"the film is {('good', 'bad')[k]} {i}", "stars": ("up", "down")[k], "shop": f"s{i % 4}"}
        for i, k in enumerate(draw)
    ]


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_ones_own_trains_from_end_to_end(suffix: str, here: Path) -> None:
    write_table(here / f"reviews{suffix}", examples(240))
    own = [f"data.path=reviews{suffix}", "data.text_column=review", "data.label_column=stars"]
    clients = ["data.group_column=shop", "partition=by_group", "num_clients=4"]
    rest = ["data.max_length=16", "data.num_test=40", "name=mine", "privacy.delta=1e-4", "data.labels=[down,up]"]
    assert cli.simulate([*TINY, "data=table", *own, *clients, *rest]) == 0
    run_dir = only_run(here / "outputs" / "mine")
    assert json.loads((run_dir / "partition.json").read_text()) == {"public": False}, "nobody said that they are public"
    card = (run_dir / "adapter" / "README.md").read_text()
    assert "0 = down, 1 = up" in card


def test_label_names_of_private_data_are_not_taken_from_the_data(here: Path, capsys) -> None:
    write_table(here / "reviews.csv", examples(240))
    table = ["data=table", "data.path=reviews.csv", "data.text_column=review", "data.label_column=stars"]
    rest = ["data.max_length=16", "data.num_test=40", "name=mine", "privacy.delta=1e-4"]
    assert cli.plan([*TINY, *table, *rest, "~data.labels"]) == 2
    capsys.readouterr()
    assert cli.plan([*TINY, *table, *rest]) == 2
    told = capsys.readouterr().err
    assert "data.labels=[NAME,NAME]" in told and "down" not in told
    assert "data.public=true" in told and told.count("\n") == 1
    for allowed in (
        "data.labels=[down,up]",
        "data.public=true",
        "privacy=none",
        "data.label_groups={x: [up], y: [down]}",
    ):
        needless = [word for word in rest if allowed != "privacy=none" or "delta" not in word]
        assert cli.plan([*TINY, *table, *needless, allowed]) == 0, allowed


def test_the_statement_is_that_of_the_ledger(copied: Path, capsys) -> None:
    assert cli.statement([str(copied)]) == 0
    stated = json.loads(capsys.readouterr().out)
    assert stated == json.loads((copied / "privacy.json").read_text())
    assert 0 < stated["epsilon"]["maximum"] <= stated["budget"]["epsilon"]


def test_the_statement_finds_a_changed_privacy_json(copied: Path, capsys) -> None:
    path = copied / "privacy.json"
    stated = json.loads(path.read_text())
    stated["epsilon"]["maximum"] /= 2
    path.write_text(json.dumps(stated))
    assert cli.statement([str(copied)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "privacy.json" in told.err and "epsilon" in told.err and told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"num_steps":2', b'"num_steps":1'),
        (b'"kind":"reserve_cohort"', b'"kind":"ignored_cohort"'),
        (b'"epsilon":6', b'"epsilon":9'),
    ],
    ids=["fewer steps", "another kind", "a larger budget"],
)
def test_the_statement_finds_a_changed_ledger(old: bytes, new: bytes, copied: Path, capsys) -> None:
    path = copied / "ledger.jsonl"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    assert cli.statement([str(copied)]) == 2
    assert "ledger.jsonl" in capsys.readouterr().err


def test_the_statement_finds_rows_cut_off_the_ledger(copied: Path, capsys) -> None:
    path = copied / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert cli.statement([str(copied)]) == 2
    assert "ledger" in capsys.readouterr().err


def test_the_statement_needs_the_ledger_of_a_private_run(copied: Path, capsys) -> None:
    (copied / "ledger.jsonl").unlink()
    assert cli.statement([str(copied)]) == 2
    assert "ledger.jsonl" in capsys.readouterr().err


def test_the_report_is_drawn_again_from_the_files_alone(copied: Path, capsys) -> None:
    page = (copied / "report.html").read_bytes()
    (copied / "report.html").unlink()
    with drawn_by(inline_svg):
        assert cli.report([str(copied)]) == 0
    assert (copied / "report.html").read_bytes() == page
    assert "report.html" in capsys.readouterr().out


def test_runs_are_compared_without_overwriting_anything(finished: Path, copied: Path, here: Path, capsys) -> None:
    both = [str(finished), str(copied)]
    assert cli.compare(both) == 0 and cli.compare(both) == 0
    assert (here / "comparison.html").is_file() and (here / "comparison-2.html").is_file()
    assert cli.compare([*both, "--out", "mine.html"]) == 0
    assert len(table_rows(capsys.readouterr().out)) == 2
    assert cli.compare([*both, "--out", "mine.html"]) == 2
    assert "'mine.html', which exists" in capsys.readouterr().err


def test_a_sweep_is_compared_with_one_of_its_methods_pair_by_pair(here: Path, capsys) -> None:
    assert cli.simulate([*TINY, "-m", "seed=1,2", "privacy.epsilon=3,6", "method=fedsvd,ffa_lora"]) == 0
    run_dirs = sorted(str(path) for path in (here / "outputs" / "tiny").iterdir() if path.is_dir())
    capsys.readouterr()
    assert cli.compare([*run_dirs, "--against", "fedsvd", "--out", "paired.html"]) == 0
    rows = capsys.readouterr().out.partition("against fedsvd")[2].splitlines()[1:-1]
    assert [row.split()[:6] for row in rows] == [["ffa_lora", "same", "dp,", "ε", "≤", eps] for eps in ("3", "6")]
    assert 'id="paired"' in (here / "paired.html").read_text()
    assert cli.compare([*run_dirs[1:], "--against", "fedsvd"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "no fedsvd for ffa_lora, seed 1, dp, ε ≤ 3" in told.err and told.err.count("\n") == 1
    assert not (here / "comparison.html").exists()


@pytest.mark.parametrize(
    ("command", "words", "fragment"),
    [
        (cli.compare, [], "two or more run directories, or a folder of them, got 0"),
        (cli.compare, ["."], "two or more run directories, or a folder of them, got 1"),
        (cli.compare, ["a", "b"], "run directory (outputs/NAME/TIME), got 'a'"),
        (cli.compare, [".", ".", "--out"], "file name after --out"),
        (cli.compare, [".", ".", "--against"], "a method after --against"),
        (cli.compare, [".", ".", "--out", "no/such/page.html"], "'no/such/page.html'"),
        (cli.compare, [".", "/proc"], "config.yaml"),
        (cli.compare, [".", ".", "--latex", "table.txt"], "--latex to be a .tex file in a folder that exists"),
        (cli.compare, [".", ".", "--csv", "no/such.csv"], "--csv to be a .csv file in a folder that exists"),
        (cli.compare, [".", ".", "--csv", "/dev/null"], "--csv to be a new file, got '/dev/null', which exists"),
        (cli.compare, [".", ".", "--svg", "/dev/null"], "--svg to be a folder, or a new one"),
        (cli.compare, [".", ".", "--svg"], "a folder after --svg"),
        (cli.compare, ["a" * 5000, "b"], "File name too long"),
        (cli.compare, [".", ".", "--out", "a" * 5000 + ".html"], "File name too long"),
        (cli.simulate, ["experiment=tiny", "-m", "seed=range(1000000000)"], "at most 2,000 runs"),
        (cli.simulate, ["experiment=tiny", "-m", "seed=range(50)", "num_rounds=range(50)"], "at most 2,000 runs"),
        (cli.report, ["a" * 5000], "File name too long"),
        (cli.report, [], "one run directory, got 0"),
        (cli.report, ["a", "b"], "one run directory, got 2"),
        (cli.report, ["."], "config.yaml"),
        (cli.statement, ["nowhere"], "got 'nowhere'"),
        (cli.statement, ["."], "privacy.json"),
    ],
)
def test_what_is_no_run_is_one_clear_line(command, words: list[str], fragment: str, here: Path, capsys) -> None:
    assert command(words) == 2
    told = capsys.readouterr()
    assert told.out == "" and fragment in told.err and told.err.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", [cli.simulate, cli.plan, cli.compare, cli.report, cli.statement])
def test_help_shows_how_to_call_it_and_does_nothing(command, here: Path, capsys) -> None:
    assert command(["--help"]) == 0
    assert f"fedlr {command.__name__} " in capsys.readouterr().out
    assert list(here.iterdir()) == []
