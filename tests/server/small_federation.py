"""What the tests of the gate share: a small adapter of two dtypes, terms, methods, and pools to compare with."""

import json
from collections.abc import Iterator, Sequence

import torch

from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, Slot
from fedlr.flower.terms import Terms
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.method import Always, Method, SvdRefactor, full_adapter, keep
from fedlr.rounds.round import ClientPool, Dropout, RoundDiagnostics, RoundRequest
from tests.client.device_files import terms_tree

FEDIT = Method("fedit", Always([LORA_A, LORA_B]), weighted_mean, keep, full_adapter)
FEDSVD = Method("fedsvd", Always([LORA_B]), weighted_mean, SvdRefactor(), full_adapter)
TERMS = Terms.read(json.dumps(terms_tree()))


def adapter() -> AdapterState:
    """Return two layers, the second in bfloat16."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer, dtype in enumerate((torch.float32, torch.bfloat16)):
        tensors[Slot(f"layer.{layer}", LORA_A)] = torch.randn(2, 6, generator=generator).to(dtype)
        tensors[Slot(f"layer.{layer}", LORA_B)] = torch.randn(5, 2, generator=generator).to(dtype)
    return AdapterState(tensors, scale=1.0)


def reasons(diagnostics: RoundDiagnostics) -> dict[int, str]:
    """Return why each client that was not used was not."""
    return {dropout.client_id: dropout.reason for dropout in diagnostics.dropouts}


class Outcomes:
    """A pool that gives what it holds."""

    def __init__(self, outcomes: Sequence[ClientUpdate | Dropout]) -> None:
        self.outcomes = outcomes

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        yield from self.outcomes


class Listening:
    """A pool that remembers what another one gives."""

    def __init__(self, pool: ClientPool) -> None:
        self.pool, self.outcomes = pool, list[ClientUpdate | Dropout]()

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        for outcome in self.pool.train(task, cohort):
            self.outcomes.append(outcome)
            yield outcome
