"""The coordinate-wise trimmed mean: of every number the largest and the smallest values are left out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlr.adapters.state import AdapterState, ClientUpdate
from fedlr.errors import in_range
from fedlr.methods.aggregate.held import held_updates, stacked
from fedlr.methods.aggregate.mean import weighted_mean


@dataclass(frozen=True)
class TrimmedMean:
    """Leave out the `num_malicious` largest and smallest values of every trained number, and average the others.

    Source: Yin et al. 2018, sec. 3, https://arxiv.org/abs/1803.01498, whose beta is num_malicious / C. Biased on
    purpose, and on the factors themselves: where both train, the product of two trimmed means is no trimmed mean of
    products, and it depends on the basis of the rank; but clients start from one broadcast adapter, so that a
    minority's other gauge is trimmed like any outlier.

    Guarantees: with at most `num_malicious` hostile updates each number lies between the smallest and the largest
    honest one; `num_malicious=0` is the mean, bit for bit; what was not trained keeps its value. Memory grows with the
    cohort. Post-processing of released updates.

    Args:
        num_malicious: f, of which a round needs 2 f + 1 updates at least. Weights must be equal.

    Raises: InputError for unequal weights or too few updates; ValueError without updates, or if they do not all hold
        the same tensors.
    """

    keeps_coordinates: ClassVar[bool] = True  # of the factors, from round to round (`fedlr.methods.method`)
    name: ClassVar[str] = "trimmed_mean"
    resists: ClassVar[bool] = True  # hostile clients (`fedlr.config.robust_rules`)

    num_malicious: int = 1

    def __post_init__(self) -> None:
        in_range(0, 10**6, num_malicious=self.num_malicious)

    @property
    def least_updates(self) -> int:
        """How many updates a round needs for the guarantee to mean anything."""
        return 2 * self.num_malicious + 1

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter with the trimmed mean of every trained number."""
        held = held_updates(updates, rule=self.name, least=self.least_updates)
        if self.num_malicious == 0:
            return weighted_mean(adapter, held)
        values = {slot: middle_mean(stacked(held, slot), self.num_malicious) for slot in sorted(held[0].tensors)}
        return adapter.with_rounded(values)


def middle_mean(values: Tensor, num_trimmed: int) -> Tensor:
    """Return the mean over the first axis without the `num_trimmed` largest and smallest of every number.

    >>> import torch
    >>> middle_mean(torch.tensor([[1.0], [9.0], [2.0], [4.0]]), 1).item()
    3.0
    """
    return values.sort(dim=0).values[num_trimmed : len(values) - num_trimmed].mean(dim=0)
