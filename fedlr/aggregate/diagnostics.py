"""What one aggregation did, in numbers a plot can show. Reads released tensors only; nothing here is D x K.

Legend: D out_features, K in_features, R rank.
"""

from collections.abc import Sequence

import torch

from fedlr.adapter import AdapterState, ClientUpdate, LoraFactors
from fedlr.aggregate.mean import ideal_product
from fedlr.refactor import product_norm, product_singular_values


def aggregation_error(before: AdapterState, updates: Sequence[ClientUpdate], after: AdapterState) -> dict[str, float]:
    """Return ||sum_k p_k B_k A_k - B A||_F / ||sum_k p_k B_k A_k||_F of every layer, by path.

    `before` is the adapter that was broadcast, `after` the aggregate, finalised or not. 0.0 where the ideal
    is zero. An exact method ends at the rounding of the adapter's dtype (float32: about 1e-7), not at zero.
    """
    errors: dict[str, float] = {}
    for path, layer in after.factors().items():
        ideal = ideal_product(before, updates, path)
        norm = product_norm(ideal)
        lora_A = torch.cat([ideal.lora_A, layer.lora_A.double()])
        lora_B = torch.cat([ideal.lora_B, -layer.lora_B.double()], dim=1)
        errors[path] = product_norm(LoraFactors(lora_A, lora_B)) / norm if norm > 0 else 0.0
    return errors


def singular_values(adapter: AdapterState) -> dict[str, list[float]]:
    """Return the R largest singular values of delta_W = scale * lora_B @ lora_A of every layer, descending,
    by path."""
    return {
        path: (abs(adapter.scale) * product_singular_values(layer)).tolist()
        for path, layer in adapter.factors().items()
    }
