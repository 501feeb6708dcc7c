"""What one aggregation did, in numbers a plot can show. Reads released tensors only.

Legend: R rank.
"""

from fedlr.adapter import AdapterState
from fedlr.aggregate.ideal import Ideal
from fedlr.refactor import product_singular_values


def aggregation_error(ideal: Ideal, after: AdapterState) -> dict[str, float]:
    """Return ||sum_k p_k B_k A_k - B A||_F / ||sum_k p_k B_k A_k||_F of every layer, by path.

    `after` is the aggregate, finalised or not. 0.0 where the ideal is zero. An exact method ends at the rounding of
    the adapter's dtype (float32: about 1e-7), not at zero.
    """
    errors: dict[str, float] = {}
    for path, layer in after.factors().items():
        norm = ideal.norm(path)
        errors[path] = ideal.distance(path, layer) / norm if norm > 0 else 0.0
    return errors


def singular_values(adapter: AdapterState) -> dict[str, list[float]]:
    """Return the R largest singular values of delta_W = scale * lora_B @ lora_A of every layer, descending,
    by path."""
    return {
        path: (abs(adapter.scale) * product_singular_values(layer)).tolist()
        for path, layer in adapter.factors().items()
    }
