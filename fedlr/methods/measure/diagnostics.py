"""What one aggregation did, in numbers a plot can show. Reads released tensors only.

Legend: R rank.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedlr.adapters.factors import product_singular_values
from fedlr.adapters.state import AdapterState, ClientUpdate, Slot, num_values
from fedlr.methods.aggregate.mean import RunningMean
from fedlr.methods.measure.ideal import Ideal

ERRORS = "aggregation_error"  # the name in an adapter's memory of what a rule measured itself, by layer


def aggregation_error(ideal: Ideal, after: AdapterState) -> dict[str, float]:
    """Return ||sum_k p_k B_k A_k - B A||_F / ||sum_k p_k B_k A_k||_F of every layer, by path.

    `after` is the aggregate, finalised or not; what its side gained over that of the broadcast counts with B A. 0.0
    where the ideal is zero. An exact method ends at the rounding of the adapter's dtype (float32: about 1e-7), not at
    zero. An estimate in a layer where `ideal.is_exact` is false, which takes both factors trained and more clients
    than a server can hold; `aggregation_error_sd` then says how good it is. Of another system than LoRA it is what the
    rule measured (`fedlr.methods.aggregate.layer_mean`), if it did.
    """
    errors = _measured(after)
    for path, layer in ideal.gained(after).items():
        norm = ideal.norm(path)
        errors[path] = ideal.distance(path, layer) / norm if norm > 0 else 0.0
    return errors


def aggregation_error_sd(ideal: Ideal, after: AdapterState) -> dict[str, float]:
    """Return the standard deviation of every layer's `aggregation_error` over the draw of the ideal's sketch, by path.

    An upper bound to first order: those of distance and norm, relative, added. 0.0 where the error is exact.
    """
    deviations = dict.fromkeys(_measured(after), 0.0)
    for path, layer in ideal.gained(after).items():
        norm = 0.0 if ideal.is_exact(path) else ideal.norm(path)
        if norm > 0:
            distance, sd = ideal.distance(path, layer), ideal.sd(path, layer)
            deviations[path] = (sd + ideal.sd(path) * distance / norm) / norm
        else:
            deviations[path] = 0.0
    return deviations


def _measured(after: AdapterState) -> dict[str, float]:
    return {slot.path: float(error) for slot, error in after.memory.get(ERRORS, {}).items()}


def singular_values(adapter: AdapterState) -> dict[str, list[float]]:
    """Return the R largest singular values of delta_W = scale * (lora_B @ lora_A + side) of every layer, descending,
    by path."""
    ranks = {path: len(layer.lora_A) for path, layer in adapter.factors().items()}
    return {
        path: (abs(adapter.scale) * product_singular_values(layer)[: ranks[path]]).tolist()
        for path, layer in adapter.products().items()
    }


@dataclass(frozen=True)
class MeanChange:
    """The weighted mean of what clients changed, all released tensors of a round taken as one vector.

    Its norm holds the noise of the clients too. `weights_norm` is sqrt(sum_k p_k^2): independent noise of standard
    deviation s in each of `num_values` numbers of every client has an expected norm of about
    s * weights_norm * sqrt(num_values) in the mean.
    """

    norm: float
    weights_norm: float
    num_values: int

    def noise_to_signal(self, noise_sd: float | None) -> float | None:
        """Return the expected norm of the noise in the mean over the norm of the mean; None where it is not known.

        Args:
            noise_sd: standard deviation of the noise in one number that a client returns; None: not known.

        >>> MeanChange(norm=2.0, weights_norm=0.5, num_values=16).noise_to_signal(3.0)
        3.0
        """
        ratio = math.nan if not noise_sd else noise_sd * self.weights_norm * math.sqrt(self.num_values)
        return ratio / self.norm if math.isfinite(ratio) and self.norm > 0 else None


class ChangeWatch:
    """Takes the mean of what the updates of a round change while they stream by; memory of one update."""

    def __init__(self, before: Mapping[Slot, Tensor]) -> None:
        """Start at nothing; `before` is what the clients began with."""
        self._before, self._mean = before, RunningMean()
        self._total = self._squares = 0.0

    def watch(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on, and take in each of them on its way."""
        for update in updates:
            self._mean.add(update)
            self._total += update.weight
            self._squares += update.weight**2
            yield update

    def mean(self) -> MeanChange | None:
        """Return the mean of the updates so far; None without any."""
        if not self._total:
            return None
        changes = (mean - self._before[slot].double() for slot, mean in self._mean.values().items())
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes))
        return MeanChange(norm, math.sqrt(self._squares) / self._total, num_values(self._before.values()))
