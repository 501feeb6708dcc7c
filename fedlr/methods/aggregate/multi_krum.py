"""Multi-Krum: average the updates that have the nearest neighbours, as functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate
from fedlr.errors import InputError, in_range
from fedlr.methods.aggregate.geometry import combined, gram, squared_distances
from fedlr.methods.aggregate.held import held_updates


@dataclass(frozen=True)
class MultiKrum:
    """Average the `num_selected` updates whose C - f - 2 nearest others are nearest: f is `num_malicious`.

    Source: Blanchard et al. 2017, sec. 4, https://arxiv.org/abs/1703.02757; how many may be averaged: El Mhamdi et al.
    2018, sec. 3, https://arxiv.org/abs/1802.07927, who prove C - f - 2. The default C - f is what most code takes.
    Distances are of functions (`fedlr.methods.aggregate.geometry`), in float64, from what was broadcast: differences of
    whole float32 parameters cancel. Equal scores go to the lower client number. Biased on purpose: where clients are
    unlike, who is far from the others is left out, honest or not.

    Guarantees: no client's gauge changes what is chosen or averaged; `num_malicious=0` is the mean: bit for bit the
    weighted mean in layers of which one factor trained, FlexLoRA's in layers of which both did. Memory grows with the
    cohort. Post-processing of released updates.

    Args:
        num_malicious: f, of which a round needs 2 f + 3 updates at least, unless it is 0. Weights must be equal.
        num_selected: at most C - f; null: C - f. 1 is Krum.

    Raises: InputError for unequal weights or too few updates; ValueError without updates, or if they do not all hold
        the same tensors.
    """

    keeps_coordinates_of_one: ClassVar[bool] = True  # where one factor trains (`fedlr.methods.method`)
    name: ClassVar[str] = "multi_krum"
    resists: ClassVar[bool] = True  # hostile clients (`fedlr.config.robust_rules`)
    compares_products: ClassVar[bool] = True

    num_malicious: int = 1
    num_selected: int | None = None

    def __post_init__(self) -> None:
        in_range(0, 10**6, num_malicious=self.num_malicious)
        if self.num_selected is not None:
            in_range(1, 10**6, num_selected=self.num_selected)

    @property
    def least_updates(self) -> int:
        """How many updates a round needs for the guarantee to mean anything."""
        plain = self.num_malicious == 0 and self.num_selected is None
        return 1 if plain else max(2 * self.num_malicious + 3, (self.num_selected or 0) + self.num_malicious)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the mean of the chosen updates."""
        held = held_updates(updates, rule=self.name, least=self.least_updates)
        return combined(adapter, held, self.coefficients(adapter, held))

    def coefficients(self, adapter: AdapterState, held: Sequence[ClientUpdate]) -> list[float]:
        """Return 1 for each update that is averaged, in ascending client order, and 0 for the others."""
        number = len(held) - self.num_malicious if self.num_selected is None else self.num_selected
        if number == len(held):
            return [1.0] * number
        scores_C = krum_scores(squared_distances(gram(adapter, held)), self.num_malicious)
        order = sorted(range(len(held)), key=lambda place: (float(scores_C[place]), held[place].client_id))
        return [float(place in order[:number]) for place in range(len(held))]


def krum_scores(squares_CC: Tensor, num_malicious: int) -> Tensor:
    """Return the sum of each client's C - f - 2 smallest squared distances from others, (C,).

    >>> points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]])
    >>> krum_scores((points - points.T).square(), 1).tolist()
    [5.0, 2.0, 2.0, 5.0, 19013.0]
    """
    num_clients = len(squares_CC)
    nearest = num_clients - num_malicious - 2
    if nearest < 1:
        raise InputError(f"Expected at least {num_malicious + 3} updates, got {num_clients}")
    others = squares_CC + torch.diag(torch.full((num_clients,), torch.inf, dtype=squares_CC.dtype))
    return others.sort(dim=1).values[:, :nearest].sum(dim=1)
