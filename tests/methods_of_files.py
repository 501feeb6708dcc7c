"""Methods as their files in configs/method say, beside the tiny experiment."""

from fedlr.config.build import build_method
from fedlr.config.schema import compose_experiment
from fedlr.methods.method import Method


def method_of(name: str) -> Method:
    """Return the method of `configs/method/NAME.yaml`."""
    return build_method(compose_experiment(["experiment=tiny", f"method={name}"]))
