"""The rounds of a simulated federation: `fedlr.rounds.round.federated_rounds` with what its configuration says."""

from collections.abc import Iterator
from dataclasses import replace

from fedlr.config.build import build_codec
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.rounds.pools.coded import CodedPool
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
    codec = build_codec(e.codec)
    coded = None if codec is None else CodedPool(pool, codec, enrolled=federation.start.adapter, seed=federation.seed)
    rounds = federated_rounds(
        state,
        pool=coded or pool,
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
        codec=codec,
    )
    for after, diagnostics in rounds:
        if coded is not None and not diagnostics.is_secret:
            diagnostics = replace(diagnostics, codec_error=coded.error())
        yield after, diagnostics
