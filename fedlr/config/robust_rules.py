"""What a rule that resists its own clients cannot go together with."""

from collections.abc import Iterator

from fedlr.config.choice import Choice
from fedlr.config.rule import rule


def named(c: Choice) -> str | None:
    """Return a robust rule as a user writes it; None where the rule of the server is another."""
    rule_of_server = c.method.aggregate
    if not getattr(rule_of_server, "resists", False):
        return None
    return f"method.aggregate={rule_of_server.name}"  # type: ignore[attr-defined]


@rule("cohort_size", "deployment.min_updates", "method.aggregate")
def enough_updates(c: Choice) -> Iterator[str]:
    """A round has as many updates as a robust rule needs to find the wrong ones."""
    e, robust, least = c.experiment, named(c), c.method.least_updates
    if robust and 0 < e.cohort_size < least:
        yield (
            f"Expected cohort_size >= {least} with {robust}, which needs so many updates in a round, got "
            f"{e.cohort_size}; set a smaller method.aggregate.num_malicious"
        )
    if robust and e.runtime.kind != "local" and e.deployment.min_updates < least:
        yield (
            f"Expected deployment.min_updates >= {least} with {robust}, which needs so many updates in a round, got "
            f"{e.deployment.min_updates}"
        )


@rule("weighting", "method.aggregate")
def influence_of_clients(c: Choice) -> Iterator[str]:
    """A robust rule bounds the influence of a client, not of a row."""
    robust = named(c)
    if robust and c.experiment.weighting != "uniform" and not getattr(c.method.aggregate, "takes_weights", False):
        yield (
            f"Expected weighting=uniform with {robust}, got {c.experiment.weighting!r}: it bounds the influence of a "
            "client, not of a row"
        )


@rule("adapter.client_ranks", "method.aggregate")
def compared_ranks(c: Choice) -> Iterator[str]:
    """A robust rule compares updates of one rank."""
    robust = named(c)
    if robust and c.experiment.adapter.has_client_ranks:
        yield (
            f"Expected adapter.client_ranks=null with {robust}, got ranks: a client of small rank would look like one "
            "that does harm"
        )


@rule("method.personal", "method.aggregate")
def compared_products(c: Choice) -> Iterator[str]:
    """A robust rule that compares products B A is sent both factors."""
    robust = named(c)
    if robust and c.method.personal and getattr(c.method.aggregate, "compares_products", False):
        yield (
            f"Expected a method without personal factors with {robust}, got method={c.method.name}: the server does "
            "not know the products whose distances it would compare"
        )
