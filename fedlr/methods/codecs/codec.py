"""What an uplink codec is: an update as fewer bytes, after a client's noise, and back.

A codec sees the *change* of an update, its values less those that were broadcast, which both sides know. It is a
function of that change and of public words alone, so whatever it does is post-processing: no epsilon and no clip bound
knows of it (Dwork and Roth 2014, proposition 2.1). With the client unit alone it sees updates without noise, before the
server's clip; epsilon holds there since the server clips what it decoded, never what was sent. A message has one form
for all clients of a round, whatever their rows are: which slots, shapes and dtypes is `form`, a function of the shapes
alone. A codec that picks what is large (`top_k`) would pick noise, and is refused in private runs: `is_for_private`.

The same functions run in a simulation (`fedlr.rounds.pools.coded`), on a device and in the server's gate, in one
thread, so that one machine makes the same bits of them everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError

NONE = "none"  # the codec that sends an update as it is


class Form(NamedTuple):
    """What one tensor of a message must be."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """What a codec's random numbers are of: nothing in it is secret."""

    seed: int  # of the run's public randomness
    client: int
    round_index: int


@runtime_checkable
class Codec(Protocol):
    """How a change travels; see the head of this file for what it must keep."""

    def is_for_private(self) -> bool:
        """Return whether it may see noised changes."""
        ...

    def form(self, like: Mapping[Slot, Tensor]) -> dict[Slot, Form]:
        """Return slots, shapes and dtypes of every message for tensors of these shapes."""
        ...

    def encode(self, change: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the message of a change: of the form that `form` gives."""
        ...

    def decode(self, message: Mapping[Slot, Tensor], like: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the change of a message of the right form, float32, of the shapes of `like`.

        Raises:
            InputError: what is in the message belongs to no change.
        """
        ...


@dataclass(frozen=True)
class CodecError:
    """What a codec added to the updates of one round, relative to how far these moved.

    A function of what left the clients; with the client unit their updates are not noised yet, and nobody is told.
    """

    update: float  # root of the summed squares over all updates
    mean: float | None  # of the plain mean of the updates; None: of clients of several ranks


@dataclass(frozen=True)
class Exact:
    """Sends an update as it is: no codec."""

    def is_for_private(self) -> bool:
        """Return True."""
        return True

    def form(self, like: Mapping[Slot, Tensor]) -> dict[Slot, Form]:
        """Return the shapes and dtypes themselves."""
        return {slot: Form(tuple(tensor.shape), tensor.dtype) for slot, tensor in like.items()}

    def encode(self, change: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the change."""
        return dict(change)

    def decode(self, message: Mapping[Slot, Tensor], like: Mapping[Slot, Tensor], place: Place) -> dict[Slot, Tensor]:
        """Return the message."""
        return dict(message)


def part(slot: Slot, name: str) -> Slot:
    """Return the slot of what a message has beside, or in place of, the values of a tensor.

    >>> part(Slot("layer", "lora_B"), "scale").role
    'lora_B.scale'
    """
    return Slot(slot.path, f"{slot.role}.{name}")


def num_coded_bytes(codec: Codec | None, like: Mapping[Slot, Tensor]) -> int:
    """Return the bytes of the numbers of one update of these shapes as it travels."""
    forms = (codec or Exact()).form(like).values()
    return sum(torch.Size(form.shape).numel() * form.dtype.itemsize for form in forms)


def encoded(
    codec: Codec, values: Mapping[Slot, Tensor], sent_down: Mapping[Slot, Tensor], place: Place
) -> dict[Slot, Tensor]:
    """Return the message for values that were trained from what was sent down."""
    change = {slot: value.to(torch.float32) - sent_down[slot].to(torch.float32) for slot, value in values.items()}
    return codec.encode(change, place)


def decoded(
    codec: Codec, message: Mapping[Slot, Tensor], sent_down: Mapping[Slot, Tensor], place: Place
) -> dict[Slot, Tensor]:
    """Return the values that a message stands for, in the dtypes of what was sent down; the sender is not trusted.

    Raises:
        InputError: the message is not of the codec's form.
    """
    check_form(message, codec.form(sent_down))
    change = codec.decode(message, sent_down, place)
    return {
        slot: (start.to(torch.float32) + change[slot].reshape(start.shape)).to(start.dtype)
        for slot, start in sent_down.items()
    }


def check_form(message: Mapping[Slot, Tensor], form: Mapping[Slot, Form]) -> None:
    """Refuse a message of other slots, shapes or dtypes, or with numbers that are not finite; values are not told.

    Raises:
        InputError: naming what was expected of the first that is wrong.
    """
    if message.keys() != form.keys():
        raise InputError(f"Expected {len(form)} tensors of the codec's form in a message, got {len(message)} or others")
    for slot, wanted in form.items():
        tensor = message[slot]
        if tensor.dtype != wanted.dtype or tuple(tensor.shape) != wanted.shape:
            raise InputError(
                f"Expected {slot.role} of shape {wanted.shape} and {wanted.dtype} in a message, got "
                f"{tuple(tensor.shape)} and {tensor.dtype}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"Expected finite numbers of {slot.role} in a message, got others")
