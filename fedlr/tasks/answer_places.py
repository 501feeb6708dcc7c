"""Where in an answer a language model is unsure: its first token, the next ones, those after, and the end mark.

A model that learns how answers of a kind begin and end gains at the first token and at the end, and nowhere else.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PLACES = ("token 1", "tokens 2 to 4", "tokens 5 to 12", "tokens 13 on", "the end mark")
_FIRST = (1, 2, 5, 13)  # token of each place but the last


def end_marks(model: nn.Module) -> tuple[int, ...]:
    """Return the tokens that end an answer, as the model's own settings name them."""
    network: Any = model
    network = network.get_base_model() if hasattr(network, "get_base_model") else network
    found: set[int] = set()
    for settings in (network.config.get_text_config(), getattr(network, "generation_config", None)):
        named: Any = getattr(settings, "eos_token_id", None)
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    return tuple(sorted(found))


def nats_by_place(losses: Tensor, scored: Tensor, wanted: Tensor, ends: tuple[int, ...]) -> NDArray[Any]:
    """Add up the losses of the scored tokens by their place in their own answer.

    Args:
        losses: (N, T) in nats.
        scored: (N, T) bool; tokens of one answer are neighbours.
        wanted: (N, T), the right tokens.
        ends: tokens that are end marks; a last token that is none (the answer was cut) counts by its number.

    Returns:
        (2, places) float64: nats and numbers of tokens.

    >>> losses = torch.tensor([[9.0, 1.0, 2.0, 3.0, 9.0, 4.0]])
    >>> scored = torch.tensor([[False, True, True, True, False, True]])
    >>> nats_by_place(losses, scored, torch.tensor([[5, 5, 5, 2, 5, 5]]), (2,)).tolist()
    [[5.0, 2.0, 0.0, 0.0, 3.0], [2.0, 1.0, 0.0, 0.0, 1.0]]
    """
    seen = scored.long().cumsum(dim=1)
    before = seen.masked_fill(scored, 0).cummax(dim=1).values  # scored tokens up to the answer's beginning
    number = (seen - before)[scored]
    place = torch.bucketize(number, torch.tensor(_FIRST, device=number.device), right=True) - 1
    place[torch.isin(wanted[scored], torch.tensor(ends, dtype=wanted.dtype, device=wanted.device))] = len(_FIRST)
    nats = losses[scored].double()
    sums = [torch.stack([nats[place == one].sum(), (place == one).sum()]) for one in range(len(PLACES))]
    return torch.stack(sums, dim=1).cpu().numpy()


def measures_of_places(found: NDArray[Any]) -> dict[str, float]:
    """Return the mean nats of each place that has a token; `found` as `nats_by_place` returns it, summed."""
    return {f"nats of {name}": float(n / k) for name, n, k in zip(PLACES, found[0], found[1], strict=True) if k}
