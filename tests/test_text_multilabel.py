"""Texts with any of several labels: rows that are refused, losses of one row each, scores a referee knows, and a run.

Mutant: a loss that weighs a label by how often it occurs in the batch, which lets one row change the gradients of
others.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlr.config.schema import compose_experiment
from fedlr.data.multilabel import MultiLabelText, load_multilabel_table
from fedlr.errors import InputError
from fedlr.simulations.cli import simulate
from fedlr.simulations.evaluate_command import evaluate
from fedlr.simulations.federation import assemble
from fedlr.tasks.batch import Batch
from fedlr.tasks.text_multilabel import LabelAnswers, TextMultilabel, text_multilabel
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from tests.server.whole_federation import lines
from tests.training.one_row import check_a_sum_is_that_of_its_rows, largest_move, rows_with

TASK = TextMultilabel()
ROWS = rows_with((torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) < 0.5).float())
NAMES = ("joy", "anger", "love")
TINY = ("experiment=tiny", "task=text_multilabel", "data=multilabel_table", "partition=iid", "data.public=true")


def table(folder: Path, rows: list[str], header: str = "text;labels") -> Path:
    path = folder / "rows.csv"
    path.write_text("\n".join([header, *rows]).replace(";", ",") + "\n")
    return path


def good(num: int) -> list[str]:
    told = ("", "joy", "anger", '"joy, love"')
    words = ("dull", "glad glad glad", "cruel cruel cruel", "sweet sweet sweet")
    return [f"{words[i % 4]} {i};{told[i % 4]}" for i in range(num)]


def words_of(path: Path) -> tuple[str, ...]:
    return (*TINY, f"data.path={path}", "data.labels=[joy,anger,love]", "data.num_test=40", "data.max_length=24")


def test_labels_are_read_from_names_and_from_columns(tmp_path: Path) -> None:
    wanted = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    found = load_multilabel_table(table(tmp_path, good(4)), labels=NAMES)
    assert found.targets() == wanted and found.label_names == () and found.output_names == NAMES
    assert found.subset([3, 0]).targets() == [wanted[3], wanted[0]]
    rows = [f"word {i};{';'.join(str(int(x)) for x in row)}" for i, row in enumerate(wanted)]
    path = table(tmp_path, rows, header="text;joy;anger;love")
    assert load_multilabel_table(path, labels=NAMES, label_column=None).targets() == wanted
    listed = tmp_path / "rows.jsonl"
    listed.write_text('{"text": "a word", "labels": ["love", "joy"]}\n{"text": "another", "labels": null}\n')
    assert load_multilabel_table(listed, labels=NAMES).targets() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("bad;grief", "row 3, column 'labels': a label is none of 'joy', 'anger', 'love'"),
        ("bad;joy|love", "a label is none of"),
        (";joy", "column 'text': the text is empty"),
    ],
)
def test_a_bad_row_is_named_and_its_value_is_not(row: str, told: str, tmp_path: Path) -> None:
    path = table(tmp_path, ["fine;joy", row, "so so;"])
    with pytest.raises(InputError, match=told) as error:
        load_multilabel_table(path, labels=NAMES)
    assert "grief" not in str(error.value)
    assert load_multilabel_table(path, labels=NAMES, on_bad_row="drop").num_dropped == 1


def test_a_column_of_a_label_holds_nothing_but_0_and_1(tmp_path: Path) -> None:
    path = table(tmp_path, ["fine;0;1", "bad;2;0", "so so;1;1"], header="text;joy;anger")
    with pytest.raises(InputError, match="row 3, column 'joy': expected 0 or 1"):
        load_multilabel_table(path, labels=["joy", "anger"], label_column=None)
    path = table(
        tmp_path, ["fine;0;1", "good;1;0", "so so;1;1"], header="text;joy|delight;anger"
    )  # nothing is separated here
    names = ["joy|delight", "anger"]
    with pytest.raises(InputError, match="has no column 'labels'.* set data.label_column=null"):
        load_multilabel_table(path, labels=names, label_separator=";")
    found = load_multilabel_table(path, labels=names, label_column=None, label_separator="|")
    assert found.targets() == [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("wrong", [["joy"], ["joy", "joy"], "joy,anger", ["joy", ""], None])
def test_labels_that_are_none_are_refused(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Expected data.labels to be two or more different names"):
        load_multilabel_table(table(tmp_path, good(4)), labels=wrong)  # type: ignore[arg-type]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data.label_separator to be a mark that is in no label"):
        load_multilabel_table(table(tmp_path, good(4)), labels=["joy", "love, hate"])
    with pytest.raises(InputError, match="data=multilabel_table"):
        assemble(compose_experiment(["experiment=tiny", "task=text_multilabel"]), seed=0)
    with pytest.raises(InputError, match="data.label_weights=null"):
        text_multilabel(label_names=(), label_weights={"a": 2.0})


def f1(true: np.ndarray, answered: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall."""
    pairs = list(zip(true.tolist(), answered.tolist(), strict=True))
    precision = pairs.count((True, True)) / sum(named for _, named in pairs)
    recall = pairs.count((True, True)) / sum(held for held, _ in pairs)
    return 2 / (1 / precision + 1 / recall)


def test_scores_are_those_of_their_definitions() -> None:
    generator = np.random.default_rng(0)
    true, answered = generator.random((50, 4)) < 0.4, generator.random((50, 4)) < 0.5
    parts = [LabelAnswers(answered[i::2], true[i::2], np.ones(25)) for i in (0, 1)]
    found = TASK.evaluation(parts)
    assert found.measures["micro_f1"] == pytest.approx(f1(true.ravel(), answered.ravel()))
    assert found.measures["macro_f1"] == pytest.approx(np.mean([f1(true[:, k], answered[:, k]) for k in range(4)]))
    assert found.measures["hamming_loss"] == pytest.approx((true ^ answered).sum() / 200)
    assert found.accuracy == found.measures["exact_match"] == pytest.approx((true == answered).all(axis=1).mean())
    rates = torch.tensor(true.mean(axis=0)).expand(50, 4)
    least = F.binary_cross_entropy(rates, torch.tensor(true).double()).item() * 4
    assert found.measures["loss_of_one_answer"] == pytest.approx(least)
    nothing = TASK.evaluation([LabelAnswers(answered & False, true & False, np.ones(50))])
    assert nothing.measures["micro_f1"] == nothing.measures["macro_f1"] == 0.0


def batch_balanced(model: nn.Module, rows: Batch) -> Tensor:
    logits = model(**rows.inputs).logits
    return F.binary_cross_entropy_with_logits(
        logits, rows.targets, pos_weight=1 / rows.targets.mean(dim=0).clamp(min=0.01), reduction="none"
    ).sum(dim=1)


@pytest.mark.parametrize("engine", [HookGradients, GhostGradients, FusedGradients, LoopGradients])
def test_one_row_moves_the_clipped_sum_by_at_most_c(engine: type) -> None:
    assert 0.9 < largest_move(engine, TASK.losses, ROWS, bound=0.01) <= 1 + 1e-4  # it is reached: rows are clipped


def test_a_sum_is_that_of_its_rows() -> None:
    check_a_sum_is_that_of_its_rows(TASK.losses, ROWS)


def test_a_loss_that_knows_how_often_a_label_occurs_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_a_sum_is_that_of_its_rows(batch_balanced, ROWS)


def test_a_run_learns_writes_its_metric_and_is_scored_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*words_of(table(tmp_path, good(240))), "method=fedavg", "adapter.train_head=true", "privacy=none"]
    words += ["num_rounds=4", "trainer.sample_rate=1.0", "trainer.divisor=26", f"tracking.output_dir={tmp_path}"]
    assert simulate([*words, "trainer.optimizer.lr=0.3"]) == 0
    (metrics,), (page,) = tmp_path.rglob("metrics.jsonl"), tmp_path.rglob("report.html")
    rows = lines(metrics)
    assert rows[-1]["loss"] < rows[0]["loss"] and set(rows[0]["measures"]) >= {"micro_f1", "macro_f1", "hamming_loss"}
    assert "Micro-F1 after each round" in page.read_text()
    (card,) = tmp_path.rglob("adapter/README.md")
    assert "anger" in card.read_text()
    capsys.readouterr()
    evaluate([str(metrics.parent), "--on", "held-out"])
    assert f"{rows[-1]['measures']['micro_f1']:.4f}" in capsys.readouterr().out


def test_a_private_run_states_what_it_spent(tmp_path: Path) -> None:
    words = [*words_of(table(tmp_path, good(120))), "adapter.train_head=true", f"tracking.output_dir={tmp_path}"]
    assert simulate([*words, "num_rounds=1", "data.num_test=20"]) == 0
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    assert 0 < lines(metrics)[-1]["epsilon_max"] <= 6


def test_groups_and_pairs_are_read(tmp_path: Path) -> None:
    rows = [f"first {i};second {i};joy;site {i % 2}" for i in range(8)]
    path = table(tmp_path, rows, header="a;b;labels;site")
    found = load_multilabel_table(path, labels=NAMES, text_column="a", text_pair_column="b", group_column="site")
    assert isinstance(found, MultiLabelText) and found.groups is not None
    assert found.row_texts()[1] == ("first 1", "second 1") and found.groups[:2] == ("site 0", "site 1")
