"""No system that a run carries is plain LoRA under the name of another paper.

Two systems are one where they have LoRA's tensors and compute, with the same values in them, the same outputs and the
same gradients. Mutant: `lora_plus`, whose tensors are LoRA's and whose two learning rates a registry cannot give.
"""

import pytest
import torch

from fedlr.adapters.state import HEAD, Slot
from fedlr.config.build import build
from fedlr.models.adapter_config import AdapterConfig
from fedlr.models.peft_state import adapter_parameters, train_only
from fedlr.models.tuners.attach import NOT_IN_RUNS, attach
from fedlr.models.tuners.registry import TUNERS
from fedlr.tasks.probe import probe_inputs
from tests.simulations.small_runs import experiment

# Of these the name says that it is LoRA: which factor is frozen, or how it starts.
CALLED_LORA = {"lora_frozen_a", "lora_frozen_b", "lora_orthogonal"}
SAME = 1e-7


def role_in(slot: Slot) -> str:
    return slot.role.rpartition(".")[2]


def layer_of(slot: Slot) -> str:
    return slot.path.partition(f".{role_in(slot)}")[0]


def figures(system: str) -> dict[str, torch.Tensor] | None:
    """Return outputs and gradients at fixed values of lora_A and lora_B; None of a system with other tensors."""
    e = experiment()
    base = build(e.model.section(), "model", label_names=("a", "b"), seed=0)
    config = AdapterConfig(rank=4, lora_alpha=4, target_modules=["query", "value"], system=system)
    model = attach(base, config, seed=0)
    parameters = {s: p for s, p in adapter_parameters(model).items() if s.role != HEAD}
    generator = torch.Generator().manual_seed(5)
    if {role_in(slot) for slot in parameters} - {"lora_A", "lora_B"}:
        return None
    for _, parameter in sorted(parameters.items(), key=lambda item: (layer_of(item[0]), role_in(item[0]))):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    if not parameters:
        return None
    trained = train_only(model, frozenset(parameters))
    logits = model.train()(**probe_inputs(model)).logits
    gradients = torch.autograd.grad(logits[:, 0].square().sum(), list(trained.values()))
    by_role: dict[str, list[torch.Tensor]] = {}
    for slot, gradient in zip(trained, gradients, strict=True):
        by_role.setdefault(role_in(slot), []).append(gradient)
    return {"logits": logits.detach(), **{role: torch.cat([g.flatten() for g in gs]) for role, gs in by_role.items()}}


def is_lora(system: str) -> bool:
    own, plain = figures(system), figures("lora")
    assert plain is not None
    if own is None or own.keys() != plain.keys():
        return False
    return all(own[k].shape == plain[k].shape and torch.allclose(own[k], plain[k], atol=SAME) for k in plain)


@pytest.mark.parametrize("system", [n for n in TUNERS if n not in NOT_IN_RUNS and n != "lora"])
def test_no_other_paper_is_plain_lora(system: str) -> None:
    config = TUNERS[system].config.__name__
    if config != "LoraConfig" or system in CALLED_LORA:
        return
    assert not is_lora(system), f"{TUNERS[system].title} is plain LoRA"


def test_the_check_finds_lora_under_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlr.models.tuners.attach.NOT_IN_RUNS", {})
    assert is_lora("lora_plus")
    assert not is_lora("rslora")
