"""The rules of what goes together in a configuration; docs/rules.md is made of them.

Those of a method are in `fedlr.config.runtime_rules`: they are asked when it is built, and load PyTorch.
"""

from typing import TYPE_CHECKING

from fedlr.config import (
    language_rules,
    ledger_rules,
    run_rules,
    schedules,
    start_rules,
    trials_rules,
    unit_rules,
    validation_rules,
)
from fedlr.config.rule import Rules, rules_of

if TYPE_CHECKING:
    from fedlr.config.schema import Experiment

OF_EVERY_RUN: "Rules[Experiment]" = Rules(
    "Every run",
    "Asked of the configuration alone, as soon as it is composed.",
    rules_of(
        start_rules, language_rules, validation_rules, schedules, unit_rules, ledger_rules, trials_rules, run_rules
    ),
)
