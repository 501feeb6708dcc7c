"""Validation rows: on which settings are chosen, in no training and in no test figure, whatever the seed.

A share of a table is set apart by a hash of each row that no seed keys: every seed of a run draws its test rows from
what is left, so no row on which a setting was chosen is one that a figure is told of.
"""

import numpy as np

from fedlr.data.placement import AnyTable, validation_positions, whole_rows
from fedlr.errors import InputError


def set_apart(data: AnyTable, share: float) -> tuple[AnyTable, AnyTable]:
    """Return the other rows and the validation rows, each in source order; equal texts are on one side.

    Args:
        data: all rows.
        share: between 0 and 1: the probability of each row to be set apart, by a hash of itself alone.

    Raises:
        InputError: one of the two sides has no rows.
    """
    is_apart = validation_positions(whole_rows(data)) < share
    if is_apart.all() or not is_apart.any():
        raise InputError(
            f"Expected num_validation to leave rows of {data.source} on both sides, got {share:g}, which sets apart "
            f"{int(is_apart.sum())} of {len(data)}"
        )
    return data.subset(np.flatnonzero(~is_apart)), data.subset(np.flatnonzero(is_apart))
