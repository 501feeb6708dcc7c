"""Each example's loss is its own."""

import pytest
import torch
import torch.nn.functional as F

from fedlr.tasks.losses import causal_lm, cross_entropy


def test_causal_loss_is_the_mean_over_an_examples_own_tokens() -> None:
    logits, labels = torch.randn(4, 6, 11), torch.randint(0, 11, (4, 6))
    labels[1, 3:] = -100
    labels[2, :3] = -100
    expected = [F.cross_entropy(one[:-1], label[1:]) for one, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(causal_lm(logits, labels), torch.stack(expected))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_causal_loss_without_a_scored_token_is_zero_with_zero_gradient(num_tokens: int) -> None:
    logits = torch.randn(2, num_tokens, 7, requires_grad=True)
    losses = causal_lm(logits, torch.full((2, num_tokens), -100))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert not logits.grad.any()


def test_losses_of_half_precision_logits_are_float32() -> None:
    logits = torch.randn(3, 5).bfloat16()
    assert cross_entropy(logits, torch.tensor([0, 1, 2])).dtype == torch.float32
    assert causal_lm(logits[None], torch.tensor([[0, 1, 2]])).dtype == torch.float32


@pytest.mark.parametrize("loss", [cross_entropy, causal_lm])
def test_no_row_has_a_say_in_the_loss_of_another(loss) -> None:
    shape, label_shape = ((3, 5), (3,)) if loss is cross_entropy else ((3, 4, 5), (3, 4))
    logits, labels = torch.randn(shape), torch.randint(0, 5, label_shape)
    before = loss(logits, labels)
    logits[2], labels[2] = float("nan"), -100
    assert torch.equal(loss(logits, labels)[:2], before[:2])
