"""What goes down where some of what trains is the clients' own."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedlr.adapters.state import ROLES, AdapterState, Block, Slot
from fedlr.errors import InputError


@dataclass(frozen=True)
class SharedBlock:
    """Send the trained tensors less those of personal roles.

    Of a personal role the server holds no more than the initial value: sent, it would cost bytes, and overwrite what a
    client has of its own. Every client must hold the frozen tensors, bit for bit, from the start.

    Source: Guo et al. 2025, FedSA-LoRA, https://arxiv.org/abs/2410.01463: lora_A is shared, lora_B is not.

    Raises: InputError for roles that do not exist.
    """

    personal: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.personal, str) or not set(self.personal) <= set(ROLES):
            raise InputError(f"Expected personal to be a list of {', '.join(ROLES)}, got {self.personal!r}")

    def __call__(self, adapter: AdapterState, block: Block) -> dict[Slot, Tensor]:
        """Return what every client is sent, by slot."""
        return {slot: tensor for slot, tensor in adapter.select(block).items() if slot.role not in self.personal}
