"""What the tests of blind answers share: the draws of a round, and all that a server and an owner see of a message."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedlr.client.device import Device
from fedlr.client.settings import Settings
from fedlr.errors import InputError
from fedlr.flower.messages import Reply
from fedlr.flower.records import RecordDict
from fedlr.privacy.sampling import PoissonSampler


@dataclass(frozen=True)
class Draw:
    """What every Poisson draw of a round gives; a rehearsal draws every row, whatever this is."""

    rows: Sequence[int]
    original: Callable[..., Any] = field(default=PoissonSampler.draw)

    def __call__(self, sampler: PoissonSampler, num_examples: int, generator: np.random.Generator) -> Any:
        if sampler.sample_rate == 1.0:
            return self.original(sampler, num_examples, generator)
        return np.array(self.rows, dtype=np.int64)


EMPTY, FILLED = Draw([]), Draw([0, 3])


def answer(device: Device, asked: RecordDict, settings: Settings) -> tuple[Any, ...]:
    before = rows_of(settings.ledger_path)
    try:
        sent = device.answer(asked)
    except InputError:
        return ("no request",)
    reply = Reply.read(sent)
    charged = rows_of(settings.ledger_path)[len(before) :]
    if reply.facts.refused:
        assert not charged, f"{reply.facts.refused} after a charge"
    lengths = sorted(len(part.deflate()) for part in get_all_nested_objects(sent).values())
    facts = reply.facts.model_dump(exclude={"ledger_head", "signature"})  # of a device's own ledger and key
    return facts, {slot: (t.shape, t.dtype) for slot, t in reply.tensors.items()}, lengths, charged


def rows_of(ledger: Path) -> list[Any]:
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("hash", "prev", "task")} for row in rows]
