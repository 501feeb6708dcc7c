"""A pool some of whose clients are hostile: it lies between the real one and the round, which validates what comes."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.rounds.round import ClientPool, Dropout, RoundRequest
from fedlr.simulations.attacks.crafted import Move, Seen
from fedlr.streams import Purpose, stream

Craft = Callable[[Seen], Sequence[Move]]


class AttackedPool:
    """Clients of a pool, of whom some send what they make up.

    All train as they are asked; then the hostile ones see what everybody has, and send what `craft` says. A hostile
    client that dropped out sends nothing. Rounds without an honest or without a hostile update pass as they are.
    """

    def __init__(
        self, pool: ClientPool, *, craft: Craft | None, bad: Collection[int], enrolled: AdapterState, seed: int
    ) -> None:
        """Wrap a pool.

        Args:
            pool: whose clients all are honest.
            craft: makes the moves of the hostile ones; None: they send what they trained.
            bad: the hostile ones.
            enrolled: the adapter that every client was given at first.
            seed: of what an attack draws.
        """
        self._pool, self._craft, self._bad = pool, craft, frozenset(bad)
        self._enrolled, self._seed = enrolled, seed
        self.task: RoundRequest | None = None  # of the latest round
        self.sent: list[ClientUpdate] = []  # in it, by everybody, in ascending client order

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Yield what the honest clients send, and what the hostile ones make of it."""
        outcomes = list(self._pool.train(task, cohort))
        trained = sorted((o for o in outcomes if isinstance(o, ClientUpdate)), key=lambda update: update.client_id)
        broadcast = self._enrolled.overlaid(task.broadcast).select(task.shared)
        self.task, self.sent = task, self._crafted(trained, broadcast, task.round_index)
        yield from (outcome for outcome in outcomes if isinstance(outcome, Dropout))
        yield from self.sent

    def _crafted(
        self, trained: Sequence[ClientUpdate], broadcast: Mapping[Slot, Tensor], round_index: int
    ) -> list[ClientUpdate]:
        hostile = [update for update in trained if update.client_id in self._bad]
        honest = [update for update in trained if update.client_id not in self._bad]
        if self._craft is None or not hostile or not honest:
            return list(trained)
        generator = stream(self._seed, Purpose.ATTACK, round_index=1 + round_index)  # 0 drew who they are
        seen = Seen(broadcast, _moves(hostile, broadcast), _moves(honest, broadcast), generator)
        made = {
            update.client_id: replace(update, tensors=_moved(broadcast, move))
            for update, move in zip(hostile, self._craft(seen), strict=True)
        }
        return [made.get(update.client_id, update) for update in trained]


def _moves(updates: Sequence[ClientUpdate], broadcast: Mapping[Slot, Tensor]) -> list[Move]:
    return [
        {slot: update.tensors[slot].double() - broadcast[slot].double() for slot in broadcast} for update in updates
    ]


def _moved(broadcast: Mapping[Slot, Tensor], move: Move) -> dict[Slot, Tensor]:
    """Return finite values of the right types: what is not would be rejected before any rule is asked."""
    most = torch.finfo(torch.float32).max
    return {
        slot: (tensor.double() + move[slot]).nan_to_num().clamp(-most, most).to(tensor.dtype)
        for slot, tensor in broadcast.items()
    }
