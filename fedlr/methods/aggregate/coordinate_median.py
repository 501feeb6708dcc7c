"""The coordinate-wise median of what the clients trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedlr.adapters.state import AdapterState, ClientUpdate
from fedlr.methods.aggregate.held import held_updates, stacked
from fedlr.methods.aggregate.trimmed_mean import middle_mean


@dataclass(frozen=True)
class CoordinateMedian:
    """Take the median of every trained number; of an even number of updates the mean of the two in the middle.

    Source: Yin et al. 2018, sec. 3, https://arxiv.org/abs/1803.01498. Biased on purpose, on the factors themselves, as
    `fedlr.methods.aggregate.trimmed_mean`. Where clients have few labels each, no client is near the mean of all, and
    the median of their numbers may lie near nothing that helps: measure it (docs/robustness.md).

    Guarantees: with less than half of the updates hostile each number lies between the smallest and the largest honest
    one; one update, or updates that are all the same, give that; what was not trained keeps its value. Memory grows
    with the cohort. Post-processing of released updates.

    Raises: InputError for unequal weights; ValueError without updates, or if they do not all hold the same tensors.
    """

    keeps_coordinates: ClassVar[bool] = True  # of the factors, from round to round (`fedlr.methods.method`)
    name: ClassVar[str] = "coordinate_median"
    resists: ClassVar[bool] = True  # hostile clients (`fedlr.config.robust_rules`)

    def __call__(self, adapter: AdapterState, updates: Iterable[ClientUpdate]) -> AdapterState:
        """Return the adapter with the median of every trained number."""
        held = held_updates(updates, rule=self.name)
        num_trimmed = (len(held) - 1) // 2
        values = {slot: middle_mean(stacked(held, slot), num_trimmed) for slot in sorted(held[0].tensors)}
        return adapter.with_rounded(values)
