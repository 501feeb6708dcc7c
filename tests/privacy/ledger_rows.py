"""What the ledger and statement tests share: a budget, a cheap mechanism, and ledgers made of them."""

from pathlib import Path
from typing import Any

from fedlr.privacy.accountant import epsilon
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler

BUDGET = PrivacyBudget(2.0, 1e-5)
MECHANISM = Mechanism(noise_multiplier=20.0, max_grad_norm=0.5, sample_rate=1.0, divisor=8.0)
SAME: dict[str, Any] = {"dataset_id": "reviews", "randomness": "seeded", "accountant": "rdp"}


def new_ledger(path: Path, *, budget: PrivacyBudget = BUDGET, **changes: Any) -> PrivacyLedger:
    return PrivacyLedger.create(path, budget, **{**SAME, **changes})


def open_ledger(path: Path, *, budget: PrivacyBudget = BUDGET, **changes: Any) -> PrivacyLedger:
    return PrivacyLedger.open(path, budget, **{**SAME, **changes})


def cost(num_steps: int, mechanism: Mechanism = MECHANISM) -> float:
    """What `num_steps` of the mechanism cost, apart from any ledger."""
    event = PoissonSampler(mechanism.sample_rate).dp_event(mechanism.noise_multiplier)
    return epsilon([(event, num_steps)], BUDGET.delta, accountant="rdp")


def steps_within_budget(mechanism: Mechanism = MECHANISM) -> int:
    """The most steps that the budget allows, found by counting up."""
    num_steps = 0
    while cost(num_steps + 1, mechanism) <= BUDGET.epsilon:
        num_steps += 1
    return num_steps
