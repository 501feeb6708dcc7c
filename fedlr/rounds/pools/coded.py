"""A pool whose updates travel through a codec, as those of devices do, and what that did to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedlr.adapters.client_ranks import narrowed
from fedlr.adapters.state import AdapterState, ClientUpdate, Slot
from fedlr.errors import InputError
from fedlr.methods.codecs.codec import Codec, CodecError, Place, decoded, encoded
from fedlr.rounds.round import ClientPool, Dropout, RoundRequest
from fedlr.training.threads import torch_threads


class CodedPool:
    """A `ClientPool` (fedlr.rounds.round) around another.

    Args:
        pool: trains.
        codec: of every update.
        enrolled: the adapter that broadcasts overlay.
        seed: of the run's public randomness.
    """

    def __init__(self, pool: ClientPool, codec: Codec, *, enrolled: AdapterState, seed: int) -> None:
        self._pool, self._codec, self._enrolled, self._seed = pool, codec, enrolled, seed
        self._squares = [0.0, 0.0]  # of errors and of changes, over the updates of the round
        self._sums: dict[Slot, tuple[Tensor, Tensor]] = {}  # of both
        self._mean_is_known = True  # all had one rank

    def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
        """Yield what the pool yields, every update as it comes out of its message.

        One that no message can hold, as numbers that are not finite, is dropped as a server's gate drops it.
        """
        self._squares, self._sums, self._mean_is_known = [0.0, 0.0], {}, True
        whole = self._enrolled.overlaid(task.broadcast).select(task.shared)
        for outcome in self._pool.train(task, cohort):
            if isinstance(outcome, ClientUpdate):
                sent_down = narrowed(whole, task.ranks.get(outcome.client_id))
                place = Place(self._seed, outcome.client_id, task.round_index)
                try:
                    with torch_threads(1):
                        message = encoded(self._codec, outcome.tensors, sent_down, place)
                        arrived = decoded(self._codec, message, sent_down, place)
                except InputError:  # never the run's end: with the client unit that would tell one client's fate
                    yield Dropout(outcome.client_id, "rejected", "bad_code")
                    continue
                self._measure(outcome.tensors, arrived, sent_down)
                outcome = replace(outcome, tensors=arrived)
            yield outcome

    def error(self) -> CodecError | None:
        """Return what the codec added in the last round; None where nobody sent an update that moved."""
        error, change = self._squares
        if not change > 0:
            return None
        sums = [sum(float((pair[i] ** 2).sum()) for pair in self._sums.values()) for i in (0, 1)]
        of_mean = (sums[0] / sums[1]) ** 0.5 if sums[1] > 0 else 0.0
        return CodecError((error / change) ** 0.5, of_mean if self._mean_is_known else None)

    def _measure(
        self, sent: Mapping[Slot, Tensor], arrived: Mapping[Slot, Tensor], start: Mapping[Slot, Tensor]
    ) -> None:
        for slot, value in sent.items():
            pair = (arrived[slot].double() - value.double(), value.double() - start[slot].double())
            for i in (0, 1):
                self._squares[i] += float((pair[i] ** 2).sum())
            before = self._sums.get(slot)
            if before is None or before[0].shape == pair[0].shape:
                self._sums[slot] = pair if before is None else (before[0] + pair[0], before[1] + pair[1])
            else:  # clients of several ranks: their mean is a rule's own
                self._mean_is_known = False
