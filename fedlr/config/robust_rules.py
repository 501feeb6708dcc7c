"""What a rule that resists its own clients cannot go together with: each is refused before any work."""

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.methods.method import Method


def check_robust(experiment: Experiment, method: Method) -> None:
    """Refuse cohorts that are too small for a robust rule, and clients that it could not compare.

    Raises:
        InputError: which names the key to change.
    """
    e, rule = experiment, method.aggregate
    if not getattr(rule, "resists", False):
        return
    named, least = f"method.aggregate={rule.name}", method.least_updates  # type: ignore[attr-defined]
    if 0 < e.cohort_size < least:
        raise InputError(
            f"Expected cohort_size >= {least} with {named}, which needs so many updates in a round, got "
            f"{e.cohort_size}; set a smaller method.aggregate.num_malicious"
        )
    if e.runtime.kind != "local" and e.deployment.min_updates < least:
        raise InputError(
            f"Expected deployment.min_updates >= {least} with {named}, which needs so many updates in a round, got "
            f"{e.deployment.min_updates}"
        )
    if e.weighting != "uniform" and not getattr(rule, "takes_weights", False):
        raise InputError(
            f"Expected weighting=uniform with {named}, got {e.weighting!r}: it bounds the influence of a client, not "
            "of a row"
        )
    if e.adapter.has_client_ranks:
        raise InputError(
            f"Expected adapter.client_ranks=null with {named}, got ranks: a client of small rank would look like one "
            "that does harm"
        )
    if method.personal and getattr(rule, "compares_products", False):
        raise InputError(
            f"Expected a method without personal factors with {named}, got method={method.name}: the server does not "
            "know the products whose distances it would compare"
        )
