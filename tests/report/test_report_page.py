"""The report of a run: complete, offline, the same bytes for the same files, and no nicer than the files.

Mutants this file kills (each was tried): `escape` in layout.py returns its argument; epsilon is rounded to
nearest, or is one less in the headline; the partition is shown although it is not public; `svg.hashsalt` is
left out; ids get no prefix; the `<style>` of matplotlib stays; text is drawn as paths; `$` starts maths;
checks.py finds nothing; an aggregation error that is NaN counts as exact.
"""

import json
import math
import re
from collections import Counter
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedlr.errors import InputError
from fedlr.privacy.units import CLIENT, EXAMPLE
from fedlr.runs.report import write_report
from fedlr.runs.report.privacy_text import privacy_parts
from fedlr.runs.report.run_files import read_run
from fedlr.runs.report.wording import bytes_text, epsilon_text, percent
from tests.report.run_directory import write_json, write_run

PICTURES = {
    "accuracy",
    "accuracy-epsilon",
    "epsilon-clients",
    "labels",
    "aggregation-error",
    "noise",
    "singular-values",
    "traffic",
    "time",
}
REQUIRED = ["config.yaml", "versions.json", "metrics.jsonl", "clients.jsonl", "privacy.json", "summary.json"]
HOSTILE = ["<script>alert(1)</script>", '"><img src=x>', "_hidden", "$\\frac{$", "a & b"]


def report(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def drawings(page: str) -> dict[str, str]:
    """Return the SVG of each picture that is drawn, by the id of its figure."""
    figures = re.findall(r'<figure id="([^"]+)".*?</figure>', page, flags=re.DOTALL)
    blocks = re.findall(r"<figure id=.*?</figure>", page, flags=re.DOTALL)
    found = {
        name: re.search(r"<svg.*?</svg>", block, flags=re.DOTALL) for name, block in zip(figures, blocks, strict=True)
    }
    return {name: match.group() for name, match in found.items() if match}


def fetched(page: str) -> list[str]:
    """Return every address that a browser would load or follow."""
    places = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']?([^"'\s>]+)""", page)
    places += re.findall(r"url\(([^)]*)\)", page) + re.findall(r"@import[^;]*", page)
    return [place for place in places if not place.startswith(("#", "data:image/png;base64,"))]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "private")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return report(run_dir)


def test_report_has_every_picture_with_a_name_for_screen_readers(page: str) -> None:
    drawn = drawings(page)
    assert set(drawn) == PICTURES
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert root[0].tag.endswith("title") and root[0].text == root.get("aria-label")


def test_every_picture_has_a_caption(page: str) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.DOTALL)
    assert len(captions) == len(PICTURES)
    assert all(caption.endswith(".") and len(caption) > 40 for caption in captions)


def test_text_in_pictures_stays_text(page: str) -> None:
    for svg in drawings(page).values():
        assert "<text" in svg
    assert ">Rounds completed</text>" in drawings(page)["accuracy"]


def test_report_fetches_nothing_and_runs_nothing(page: str) -> None:
    assert fetched(page) == []
    assert "<script" not in page and "<link" not in page and "<iframe" not in page
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_ids_are_unique_and_references_stay_inside_their_picture(page: str) -> None:
    ids = Counter(re.findall(r'\sid="([^"]+)"', page))
    assert [name for name, number in ids.items() if number > 1] == []
    for svg in drawings(page).values():
        inside = set(re.findall(r'\sid="([^"]+)"', svg))
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) <= inside


def test_no_picture_styles_the_rest_of_the_page(page: str) -> None:
    assert page.count("<style") == 1
    assert all("<style" not in svg and "<metadata" not in svg for svg in drawings(page).values())


def test_same_files_give_the_same_bytes_in_any_folder(tmp_path: Path, run_dir: Path, page: str) -> None:
    again = write_run(tmp_path / "elsewhere")
    assert report(again) == page
    assert report(again) == page
    assert str(tmp_path) not in page


def test_a_metric_of_which_less_is_better_is_named_and_written_as_a_number(tmp_path: Path) -> None:
    metric = {"name": "perplexity", "higher_is_better": False, "is_share": False}
    change = {"metric": metric, "start_score": 85.0, "final_score": 62.4}
    run_dir = write_run(tmp_path / "run", num_rounds=2, change=change)
    for path in (run_dir / "metrics.jsonl", run_dir / "baselines" / "no_privacy" / "metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "measures": {"perplexity": 85.0 - 11.3 * row["rounds_completed"]}} for row in rows]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = report(run_dir)
    assert "perplexity fell from 85.0 to 62.4" in page and "start 85.0 (−22.6)" in page
    assert "Perplexity after each round" in page and "Lower is better" in page
    assert "The files disagree" not in page


def test_the_name_of_a_metric_is_a_plain_word(tmp_path: Path) -> None:
    metric = {"name": "<b>", "higher_is_better": False, "is_share": False}
    with pytest.raises(InputError, match="name of a score"):
        report(write_run(tmp_path / "run", num_rounds=1, change={"metric": metric}))


def test_headline_numbers_are_those_of_the_files(run_dir: Path, page: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    for shown in (
        percent(summary["final_accuracy"]),
        percent(summary["start_accuracy"]),
        f"ε = {epsilon_text(summary['epsilon_max'])}",
        "max over clients, at delta = 1e-5",
        f"{summary['num_trained_parameters']:,}",
        f"{bytes_text(summary['bytes_up'])} up",
        f"{bytes_text(summary['bytes_down'])} down",
        summary["adapter_sha256"],
        summary["adapter_sha256"][:12],
    ):
        assert escape(shown) in page


def test_epsilon_is_never_shown_smaller_than_it_is(page: str) -> None:
    assert epsilon_text(5.9311) == "5.932" and epsilon_text(5.9) == "5.900" and epsilon_text(0.00001) == "0.001"
    assert "ε = 5.934" in page  # 5.934 in the files
    assert "5.93<" not in page and "5.94<" not in page


def test_table_puts_the_run_beside_both_baselines(run_dir: Path, page: str) -> None:
    lines = (run_dir / "baselines" / "no_privacy" / "metrics.jsonl").read_text().splitlines()
    alone = json.loads((run_dir / "baselines" / "alone.json").read_text())["clients"]
    accuracy = [one["accuracy"] for one in alone]
    for shown in (
        json.loads(lines[-1])["accuracy"],
        min(accuracy),
        max(accuracy),
        sum(accuracy) / len(accuracy),
    ):
        assert f">{percent(shown)}</td>" in page
    for one in alone:
        assert f'<tr><td>{one["client_id"]}</td><td class="number">{percent(one["accuracy"])}</td>' in page


def test_epsilon_bars_are_the_spendings_of_the_clients_in_order(page: str) -> None:
    svg = drawings(page)["epsilon-clients"]
    assert re.findall(r">(\d+)</text>", svg)[:10] == [str(client) for client in range(10)]
    assert "budget, epsilon 6" in svg


def test_statement_is_told_with_what_it_does_not_cover(run_dir: Path, page: str) -> None:
    statement = json.loads((run_dir / "privacy.json").read_text())
    assert escape(statement["statement"]) in page
    assert statement["unit"] in page and statement["neighbouring_relation"] in page
    for gap in statement["not_covered"]:
        assert f"<li>{escape(gap)}</li>" in page


def test_the_curve_is_rounded_up_names_its_units_and_is_refused_where_it_was_changed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "private")
    stated = json.loads((folder / "privacy.json").read_text())
    points = [{"delta": 1e-5, "epsilon": 7.0}, {"delta": 1e-8, "epsilon": None}]
    curve = {
        "add_or_remove": {"mu": 2.5, "partly": {"mu": 1.23444, "delta_at_least": 1e-10}},
        "replace": {"epsilon": points},
        "several": [{"count": 2, "delta": 1e-5, "epsilon": 12.0}],
    }
    words = {EXAMPLE: "such as the rows of one person", CLIENT: "such as clients of one owner"}
    for unit, whom in words.items():
        write_json(folder / "privacy.json", {**stated, "unit": unit.text, "profile": curve})
        told = privacy_parts(read_run(folder))
        assert any(f"several at once, {whom}, it is 12.000 for 2" in part and "μ = 1.235;" in part for part in told)
        assert not any(other in part for part in told for name, other in words.items() if name is not unit)
    write_json(folder / "privacy.json", {**stated, "profile": {**curve, "replace": {"epsilon": points[1:]}}})
    assert any("nothing bounds ε" in part for part in privacy_parts(read_run(folder)))
    changed = [{"replace": 1}, {**curve, "several": 1}, {**curve, "add_or_remove": {"mu": "x"}}, {"replace": {}}]
    for wrong in (*changed, {**curve, "add_or_remove": {"mu": math.inf}}, {**curve, "replace": {"epsilon": [1]}}):
        write_json(folder / "privacy.json", {**stated, "profile": wrong})
        with pytest.raises(InputError, match=r"profile|JSON|number"):
            privacy_parts(read_run(folder))


def test_statement_without_gaps_is_called_incomplete(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    write_json(run_dir / "privacy.json", {"unit": "example"})
    assert "a gap in the statement" in report(run_dir)


def test_commands_recompute_the_statement_and_load_the_adapter(page: str) -> None:
    assert "fedlr statement ." in page
    assert escape("from_pretrained('roberta-base', num_labels=3)") in page
    assert escape('PeftModel.from_pretrained(base, "adapter")') in page


def test_hostile_text_is_shown_and_never_runs(tmp_path: Path) -> None:
    change = {"name": HOSTILE[0], "method": HOSTILE[1], "adapter_sha256": HOSTILE[0]}
    run_dir = write_run(tmp_path / "run", labels=HOSTILE, change=change)
    (run_dir / "config.yaml").write_text(f"name: {HOSTILE[0]!r}\n")
    write_json(run_dir / "versions.json", {HOSTILE[0]: HOSTILE[1]})
    write_json(run_dir / "privacy.json", {HOSTILE[0]: [{HOSTILE[1]: HOSTILE[0]}], "not_covered": HOSTILE[0]})
    write_json(run_dir / "adapter" / "adapter_config.json", {"base_model_name_or_path": HOSTILE[0]})
    asked = {"round_index": 0, "client_id": 0, "status": HOSTILE[0], "reason": HOSTILE[1], "epsilon": 1.0}
    write_json(run_dir / "clients.jsonl", asked)
    hostile_page = report(run_dir)
    assert "<script" not in hostile_page and "<img" not in hostile_page
    labels = drawings(hostile_page)["labels"]
    assert "&lt;script&gt;" in labels and "_hidden" in labels and "$\\frac{$" in labels
    ElementTree.fromstring(labels)


def test_run_without_privacy_says_so_and_draws_no_privacy(tmp_path: Path) -> None:
    plain = report(write_run(tmp_path / "run", privacy="none"))
    assert set(drawings(plain)) == PICTURES - {"accuracy-epsilon", "epsilon-clients", "noise"}
    assert "no differential privacy" in plain and "ε =" not in plain
    assert "no privacy axis to draw on" in plain


def test_private_run_without_epsilon_is_not_stated_rather_than_private(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", change={"epsilon_max": None}))
    assert ">not stated<" in page


def test_infinite_epsilon_is_no_privacy(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", change={"epsilon_max": float("inf")}))
    assert ">no differential privacy<" in page


def test_labels_of_data_that_are_not_public_are_withheld(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", public=False))
    assert "labels" not in drawings(page)
    assert "withheld: the data are not declared public" in page
    assert "neutral" not in page


def test_partition_is_withheld_even_if_the_file_holds_counts(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    partition = json.loads((run_dir / "partition.json").read_text())
    write_json(run_dir / "partition.json", partition | {"public": False})
    page = report(run_dir)
    assert "neutral" not in page and "labels" not in drawings(page)


def test_a_partition_of_many_clients_reads_as_that_of_few(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_rounds=1)
    path, told = run_dir / "partition.json", read_run(run_dir).partition
    partition = json.loads(path.read_text())
    counts = [client["label_counts"] for client in partition.pop("clients")]
    write_json(path, partition | {"label_counts": counts})
    assert told is not None and read_run(run_dir).partition == told
    for wrong in ([[1]], ["12"], [[1, 0.5]], {"0": [1, 2]}):
        write_json(path, partition | {"label_counts": wrong})
        with pytest.raises(InputError, match="partition.json"):
            read_run(run_dir)


def test_missing_optional_files_are_named_in_a_sentence(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", baselines=False)
    (run_dir / "partition.json").unlink()
    (run_dir / "adapter" / "adapter_config.json").unlink()
    page = report(run_dir)
    assert "baselines/no_privacy" in page and "baselines/alone.json" in page
    assert "not among the files of this run" in page
    assert "alone, lowest" not in page and "without privacy</text>" not in page


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_required_file_is_named(tmp_path: Path, name: str) -> None:
    run_dir = write_run(tmp_path / "run", num_rounds=1)
    (run_dir / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(run_dir)


@pytest.mark.parametrize("name", REQUIRED)
def test_broken_required_file_is_named(tmp_path: Path, name: str) -> None:
    run_dir = write_run(tmp_path / "run", num_rounds=1)
    (run_dir / name).write_text('{"half": [')
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize("value", ["0.9", True, None])
def test_number_of_a_wrong_type_is_named(tmp_path: Path, value: object) -> None:
    run_dir = write_run(tmp_path / "run", num_rounds=1, change={"final_accuracy": value})
    with pytest.raises(InputError, match="final_accuracy.*summary.json"):
        write_report(run_dir)


def test_rounds_out_of_order_are_refused(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_rounds=2)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(InputError, match="rounds_completed"):
        write_report(run_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"final_accuracy": 0.99},
        {"start_accuracy": 0.01},
        {"epsilon_max": 1.0},
        {"bytes_up": 1},
        {"num_rounds": 40},
    ],
)
def test_files_that_contradict_each_other_are_shown_to(tmp_path: Path, change: dict[str, float], page: str) -> None:
    assert 'class="warning"' not in page
    assert 'class="warning"' in report(write_run(tmp_path / "run", change=change))


def test_client_over_its_budget_is_shown(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "config.yaml").write_text("privacy:\n  epsilon: 2.0\n")
    assert "more than its budget of 2" in report(run_dir)


def test_exact_aggregation_is_called_exact_and_other_is_not(tmp_path: Path, page: str) -> None:
    assert "Exact: every layer" in page
    page = report(write_run(tmp_path / "run", exact=False))
    assert "Exact:" not in page and "Lower is better; largest" in page


def test_aggregation_that_is_not_a_number_is_not_called_exact(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_rounds=3)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines[2]["aggregation_error_by_layer"] = {"layer": float("nan")}
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "Exact:" not in report(run_dir)


@pytest.mark.parametrize("num_clients", [1, 100])
def test_one_round_and_many_clients_are_drawn(tmp_path: Path, num_clients: int) -> None:
    labels = [f"topic {index}" for index in range(20)] if num_clients == 100 else ["yes", "no"]
    page = report(write_run(tmp_path / "run", num_rounds=1, num_clients=num_clients, labels=labels))
    assert set(drawings(page)) == PICTURES
    assert len(page) < 2_000_000
    assert fetched(page) == []


def test_start_alone_is_a_report_too(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    first = (run_dir / "metrics.jsonl").read_text().splitlines()[0]
    (run_dir / "metrics.jsonl").write_text(first + "\n")
    (run_dir / "clients.jsonl").write_text("")
    assert "The run is not complete" in report(run_dir)
