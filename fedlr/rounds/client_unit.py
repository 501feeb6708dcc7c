"""The server's side of the client unit: a round is charged, and what leaves it is one noised mean.

The server is trusted: it sees every update in the clear. Who sees what it publishes is protected, and so nothing else
of a round may tell who took part or what came of it: no count of updates, no client's fate, no error of the aggregate.
"""

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.privacy.adaptive_clip import adaptive_update, bound_of, with_bound
from fedlr.privacy.client_sum import released_update
from fedlr.privacy.correlated import CorrelatedNoise
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import Mechanism
from fedlr.streams import ServerRandomness

EVERYBODY = 0  # the one client of a server's ledger, who stands for each of them


class ClientUnit:
    """What a server adds to a round so that its result hides whole clients; see `fedlr.privacy.client_sum`."""

    def __init__(
        self,
        mechanism: Mechanism,
        ledger: PrivacyLedger,
        *,
        randomness: ServerRandomness,
        cohort_size: int,
        computed: str = "",
    ) -> None:
        """Start with a ledger of the client unit.

        Args:
            mechanism: rate of the cohort, bound of an update, noise, divisor.
            ledger: the server's.
            randomness: of the noise.
            cohort_size: clients of a round, or how many are expected: what is told of its traffic.
            computed: all else that decides what clients compute in a round; a repeated round must not differ in it.
        """
        self.cohort_size = cohort_size
        self._mechanism, self._ledger, self._randomness = mechanism, ledger, randomness
        self._computed = f"{computed} {randomness!r}"
        self._reserved: int | None = None  # of the ledger: the charge that this round is the first of
        self._correlated: CorrelatedNoise | None = None
        self._next_bound: float | None = None
        if mechanism.bands > 1:
            self._correlated = CorrelatedNoise(
                mechanism.bands,
                lambda round_index: randomness.server_noise(round_index=round_index),
                is_repeatable=ledger.is_seeded,
            )
        if mechanism.separation > 1 and not ledger.is_seeded and ledger.participations(EVERYBODY):
            raise InputError(
                "Expected privacy.randomness=seeded to go on with a run of cohort=cyclic, got os: its noise was not "
                "stored and cannot be drawn again, and a round that came twice would count twice; start the run anew"
            )

    def charge(self, round_index: int, asked: str) -> None:
        """Charge a round to every client, before any of them trains; `asked` names what it asks.

        With seeded randomness a round that was charged and lost is the same release when it is run again, and costs
        nothing more. With randomness of the operating system it is another release, and is charged again.

        Clients in a fixed order take part once in `separation` rounds: the first of them is charged.

        Raises:
            InputError: the budget does not last for the round.
        """
        self._reserved = None
        if position := round_index % self._mechanism.separation:
            if self._ledger.participations(EVERYBODY) <= round_index // self._mechanism.separation:
                raise ValueError(f"Expected a charge of round {round_index - position} first, got none")
            return
        # Under the operating system's randomness charges are numbered as they come: a round may have two of them.
        number = round_index if self._ledger.is_seeded else self._ledger.participations(EVERYBODY)
        task = hashlib.sha256(repr((asked, self._computed)).encode()).hexdigest()
        refusal = self._ledger.reserve(number, self._mechanism, 1, [EVERYBODY], task)[EVERYBODY]
        if refusal is not None:
            raise InputError(
                f"Expected a budget of the client unit that lasts for round {round_index + 1}, got {refusal.reason}: "
                f"epsilon is {refusal.epsilon_spent:.4g} and would be {refusal.epsilon_if_trained:.4g}; rounds that "
                "were cut off and run again with fresh noise count twice. Raise privacy.client_epsilon or "
                "privacy.client_noise_multiplier, and start the run anew"
            )
        self._reserved = number

    def asked(self, task: str, adapter: AdapterState) -> str:
        """Return what names a round that asks `task`: with a clip bound of its own, that too."""
        return f"{task} {bound_of(adapter, self._mechanism)!r}" if self._mechanism.clip_quantile else task

    def release(
        self,
        updates: Iterable[ClientUpdate],
        sent_down: Mapping[Slot, Tensor],
        *,
        round_index: int,
        before: AdapterState | None = None,
    ) -> ClientUpdate:
        """Return the one update that leaves the round; also of nobody's updates there is one.

        `before`, the adapter that the round began with, remembers the clip bound where it follows a quantile.
        """
        m, noise = self._mechanism, self._randomness.server_noise(round_index=round_index)
        if m.clip_quantile:
            if before is None:
                raise ValueError("Expected the adapter that the round began with, whose memory has the bound, got none")
            norm, where = bound_of(before, m), round_index
            released, self._next_bound = adaptive_update(
                updates, sent_down, m, max_norm=norm, generator=noise, round_index=where
            )
        else:
            released = released_update(
                updates, sent_down, m, generator=noise, round_index=round_index, correlated=self._correlated
            )
        if self._reserved is not None:
            self._ledger.settle_all(self._reserved, {EVERYBODY: 1})
        return released

    def remembered(self, adapter: AdapterState) -> AdapterState:
        """Return the adapter that a round made, with the clip bound for the next one where it follows a quantile."""
        return adapter if self._next_bound is None else with_bound(adapter, self._next_bound)
