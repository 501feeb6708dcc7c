"""The rounds of a simulated federation: `fedlr.rounds.round.federated_rounds` with what its configuration says."""

from collections.abc import Iterator

from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.round import ClientPool, RoundDiagnostics, ServerState, federated_rounds
from fedlr.simulations.client_unit import client_unit, cohort_draws
from fedlr.simulations.federation import Federation


def rounds_of(
    federation: Federation, state: ServerState, pool: ClientPool, *, server_ledger: PrivacyLedger | None = None
) -> Iterator[tuple[ServerState, RoundDiagnostics]]:
    """Train from a state to the last round: yield the state after each round, and what happened in it.

    Raises:
        ValueError: whole clients are hidden and there is no ledger of the server's, or the reverse.
    """
    e = federation.experiment
    return federated_rounds(
        state,
        pool=pool,
        method=federation.method,
        num_rounds=e.num_rounds,
        num_clients=e.num_clients,
        cohort_size=e.cohort_size,
        max_participations=e.max_participations,
        seed=federation.seed,
        train_head=e.adapter.train_head,
        ranks=federation.ranks,
        max_update_ratio=e.max_update_ratio,
        average_last=e.average_last,
        poisson=cohort_draws(federation),
        client_unit=client_unit(federation, server_ledger),
    )
