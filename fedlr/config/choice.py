"""A configuration with the method that was built from it: what the rules of a method are asked of."""

from dataclasses import dataclass

from fedlr.config.schema import Experiment
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.method import Method


@dataclass(frozen=True)
class Choice:
    """An experiment, its method, and what its clients do after the noise."""

    experiment: Experiment
    method: Method
    rule: ClientRule  # the method's, or that of trainer.after_noise
