"""What clients keep from round to round, each on its own disk, or on what would be one.

All of it is made of noised values, so it costs no privacy. Nothing of it is sent as it is: what a client sends is what
it trained on from there.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, Slot, in_block
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule, RuleInputs
from fedlr.rounds.round import RoundRequest


class Kept:
    """Personal tensors, and what the method's rule remembers, by client."""

    def __init__(self) -> None:
        self.personal: dict[int, dict[Slot, Tensor]] = {}
        self._memory: dict[int, dict[Slot, Tensor]] = {}

    def check(self, clients: Sequence[int], task: RoundRequest, adapter: AdapterState) -> None:
        """Compare a task with the adapter and with what these clients keep: before anybody is charged.

        Raises:
            InputError: where nothing would be trained or sent; where a client keeps tensors that this task does not
                train as personal ones, or that have other shapes; where controls are not of the adapter.
        """
        trained = adapter.select(task.block)
        if not adapter.select(task.shared):
            raise InputError("Expected a block with tensors of the adapter that are sent, got none such")
        mine = {slot: tensor.shape for slot, tensor in trained.items() if not in_block(slot, task.shared)}
        every = {slot: tensor.shape for slot, tensor in adapter.tensors.items()}
        for client in clients:
            personal, memory = self.of(client)
            _require_same("personal tensors that this round trains as such", personal, mine)
            _require_same("memories of tensors of the adapter", memory, every)
        _require_same("controls of tensors of the adapter", task.control, every)

    def start(self, client: int, task: RoundRequest, adapter: AdapterState) -> dict[Slot, Tensor]:
        """Return the values that a client starts to train from."""
        return {**adapter.select(task.block), **self.personal.get(client, {})}

    def keep(self, client: int, task: RoundRequest, trained: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Keep what is personal of what a client trained, and return the rest, which it sends."""
        mine = {slot: tensor for slot, tensor in trained.items() if not in_block(slot, task.shared)}
        if mine:
            self.personal[client] = mine
        return {slot: tensor for slot, tensor in trained.items() if slot not in mine}

    def inputs(
        self,
        clients: Sequence[int],
        task: RoundRequest,
        adapter: AdapterState,
        *,
        rule: ClientRule,
        device: torch.device,
    ) -> RuleInputs:
        """Return what the rule reads of these clients; a client that remembers nothing yet remembers zeros."""
        if not rule.changes:
            return RuleInputs()
        frozen = {slot: t.to(device) for slot, t in adapter.tensors.items() if not in_block(slot, task.block)}
        control = {slot: t.to(device) for slot, t in task.control.items()}
        memory = {}
        if rule.remembers:
            zeros = {slot: torch.zeros_like(tensor) for slot, tensor in adapter.select(task.block).items()}
            rows = [{**zeros, **self._memory.get(client, {})} for client in clients]
            memory = {slot: torch.stack([row[slot] for row in rows]).to(device) for slot in zeros}
        ranks = torch.tensor([task.ranks[client] for client in clients]) if task.ranks else None
        return RuleInputs(frozen, control, memory, ranks)

    def of(self, client: int) -> tuple[dict[Slot, Tensor], dict[Slot, Tensor]]:
        """Return a client's personal tensors and memory, for its disk."""
        return self.personal.get(client, {}), self._memory.get(client, {})

    def restore(self, client: int, personal: Mapping[Slot, Tensor], memory: Mapping[Slot, Tensor]) -> None:
        """Take back what `of` gave."""
        self.personal[client], self._memory[client] = dict(personal), dict(memory)

    def tensors(self) -> dict[str, dict[Slot, Tensor]]:
        """Return all of it, for one disk: as few tensors as there are slots and shapes, a row a client."""
        return {"personal": stacked(self.personal), "memory": stacked(self._memory)}

    def take_back(self, tensors: Mapping[str, Mapping[Slot, Tensor]]) -> None:
        """Take back what `tensors` gave."""
        self.personal, self._memory = unstacked(tensors["personal"]), unstacked(tensors["memory"])

    def fingerprint(self, clients: Sequence[int]) -> str:
        """Return the SHA-256 of what these clients keep."""
        digest = hashlib.sha256()
        for part in (part for client in clients for part in self.of(client)):
            digest.update(AdapterState(part, scale=1.0).fingerprint().encode() if part else b"-")
        return digest.hexdigest()

    def remember(self, clients: Sequence[int], inputs: RuleInputs) -> None:
        """Keep each client's part of what the rule remembered."""
        for place, client in enumerate(clients):
            for slot, rows in inputs.memory.items():
                self._memory.setdefault(client, {})[slot] = rows[place].to("cpu", copy=True)


def _require_same(what: str, found: Mapping[Slot, Tensor], shapes: Mapping[Slot, torch.Size]) -> None:
    for slot, tensor in found.items():
        if shapes.get(slot) != tensor.shape:
            raise InputError(
                f"Expected {what}, got {slot.role[:40]} of shape {tuple(tensor.shape)} at {slot.path[:80]!r}; a round "
                "keeps the blocks, personal roles and ranks of those before it"
            )


CLIENT_IDS = "client_ids"


def stacked(by_client: Mapping[int, Mapping[Slot, Tensor]]) -> dict[Slot, Tensor]:
    """Return the tensors of clients with a row a client, beside the (C,) ids of the clients that have them.

    >>> found = stacked({3: {Slot("layer", "lora_A"): torch.ones(2)}, 5: {Slot("layer", "lora_A"): torch.zeros(2)}})
    >>> [(tuple(slot), tuple(tensor.shape)) for slot, tensor in found.items()]
    [(('0 layer', 'lora_A'), (2, 2)), (('0 layer', 'client_ids'), (2,))]
    """
    alike: dict[tuple[Slot, torch.Size, torch.dtype], dict[int, Tensor]] = {}
    for client, own in by_client.items():
        for slot, tensor in own.items():
            alike.setdefault((slot, tensor.shape, tensor.dtype), {})[client] = tensor
    found = {}
    for number, ((slot, _, _), rows) in enumerate(alike.items()):
        found[Slot(f"{number} {slot.path}", slot.role)] = torch.stack(list(rows.values()))
        found[Slot(f"{number} {slot.path}", CLIENT_IDS)] = torch.tensor(list(rows))
    return found


def unstacked(tensors: Mapping[Slot, Tensor]) -> dict[int, dict[Slot, Tensor]]:
    """Return what `stacked` was given."""
    found: dict[int, dict[Slot, Tensor]] = {}
    for slot, rows in tensors.items():
        if slot.role != CLIENT_IDS:
            path = slot.path.partition(" ")[2]
            for client, row in zip(tensors[Slot(slot.path, CLIENT_IDS)].tolist(), rows, strict=True):
                found.setdefault(client, {})[Slot(path, slot.role)] = row.clone()
    return found
