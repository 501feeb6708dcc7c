"""Evaluation: a mean over all examples, however they are batched, that leaves the model as it was."""

import pytest
import torch

from fedlr.rounds.evaluate import evaluate
from fedlr.tasks.text_classification import TextClassification
from tests.training.small_models import CLASSIFIERS, client_data, random_rows, small_model


@pytest.mark.parametrize("architecture", CLASSIFIERS)
@pytest.mark.parametrize("token_budget", [1, 20, 4096])
def test_evaluation_is_the_plain_mean_over_examples(architecture: str, token_budget: int) -> None:
    model, data = small_model(architecture).eval(), client_data(random_rows(17, seed=3))
    hits, losses = [], []
    for row in range(17):
        inputs, label = data.batch([row])
        with torch.no_grad():
            log_odds = torch.log_softmax(model(**inputs).logits[0].double(), dim=0)
        hits.append(int(log_odds.argmax()) == int(label))
        losses.append(-float(log_odds[label]))
    found = evaluate(model, data, task=TextClassification(), token_budget=token_budget)
    assert found.accuracy == sum(hits) / 17
    assert found.loss == pytest.approx(sum(losses) / 17, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training: bool) -> None:
    model = small_model("bert").train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, client_data(random_rows(3, seed=1)), task=TextClassification())
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dropout_is_off_while_evaluating() -> None:
    model, data = small_model("bert"), client_data(random_rows(8, seed=2))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert len({evaluate(model.train(), data, task=TextClassification()).loss for _ in range(3)}) == 1
