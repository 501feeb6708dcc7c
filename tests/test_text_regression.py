"""Texts with numbers: rows that are refused, losses of one row each, scores a referee knows, and a private run.

Mutant: a loss that divides by the size of the batch, which lets one row change the gradients of others.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from fedlr.config.schema import compose_experiment
from fedlr.data.scored import ScoredText, load_scored_table
from fedlr.errors import InputError
from fedlr.simulations.cli import simulate
from fedlr.simulations.federation import assemble
from fedlr.tasks.batch import Batch
from fedlr.tasks.text_regression import Predictions, TextRegression, correlation, text_regression
from fedlr.training.fused import FusedGradients
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from tests.server.whole_federation import lines
from tests.training.one_row import check_a_sum_is_that_of_its_rows, largest_move, rows_with

TASK = TextRegression()
ROWS = rows_with(torch.rand(6, generator=torch.Generator().manual_seed(1)))
TINY = ("experiment=tiny", "task=text_regression", "data=scored_table", "partition=iid", "data.public=true")


def table(folder: Path, rows: list[str], header: str = "text,score") -> Path:
    path = folder / "rows.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def good(num: int) -> list[str]:
    words = ("good", "great", "bad", "awful")
    return [f"the film is {words[i % 4]} and the plot number {i},{(5, 4, 1, 0)[i % 4]}" for i in range(num)]


def words_of(path: Path) -> tuple[str, ...]:
    return (*TINY, f"data.path={path}", "data.score_range=[0,5]", "data.num_test=40", "data.max_length=24")


def test_numbers_of_every_spelling_are_read(tmp_path: Path) -> None:
    found = load_scored_table(table(tmp_path, ["fine,4", "well,4.50", "bad, 1e0 "]), score_range=[0, 5])
    assert found.scores.tolist() == [4.0, 4.5, 1.0] and found.label_names == () and not found.labels.any()
    assert found.subset([2, 0]).targets() == [1.0, 4.0]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("bad,", "row 3, column 'score': the score is missing or no number"),
        ("bad,three", "the score is missing or no number"),
        ("bad,nan", "the score is missing or no number"),
        ("bad,5.01", r"outside data.score_range=\[0,5\]"),
        (",3", "column 'text': the text is empty"),
    ],
)
def test_a_bad_row_is_named_and_its_value_is_not(row: str, told: str, tmp_path: Path) -> None:
    path = table(tmp_path, ["fine,4", row, "so so,2"])
    with pytest.raises(InputError, match=told) as error:
        load_scored_table(path, score_range=[0, 5])
    assert "three" not in str(error.value) and "5.01" not in str(error.value)
    assert load_scored_table(path, score_range=[0, 5], on_bad_row="drop").num_dropped == 1


@pytest.mark.parametrize("wrong", [[5, 0], [0], [0, 1, 2], [0, math.inf], ["a", "b"], [1, 1]])
def test_a_range_that_is_none_is_refused(wrong: list, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Expected score_range to be the smallest and the largest score"):
        load_scored_table(table(tmp_path, good(4)), score_range=wrong)


def test_tables_of_classes_and_label_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"data=scored_table data.score_range=\[LOW,HIGH\]"):
        assemble(compose_experiment(["experiment=tiny", "task=text_regression"]), seed=0)
    with pytest.raises(InputError, match="data.label_weights=null"):
        text_regression(label_names=(), label_weights={"a": 2.0})


def test_a_partition_by_labels_is_refused(tmp_path: Path) -> None:
    words = [word for word in words_of(table(tmp_path, good(120))) if word != "partition=iid"]
    with pytest.raises(InputError, match="set partition=iid"):
        assemble(compose_experiment(words), seed=0)


def test_scores_are_those_of_scipy_and_shares_of_the_range() -> None:
    generator = np.random.default_rng(0)
    target = generator.random(50)
    predicted = np.clip(target + 0.3 * generator.standard_normal(50), 0.01, 0.99)
    parts = [Predictions(predicted[i::2], target[i::2], np.ones(25)) for i in (0, 1)]
    found = TASK.evaluation(parts).measures
    order = np.concatenate([np.arange(0, 50, 2), np.arange(1, 50, 2)])
    assert found["pearson"] == pytest.approx(pearsonr(predicted[order], target[order]).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(predicted[order], target[order]).statistic)
    assert found["rmse"] == pytest.approx(np.sqrt(((predicted - target) ** 2).mean()))
    assert correlation(np.full(5, 0.3), np.arange(5.0)) == 0.0


class OneOutput(nn.Module):
    """A model whose output is a linear function of one number of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> object:
        return type("Output", (), {"logits": (self.weight * x)[:, None]})


def test_the_gradient_of_a_row_is_the_distance_of_its_prediction() -> None:
    model, x, share = OneOutput(), torch.tensor([2.0, -1.0]), torch.tensor([0.9, 0.2])
    losses = TASK.losses(model, Batch({"x": x}, share))
    for row in range(2):
        (gradient,) = torch.autograd.grad(losses[row], [model.weight], retain_graph=True)
        assert float(gradient) == pytest.approx(float((torch.sigmoid(0.7 * x[row]) - share[row]) * x[row]), rel=1e-5)


def batch_mean(model: nn.Module, rows: Batch) -> Tensor:
    return TASK.losses(model, rows) / rows.num_examples


@pytest.mark.parametrize("engine", [HookGradients, GhostGradients, FusedGradients, LoopGradients])
def test_one_row_moves_the_clipped_sum_by_at_most_c(engine: type) -> None:
    assert 0.9 < largest_move(engine, TASK.losses, ROWS, bound=0.01) <= 1 + 1e-4  # it is reached: rows are clipped


def test_a_sum_is_that_of_its_rows() -> None:
    check_a_sum_is_that_of_its_rows(TASK.losses, ROWS)


def test_a_loss_that_knows_how_many_rows_there_are_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_a_sum_is_that_of_its_rows(batch_mean, ROWS)


def test_a_private_run_learns_writes_its_metric_and_goes_into_a_page(tmp_path: Path) -> None:
    path = table(tmp_path, good(200))
    words = [*words_of(path), "method=fedavg", "adapter.train_head=true", "num_rounds=6", "trainer.sample_rate=1.0"]
    words += ["privacy.epsilon=100", "trainer.divisor=26", "trainer.optimizer.lr=4", f"tracking.output_dir={tmp_path}"]
    assert simulate(words) == 0
    (metrics,), (page,) = tmp_path.rglob("metrics.jsonl"), tmp_path.rglob("report.html")
    rows = lines(metrics)
    assert abs(rows[0]["measures"]["pearson"]) < 0.5 and rows[-1]["measures"]["pearson"] > 0.5
    assert "Pearson after each round" in page.read_text()
    (card,) = tmp_path.rglob("adapter/README.md")
    assert "score" in card.read_text()


def test_groups_and_pairs_are_read(tmp_path: Path) -> None:
    rows = [f"first {i},second {i},{i % 5},site {i % 2}" for i in range(8)]
    path = table(tmp_path, rows, header="a,b,score,site")
    found = load_scored_table(path, score_range=[0, 5], text_column="a", text_pair_column="b", group_column="site")
    assert isinstance(found, ScoredText) and found.pairs is not None and found.groups is not None
    assert found.row_texts()[1] == ("first 1", "second 1") and found.groups[:2] == ("site 0", "site 1")
