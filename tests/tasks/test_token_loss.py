"""The loss without logits is the plain one, example by example, whichever engine takes its gradient.

Mutants this file kills: the mean over the batch's tokens in place of the example's own (one example would then rescale
all others before they are clipped), a scale or a soft cap of the logits left out.
"""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fedlr.adapters.state import LORA_A, LORA_B
from fedlr.errors import InputError
from fedlr.models.peft_state import train_only
from fedlr.models.precision import with_bfloat16_base
from fedlr.tasks import token_loss as shipped
from fedlr.tasks.batch import Batch
from fedlr.tasks.losses import causal_lm
from fedlr.tasks.losses import token_losses as plain_losses
from fedlr.tasks.token_loss import check_token_loss, token_losses, token_scores
from fedlr.training.fused import FusedGradients, check_fused
from fedlr.training.gradients import GhostGradients, HookGradients, LoopGradients
from fedlr.training.supported import check_supported
from tests.causal_families import BUILDERS, VOCABULARY, causal_batch, causal_model
from tests.training.small_models import difference, joint_norm, mutant

A_AND_B, B_ONLY = frozenset({LORA_A, LORA_B}), frozenset({LORA_B})
ENGINES = (HookGradients, GhostGradients, LoopGradients, FusedGradients)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return token_losses(model, batch.inputs, batch.targets)


def rows(num_rows: int = 5, **how: int) -> Batch:
    return Batch(*causal_batch(num_rows, **how))


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "MOST_LOGITS", 3 * VOCABULARY)


@pytest.mark.parametrize("family", BUILDERS)
def test_losses_and_gradients_of_every_example_are_those_of_the_logits(family: str) -> None:
    model, batch = causal_model(family), rows()
    trained = list(train_only(model, A_AND_B).values())
    ours, plain = loss(model, batch), plain_losses(model, batch)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert ours[0] == 0.0  # no scored token
    for row in range(1, batch.num_examples):
        found, wanted = (
            torch.cat([g.flatten() for g in torch.autograd.grad(losses[row], trained, retain_graph=True)])
            for losses in (ours, plain)
        )
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    check_token_loss(model)


@pytest.mark.parametrize("family", BUILDERS)
def test_hooks_ghost_loop_and_fused_agree_on_clipped_sums(family: str) -> None:
    model, batch = causal_model(family), rows(6)
    check_supported(model, A_AND_B)
    check_fused(model, A_AND_B)
    trained = train_only(model, A_AND_B)
    wanted = LoopGradients(model, trained, loss=plain_losses).clipped_sum(batch, max_grad_norm=0.5)
    assert joint_norm(wanted) > 0.1
    for engine in ENGINES:
        gradients = engine(model, trained, loss=loss)
        found = gradients.clipped_sum(batch, max_grad_norm=0.5)
        gradients.close()
        assert joint_norm(difference(found, wanted)) < 1e-5 * joint_norm(wanted), engine.__name__


@pytest.mark.parametrize("engine", ENGINES)
def test_one_example_moves_a_clipped_sum_by_at_most_the_bound(engine) -> None:
    bound, model = 0.3, causal_model("smollm2")
    trained = train_only(model, B_ONLY)
    gradients = engine(model, trained, loss=loss)
    for seed in range(6):
        batch = rows(6, seed=seed, width=8 + 3 * seed)
        whole = gradients.clipped_sum(batch, max_grad_norm=bound)
        for row in range(6):
            others = batch.rows(torch.arange(6) != row)
            moved = joint_norm(difference(whole, gradients.clipped_sum(others, max_grad_norm=bound)))
            assert moved <= bound * (1 + 1e-4)
    gradients.close()


def test_a_mean_over_the_tokens_of_the_batch_is_caught() -> None:
    # One example then rescales the gradients of all others before they are clipped.
    batch_mean = mutant(shipped, ("/ scored.sum(dim=1).clamp(min=1)", "* len(scored) / scored.sum().clamp(min=1)"))
    model, batch = causal_model("smollm2"), rows(6)
    others = batch.rows(slice(0, 5))

    def first_five(module: ModuleType, examples: Batch) -> Tensor:
        return module.token_losses(model, examples.inputs, examples.targets)[:5]

    torch.testing.assert_close(first_five(shipped, batch), first_five(shipped, others), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first_five(batch_mean, batch), first_five(batch_mean, others), rtol=1e-2)


FORGOTTEN = {"gemma2": ("None if cap is None else float(cap)", "None"), "granite": ("bias, scale,", "bias, 1.0,")}


@pytest.mark.parametrize("family", FORGOTTEN)
def test_what_a_family_does_to_its_logits_is_looked_for(family: str) -> None:
    model, forgetful = causal_model(family), mutant(shipped, FORGOTTEN[family])
    with pytest.raises(InputError, match="whose head is a linear layer and no more"):
        forgetful.check_token_loss(model)


def test_a_head_that_is_adapted_and_a_model_that_looks_ahead_are_refused() -> None:
    with pytest.raises(InputError, match=r"frozen linear head, got LlamaForCausalLM.*adapter\.target_modules"):
        loss(causal_model("llama", targets=["lm_head"]), rows())
    model = causal_model("gpt2")
    forward = model.get_base_model().transformer.forward

    def ahead(input_ids: Tensor, **others: object) -> object:
        found = forward(input_ids=input_ids, **others)
        found.last_hidden_state = found.last_hidden_state + found.last_hidden_state.mean(dim=1, keepdim=True)
        return found

    model.get_base_model().transformer.forward = ahead
    with pytest.raises(InputError, match="reads from left to right"):
        check_token_loss(model)


def test_scores_are_those_of_the_logits() -> None:
    model, batch = causal_model("qwen2").eval(), rows()
    found = token_scores(model, batch.inputs, batch.targets)
    logits = model(**batch.inputs).logits[:, :-1]
    scored = batch.targets[:, 1:] != -100
    assert torch.equal(found.scored, scored)
    assert torch.equal(found.hits, (logits.argmax(-1) == batch.targets[:, 1:]) & scored)
    means = found.losses.sum(1) / scored.sum(1).clamp(min=1)
    torch.testing.assert_close(means, causal_lm(model(**batch.inputs).logits, batch.targets), rtol=1e-5, atol=1e-5)
    nothing = token_scores(model, batch.inputs, torch.full_like(batch.targets, -100))
    assert not nothing.losses.any() and not nothing.hits.any()


def test_over_a_bfloat16_base_the_loss_is_float32_and_near() -> None:
    model, batch = causal_model("smollm2"), rows()
    low = with_bfloat16_base(model)
    losses = loss(low, batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, loss(model, batch), rtol=0.05, atol=0.05)
    trained = train_only(low, B_ONLY)
    found = FusedGradients(low, trained, loss=loss).clipped_sum(batch, max_grad_norm=math.inf)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_no_example_has_a_say_in_the_loss_of_another() -> None:
    model, batch = causal_model("smollm2"), rows(4)
    before = loss(model, batch)
    batch.inputs["input_ids"][3] = 7
    batch.targets[3] = 8
    torch.testing.assert_close(loss(model, batch)[:3], before[:3], rtol=1e-6, atol=1e-7)
