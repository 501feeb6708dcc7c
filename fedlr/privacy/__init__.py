"""Example-level local differential privacy: mechanism, sampling, accounting, ledger, statement.

One client's guarantee, which needs no trust in the server: for the examples it holds, everything it ever sent
is (epsilon, delta)-differentially private under adding or removing one example, at the epsilon of its ledger.
"""

from fedlr.privacy.accountant import calibrate_noise_multiplier, epsilon
from fedlr.privacy.ledger import PrivacyLedger, Refusal
from fedlr.privacy.mechanism import Mechanism, PrivacyBudget, check_delta, gaussian_noise
from fedlr.privacy.sampling import PoissonSampler, Sampler, ShuffledSampler, UnsupportedSampling
from fedlr.privacy.statement import no_privacy_statement, privacy_statement

__all__ = [
    "Mechanism",
    "PoissonSampler",
    "PrivacyBudget",
    "PrivacyLedger",
    "Refusal",
    "Sampler",
    "ShuffledSampler",
    "UnsupportedSampling",
    "calibrate_noise_multiplier",
    "check_delta",
    "epsilon",
    "gaussian_noise",
    "no_privacy_statement",
    "privacy_statement",
]
