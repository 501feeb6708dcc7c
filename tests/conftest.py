"""What every test can rely on: it draws the same numbers alone, in another order, and in every run.

torch's and numpy's global generators start anew for each test, before its fixtures, and hypothesis looks for the same
examples. Only what asks the operating system (`OsRandomness`, a run with seed=null) is fresh; a test of it says
how often it fails by chance: below 1e-9.
"""

import random
import sys

import hypothesis
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

SEED = 20_261_130


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the global generators; a library that no test module has imported draws nothing."""
    random.seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(SEED)
