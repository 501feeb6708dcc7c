"""One example moves the clipped sum by at most C (remove) or 2 C (replace), whatever the others are: R-P1.

Mutants this file kills: the language-model loss averaged over the tokens of the batch, as the library does
it; the classification loss averaged over the batch; a clip of each tensor apart; a clip of the batch instead
of the example; a bound that is 1% too large; all of it in the fused engine too.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedlr.models.peft_state import train_only
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import LossOfLogits, class_losses, cross_entropy, token_losses
from fedlr.training import fused
from fedlr.training import gradients as shipped
from tests.training.small_models import (
    A_AND_B,
    B_AND_HEAD,
    B_ONLY,
    EVERYTHING,
    MAX_TOKENS,
    batch,
    client_data,
    difference,
    joint_norm,
    language_labels,
    mutant,
    random_rows,
    small_model,
)

Row = tuple[list[int], int]  # tokens and label
NUM_ROWS, LONG = 8, 64


def random_pair(generator: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Return two neighbours: one row of the first is removed from, or replaced in, the second."""
    rows = [
        ([int(t) for t in generator.integers(4, 39, int(generator.integers(1, MAX_TOKENS + 1)))], int(label))
        for label in generator.choice([0, 1, 2, -100], size=NUM_ROWS, p=[0.3, 0.3, 0.3, 0.1])
    ]
    if generator.random() < 0.3:  # duplicates: gradients that point the same way
        rows = [rows[0]] * (NUM_ROWS - 1) + [rows[-1]]
    where = int(generator.integers(NUM_ROWS))
    if generator.random() < 0.5:
        return rows, rows[:where] + rows[where + 1 :]
    longer = (
        [int(t) for t in generator.integers(4, 39, int(generator.integers(1, LONG + 1)))],
        int(generator.integers(3)),
    )
    return rows, rows[:where] + [longer] + rows[where + 1 :]


def worst_pairs() -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield pairs in which seven rows agree, and the one that changes is long or disagrees."""
    same, long, against = ([5, 6], 0), ([7] * LONG, 0), ([5, 6], 1)
    yield [same] * 7 + [long], [same] * 7 + [same]
    yield [same] * 7 + [long], [same] * 7
    yield [same] * 7 + [against], [same] * 7
    yield [same] * 7 + [against], [same] * 7 + [same]


class Case:
    """One model, block and loss, with an engine of the module under test."""

    def __init__(
        self, engines: ModuleType, name: str, architecture: str, block: frozenset[str], loss: Callable
    ) -> None:
        model = small_model(architecture)
        trained = train_only(model, block)
        self.causal = architecture == "llama_lm"
        true_loss = token_losses if self.causal else class_losses
        self.oracle = shipped.LoopGradients(model, trained, loss=true_loss)
        self.engine = getattr(engines, name)(model, trained, loss=loss)

    def clipped_sum(self, engine: object, rows: list[Row], bound: float) -> dict:
        inputs = batch([tokens for tokens, _ in rows], width=max(len(tokens) for tokens, _ in rows))
        labels = torch.tensor([label for _, label in rows])
        if self.causal:
            labels = language_labels(inputs).masked_fill(labels[:, None] == -100, -100)
        return engine.clipped_sum(Batch(inputs, labels), max_grad_norm=bound)

    def ratio(self, before: list[Row], after: list[Row], bound: float) -> float:
        """Return by how many times its permitted distance the sum moves."""
        moved = difference(self.clipped_sum(self.engine, before, bound), self.clipped_sum(self.engine, after, bound))
        return joint_norm(moved) / (bound if len(after) < len(before) else 2 * bound)

    def first_norm(self, rows: list[Row]) -> float:
        """Return the true gradient norm of the first row: bounds near it are the hardest."""
        return joint_norm(self.clipped_sum(self.oracle, rows[:1], float("inf")))


def worst_ratio(case: Case, *, num_pairs: int, seed: int) -> float:
    generator = np.random.default_rng(seed)
    pairs = [*worst_pairs(), *(random_pair(generator) for _ in range(num_pairs))]
    worst = 0.0
    for before, after in pairs:
        norm = case.first_norm(before) or 1.0
        bounds = [norm, norm / (NUM_ROWS - 1)] if before[0] == before[1] else [norm / 3]
        worst = max(worst, *(case.ratio(before, after, bound) for bound in bounds))
    return worst


def check_sensitivity(case: Case, *, num_pairs: int, seed: int = 0) -> None:
    assert worst_ratio(case, num_pairs=num_pairs, seed=seed) <= 1 + 1e-5


CASES = [
    ("HookGradients", "llama_lm", A_AND_B, 100),
    ("HookGradients", "bert", B_AND_HEAD, 30),
    ("HookGradients", "roberta", B_ONLY, 20),
    ("GhostGradients", "llama_lm", A_AND_B, 30),
    ("GhostGradients", "distilbert", A_AND_B, 20),
    ("GhostGradients", "llama", B_AND_HEAD, 20),
    ("LoopGradients", "bert", A_AND_B, 5),
    ("FusedGradients", "llama_lm", A_AND_B, 60),
    ("FusedGradients", "bert", EVERYTHING, 40),
    ("FusedGradients", "gpt2", B_AND_HEAD, 20),
    ("FusedGradients", "roberta", B_ONLY, 20),
]


MODULES = {"HookGradients": shipped, "GhostGradients": shipped, "LoopGradients": shipped, "FusedGradients": fused}


@pytest.mark.parametrize(("name", "architecture", "block", "num_pairs"), CASES)
def test_one_example_moves_the_clipped_sum_by_at_most_c(
    name: str, architecture: str, block: frozenset[str], num_pairs: int
) -> None:
    loss = token_losses if architecture == "llama_lm" else class_losses
    check_sensitivity(Case(MODULES[name], name, architecture, block, loss), num_pairs=num_pairs)


def library_causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weigh tokens as `outputs.loss` does, by those of the whole batch; times N, as Opacus scales a mean."""
    targets = labels[:, 1:]
    tokens = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    return tokens.sum(dim=1) / (targets != -100).sum().clamp(min=1) * len(labels)


def batch_mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, labels) / len(labels)


@pytest.mark.parametrize("name", ["HookGradients", "GhostGradients", "FusedGradients"])
def test_the_librarys_language_loss_is_caught_by_more_than_five_c(name: str) -> None:
    case = Case(MODULES[name], name, "llama_lm", A_AND_B, LossOfLogits(library_causal_loss))
    with pytest.raises(AssertionError):
        check_sensitivity(case, num_pairs=0)
    before, after = [([5, 6], 0)] * 7 + [([7] * LONG, 0)], [([5, 6], 0)] * 8
    assert 2 * case.ratio(before, after, case.first_norm(before)) > 5


def test_it_is_the_librarys_own_loss_that_is_caught() -> None:
    model = small_model("llama_lm")
    inputs = batch(random_rows(NUM_ROWS, seed=4))
    labels = language_labels(inputs)
    outputs = model(**inputs, labels=labels)
    torch.testing.assert_close(library_causal_loss(outputs.logits, labels).mean(), outputs.loss)


@pytest.mark.parametrize("name", ["HookGradients", "GhostGradients", "FusedGradients"])
def test_a_batch_mean_loss_is_caught(name: str) -> None:
    case = Case(MODULES[name], name, "bert", B_AND_HEAD, LossOfLogits(batch_mean_loss))
    with pytest.raises(AssertionError):
        check_sensitivity(case, num_pairs=0)
    assert worst_ratio(case, num_pairs=0, seed=0) > 1.2


JOINT = "torch.stack([_row_norms(row) for row in rows.values()]).norm(dim=0)"
WRONG_CLIPS = {
    "each tensor apart": (JOINT, JOINT.replace("norm(dim=0)", "amax(dim=0)")),
    "the batch": (JOINT, f"{JOINT}.mul(0) + torch.cat([r.mean(0) for r in rows.values()]).norm().double()"),
    "1% too large": ("max_grad_norm / norms", "1.01 * max_grad_norm / norms"),
}


@pytest.mark.parametrize("name", WRONG_CLIPS)
def test_a_wrong_clip_is_caught(name: str) -> None:
    case = Case(mutant(shipped, WRONG_CLIPS[name]), "HookGradients", "bert", A_AND_B, class_losses)
    with pytest.raises(AssertionError):
        check_sensitivity(case, num_pairs=20)


def test_ghost_with_a_wrong_bound_is_caught() -> None:
    engines = mutant(shipped, ("max_grad_norm / norms", "1.01 * max_grad_norm / norms"))
    with pytest.raises(AssertionError):
        check_sensitivity(Case(engines, "GhostGradients", "bert", A_AND_B, class_losses), num_pairs=20)


FOUND = "torch.stack([gradients.squared_norms() for gradients in found]).sum(dim=0).sqrt()"
WRONG_FUSED_CLIPS = {
    "each tensor apart": (FOUND, FOUND.replace("sum(dim=0)", "amax(dim=0)")),
    "the batch": (FOUND, f"{FOUND}.square().mean().sqrt().expand(num_rows)"),
    "1% too large": ("clip_weights(norms, max_grad_norm=", "clip_weights(norms, max_grad_norm=1.01 * "),
    "the first tensor alone": ("for gradients in found])", "for gradients in found[:1]])"),
}


@pytest.mark.parametrize("name", WRONG_FUSED_CLIPS)
def test_a_wrong_clip_of_the_fused_engine_is_caught(name: str) -> None:
    case = Case(mutant(fused, WRONG_FUSED_CLIPS[name]), "FusedGradients", "bert", A_AND_B, class_losses)
    with pytest.raises(AssertionError):
        check_sensitivity(case, num_pairs=20)


@pytest.mark.parametrize("name", ["HookGradients", "FusedGradients"])
def test_padding_and_micro_batches_do_not_change_the_sum(name: str) -> None:
    from fedlr.tasks.examples import micro_batches

    model = small_model("roberta")
    engine = getattr(MODULES[name], name)(model, train_only(model, A_AND_B), loss=class_losses)
    data = client_data(random_rows(9, seed=6))
    sums = []
    for budget in (1, 20, 1000):
        parts = [
            engine.clipped_sum(data.batch(indices), max_grad_norm=0.3)
            for indices in micro_batches(data.lengths, range(9), token_budget=budget)
        ]
        sums.append({slot: torch.stack([part[slot] for part in parts]).sum(dim=0) for slot in parts[0]})
    assert joint_norm(difference(sums[0], sums[2])) <= 1e-5 * joint_norm(sums[0])
    assert joint_norm(difference(sums[1], sums[2])) <= 1e-5 * joint_norm(sums[0])
