"""Initialisers (R-P11): what changes the base, or is unknown, is refused; what reads examples needs a public table.

Mutant: a deny list, which lets the initialiser of next year's PEFT through.
"""

import inspect
import re
from collections.abc import Callable

import peft.tuners.lora.layer as peft_layers
import pytest
from pydantic import ValidationError

from fedlr.models.adapter_config import CHANGE_THE_BASE, INFORMED, INITIALISERS, MADE_BY_THE_SERVER, AdapterConfig

ACCEPTED = [*INITIALISERS, *INFORMED, *MADE_BY_THE_SERVER]
REFUSED = [*CHANGE_THE_BASE, "pissa_niter_4", "mica"]
UNKNOWN = ["", "EVA", "Eva ", "corda2", "pissa_niter_", "lora-ga", "kaiming", None, 1, 0, 1.0, ["eva"]]


def configure(value: object) -> None:
    AdapterConfig(rank=2, lora_alpha=2, target_modules=["query"], init_lora_weights=value)


def check_initialisers(configure: Callable[[object], None]) -> None:
    def refused(value: object) -> bool:
        try:
            configure(value)
        except ValidationError:
            return True
        return False

    assert not any(refused(value) for value in ACCEPTED)
    assert all(refused(value) for value in [*REFUSED, *UNKNOWN])


def test_only_initialisers_that_are_known_to_leave_the_base_alone_pass() -> None:
    check_initialisers(configure)


def test_a_deny_list_would_let_unknown_ones_pass() -> None:
    def deny_list(value: object) -> None:
        configure("loftq" if value in REFUSED else True)

    with pytest.raises(AssertionError):
        check_initialisers(deny_list)


def test_every_initialiser_that_peft_compares_with_is_decided() -> None:
    """A new one in peft's layers must be sorted by hand."""
    pattern = r"init_lora_weights(?:\.lower\(\))?(?: == |\.startswith\()\"(\w+)\""
    accepted = set(re.findall(pattern, inspect.getsource(peft_layers)))
    assert {"eva", "corda", "lora_ga", "pissa", "mica"} <= accepted
    assert accepted <= {*map(str, ACCEPTED), *REFUSED}
