"""Which methods go with the client unit, the others refused by name and with their reason.

It has a proof for one thing: the mean, with equal weights, of updates that were clipped one by one, with noise on their
sum. A rule of the server goes with it where it reads that mean and nothing else of the clients.
"""

from collections.abc import Iterator
from typing import Any

from fedlr.config.choice import Choice
from fedlr.config.rule import rule
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.methods.aggregate.server_optimizer import FedAdam, FedAvgM, FedYogi
from fedlr.methods.method import Always

PROVEN = "set method=fedavg, fedsvd, ffa_lora, head or another whose aggregate is weighted_mean or a server optimizer"
NO_PROOF = "no bound is proven on what one client can change in it"
# By the name of the rule, as code has it: why its result is more than a function of the noised mean.
REASONS = {
    "CenteredClipping": "it chooses by lengths of the clients' own updates, before any noise",
    "CoordinateMedian": "it chooses by the clients' own numbers, one by one, before any noise",
    "ExactResidual": "it folds away the difference between the clients' own products and their mean, without a bound",
    "FedAsk": "it multiplies each client's own product with random directions and combines the parts nonlinearly",
    "FedRot": "it turns each client's own factors before it averages them",
    "GeometricMedian": "it chooses by distances between the clients' own updates, before any noise",
    "LayerMean": "it averages the weights that each client's own parameters make of a layer, not the parameters",
    "LoraFair": "it corrects the mean by the clients' own products, before any noise",
    "LoraFairRidge": "it corrects the mean by the clients' own products, before any noise",
    "MultiKrum": "it chooses by distances between the clients' own updates, before any noise",
    "ScaffoldServer": "its controls are made of single clients' updates, which would need a sum and noise of their own",
    "ScoredMean": "it reads a score of each layer from each client's own update",
    "SelfPruning": "it lowers ranks by single clients' updates",
    "TrimmedMean": "it chooses by the clients' own numbers, one by one, before any noise",
    "norm_weighted_mean": "its weights are norms of the clients' own updates, so one client changes everybody's",
    "projected_mean": "it multiplies each client's own product with random directions",
    "stack_and_fold": "it stacks the clients' own factors, which all of them are then sent",
    "svd_redistribution": "it takes the SVD of the mean of the clients' own products, before any noise",
}


EXPECTED = "Expected privacy.unit=example"


@rule("privacy.mechanism", "method")
def same_tensors(c: Choice) -> Iterator[str]:
    """DP-FTRL takes noise of one round back in the next, so a method trains the same tensors in all of them."""
    method, p = c.method, c.experiment.privacy
    constant = isinstance(method.block_schedule, Always) and not method.dynamic_ranks
    if p.unit == "client" and p.mechanism == "dp_ftrl" and not constant:
        yield (
            f"Expected privacy.mechanism=dp_sgd for method={method.name}, which trains other tensors from round to "
            "round, got dp_ftrl: noise of one round is taken back in the next, on the same tensors"
        )


@rule("privacy.unit", "method")
def client_keeps_nothing(c: Choice) -> Iterator[str]:
    """With the client unit no client keeps a part of the model, or a memory of rounds that the server is sent."""
    method = c.method
    if c.experiment.privacy.unit != "client":
        return
    if method.personal:
        yield (
            f"{EXPECTED} for method={method.name}, whose clients keep {', '.join(method.personal)}, got client: what "
            "a client keeps is its own, and no noise hides it from whoever is given its model"
        )
    if method.client.remembers:
        yield (
            f"{EXPECTED} for method={method.name}, whose clients remember earlier rounds, got client: its controls are "
            "made of single clients' updates, which would need a sum and noise of their own"
        )


@rule("privacy.unit", "method")
def proven_mean(c: Choice) -> Iterator[str]:
    """With the client unit the server reads the noised mean of equal weights, and nothing else of the clients."""
    method = c.method
    if c.experiment.privacy.unit != "client":
        return
    if method.mixed_ranks and method.prunes:
        yield f"{EXPECTED} for method={method.name}, got client: {REASONS['SelfPruning']}"
    if not is_proven(method.aggregate):
        name = getattr(method.aggregate, "__name__", type(method.aggregate).__name__)
        why = f"{REASONS.get(name, NO_PROOF)} ({name}); {PROVEN}"
        yield f"{EXPECTED} for method={method.name}, got client: {why}"


def is_proven(aggregate: Any) -> bool:
    """Return whether a rule reads the mean of equal weights and nothing else of the clients.

    >>> is_proven(weighted_mean), is_proven(FedAdam()), is_proven(min)
    (True, True, False)
    """
    if type(aggregate) in (FedAvgM, FedAdam, FedYogi):
        return aggregate.inner is weighted_mean
    return aggregate is weighted_mean
