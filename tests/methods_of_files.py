"""Methods as their files in configs/method say."""

from fedlr.config.build import build_method
from fedlr.config.schema import compose_experiment
from fedlr.methods.method import Method


def method_of(name: str, *overrides: str) -> Method:
    """Return the method of `configs/method/NAME.yaml`."""
    return build_method(compose_experiment([f"method={name}", *overrides]))
