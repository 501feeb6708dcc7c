"""What one aggregation did, in numbers a plot can show. Reads released tensors only.

Legend: R rank.
"""

from fedlr.adapter import AdapterState
from fedlr.aggregate.ideal import Ideal
from fedlr.refactor import product_singular_values

ERRORS = "aggregation_error"  # the name in an adapter's memory of what a rule measured itself, by layer


def aggregation_error(ideal: Ideal, after: AdapterState) -> dict[str, float]:
    """Return ||sum_k p_k B_k A_k - B A||_F / ||sum_k p_k B_k A_k||_F of every layer, by path.

    `after` is the aggregate, finalised or not; what its side gained over that of the broadcast counts with B A. 0.0
    where the ideal is zero. An exact method ends at the rounding of the adapter's dtype (float32: about 1e-7), not at
    zero. An estimate in a layer where `ideal.is_exact` is false, which takes both factors trained and more clients
    than a server can hold; `aggregation_error_sd` then says how good it is. Of another system than LoRA it is what the
    rule measured (`fedlr.aggregate.layer_mean`), if it did.
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
