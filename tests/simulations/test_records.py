"""What a run writes about itself: counts, bytes and fates that agree with what happened."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from fedlr.adapters.state import LORA_B, num_values
from fedlr.errors import InputError
from fedlr.flower.records import num_bytes, to_record
from fedlr.rounds.round import Dropout, RoundDiagnostics
from fedlr.runs.directory import append_lines, create_run_dir, json_text, read_json, write_json
from fedlr.runs.recorder import client_rows, metrics_row
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.simulate import summary
from fedlr.tasks.evaluation import Evaluation
from tests.simulations.small_runs import experiment, federation, rounds


def diagnostics(**changes: object) -> RoundDiagnostics:
    values = {
        "cohort": (0, 1, 2, 3),
        "trained": (0, 3),
        "dropouts": (Dropout(1, "refused", "budget_exhausted"), Dropout(2, "rejected", "not_finite")),
        "aggregation_error": {"x": 0.5, "y": 0.25},
        "singular_values": {"x": [2.0, 1.0]},
        "bytes_up": 10,
        "bytes_down": 20,
        "train_s": 1.0,
        "aggregate_s": 2.0,
    }
    return RoundDiagnostics(**{**values, **changes})


SECONDS = {0: 1.5, 2: 2.5, 3: 3.5}


def clients(d: RoundDiagnostics, **changes: object) -> list[dict]:
    turns = {0: 1, 1: 2, 2: 1, 3: 1}
    values = {"spent": {}, "round_index": 4, "num_steps": 3, "participations": turns, "seconds": SECONDS}
    return list(client_rows(d, **{**values, **changes}))


def test_every_client_asked_has_one_line_that_says_its_fate() -> None:
    rows = clients(diagnostics())
    assert [row["client_id"] for row in rows] == [0, 1, 2, 3]
    assert [row["status"] for row in rows] == ["trained", "refused", "rejected", "trained"]
    assert [row["reason"] for row in rows] == [None, "budget_exhausted", "not_finite", None]
    assert [row["num_steps"] for row in rows] == [3, 0, 3, 3]
    assert [row["epsilon"] for row in rows] == [None] * 4
    assert [row["seconds"] for row in rows] == [1.5, 0.0, 2.5, 3.5]
    spent = {0: 0.5, 1: 6.0, 2: 0.25, 3: 1.0, 4: 2.0}
    assert [row["epsilon"] for row in clients(diagnostics(), spent=spent)] == [0.5, 6.0, 0.25, 1.0]
    assert [row["seconds"] for row in clients(diagnostics(), seconds=None)] == [None] * 4


@pytest.mark.parametrize("public", [True, False])
def test_a_clients_time_is_told_where_its_data_are_public_only(tmp_path: Path, public: bool) -> None:
    rounds(federation(f"data.public={public}".lower()), tmp_path / "run")
    told = [json.loads(line)["seconds"] for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    assert len(told) == 6
    assert all(seconds > 0 for seconds in told) if public else told == [None] * 6


def test_a_second_update_is_an_event_of_the_round_and_no_fate_of_the_client() -> None:
    d = diagnostics(
        dropouts=(*diagnostics().dropouts, Dropout(3, "rejected", "duplicate"), Dropout(9, "rejected", "x"))
    )
    assert clients(d) == clients(diagnostics())
    row = metrics_row(federation().start, Evaluation(0.5, 0.6), spent=[], diagnostics=d, evaluate_s=0.1)
    assert (row["num_trained"], row["num_refused"], row["num_rejected"]) == (2, 1, 3)


def test_first_line_is_the_start() -> None:
    row = metrics_row(federation().start, Evaluation(0.5, 0.6), spent=[], evaluate_s=0.1)
    assert row["rounds_completed"] == 0
    assert [row[f"num_{fate}"] for fate in ("trained", "refused", "rejected")] == [0, 0, 0]
    assert [row["bytes_up"], row["bytes_down"], row["aggregation_error"]] == [0, 0, 0.0]
    assert row["epsilon_max"] is row["epsilon_median"] is row["epsilon_min"] is None


def test_epsilon_is_the_ledgers_over_all_enrolled_clients(tmp_path: Path) -> None:
    f = federation()
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    ledger.reserve(0, f.mechanism, 2, [1, 2, 3])
    ledger.reserve(1, f.mechanism, 2, [3])
    spent = ledger.spent_all(range(4)).values()
    row = metrics_row(f.start, Evaluation(0.5, 0.6), spent=spent, evaluate_s=0.1)
    assert (row["epsilon_min"], row["epsilon_median"], row["epsilon_max"]) == (0.0, ledger.spent(1), ledger.spent(3))


@pytest.mark.parametrize("method", ["fedsvd", "ffa_lora", "fedit"])
def test_bytes_are_those_of_the_records_on_the_wire(tmp_path: Path, method: str) -> None:
    f = federation(f"method={method}")
    _, metrics, _ = rounds(f, tmp_path / "run")
    block = f.request().block
    up = num_bytes(f.start.adapter.select(block).values())
    down = num_bytes(f.method.broadcast(f.start.adapter, block).values())
    (array,) = to_record(f.start.adapter.select(block)).array_records["arrays"].values()
    assert up == array.numpy().nbytes
    assert [(row["bytes_up"], row["bytes_down"]) for row in metrics[1:]] == [(3 * up, 3 * down)] * 2
    assert (up == down) == (method != "fedsvd")


def test_summary_adds_up() -> None:
    f = federation()
    row = {
        "rounds_completed": 1,
        "accuracy": 0.5,
        "loss": 0.7,
        "epsilon_max": 1.0,
        "bytes_up": 3,
        "bytes_down": 5,
        "num_trained": 2,
    }
    found = summary(f, f.start, [{**row, "accuracy": 0.25}, row, row], seconds=2.0)
    assert (found["start_accuracy"], found["final_accuracy"]) == (0.25, 0.5)
    assert (found["bytes_up"], found["bytes_down"]) == (9, 15)
    assert found["adapter_sha256"] == f.start.adapter.fingerprint()
    assert found["num_trained_parameters"] == num_values(f.start.adapter.select(frozenset({LORA_B})).values())
    assert (found["privacy"], found["delta"]) == ("dp", 1e-5)


def test_long_lines_are_written_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = [], os.write

    def watched(file: int, data: bytes) -> int:
        written.append(len(data))
        return real(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", watched)
        append_lines(tmp_path / "x.jsonl", [{"long": "x" * 100_000}, {"short": 1}])
        append_lines(tmp_path / "x.jsonl", [{"e": math.pi}])
    assert written == [100_026, 25]
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[2]) == {"e": math.pi}


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    with pytest.raises(TypeError):
        write_json(tmp_path / "y.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"x.json"}
    (tmp_path / "z.json").write_text("{")
    for name in ("y.json", "z.json"):
        with pytest.raises(InputError, match=name):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": []},
        {"a": [{}], "b": {"c": [1, {"d": "line\nfeed"}]}, "e": "\u00e9"},
        {"clients": [{"client_id": i, "label_counts": [i, 2]} for i in range(30)], "labels": ["x", "y"]},
    ],
)
def test_json_files_hold_what_they_were_given_an_object_of_a_list_a_line(value: dict) -> None:
    text = json_text(value)
    assert json.loads(text) == value
    if "clients" in value:
        assert sum('"client_id"' in line for line in text.splitlines()) == 30
        assert len(text.splitlines()) < 40


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path: Path) -> None:
    e = experiment(f"tracking.output_dir={tmp_path}")
    paths = [create_run_dir(e) for _ in range(5)]
    assert len(set(paths)) == 5
    assert all(path.parent == tmp_path / "tiny" for path in paths)


def test_the_last_line_has_a_confusion_matrix_and_the_summary_a_verdict_on_held_out_rows(tmp_path: Path) -> None:
    f = federation()
    _, metrics, _ = rounds(f, tmp_path / "run")
    assert [row["confusion"] is None for row in metrics] == [True, True, False]
    matrix, labels = np.array(metrics[-1]["confusion"]), f.test.labels
    assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=len(f.label_names)).tolist()
    assert metrics[-1]["accuracy"] == matrix.trace() / matrix.sum()
    assert all(0 <= row[name] <= 1 for row in metrics for name in ("balanced_accuracy", "macro_f1", "auc", "ece"))
    told = summary(f, f.start, metrics, seconds=1.0)
    verdict = told["verdict"]
    assert verdict["num_rows"] == len(labels) and told["label_names"] == list(f.label_names)
    assert verdict["majority_share"] == np.bincount(labels).max() / len(labels)
    assert (verdict["start_loss"], verdict["final_loss"]) == (metrics[0]["loss"], metrics[-1]["loss"])
    assert verdict["interval"][0] <= metrics[-1]["accuracy"] <= verdict["interval"][1]


def test_lines_of_an_earlier_version_make_a_summary_too(tmp_path: Path) -> None:
    f = federation()
    _, metrics, _ = rounds(f, tmp_path / "run")
    new = ("balanced_accuracy", "macro_f1", "mcc", "auc", "ece", "confusion")
    old = [{key: value for key, value in row.items() if key not in new} for row in metrics]
    verdict = summary(f, f.start, old, seconds=1.0)["verdict"]
    assert verdict["word"] in ("learned", "did not learn", "cannot be told") and verdict["num_rows"] == len(f.test)
