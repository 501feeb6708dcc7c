"""What every test can rely on: it draws the same numbers alone, in another order, and in every run.

torch's and numpy's global generators start anew for each test, before its fixtures, and hypothesis looks for the same
examples. Only what asks the operating system (`OsRandomness`, a run with seed=null) is fresh; a test of it says
how often it fails by chance: below 1e-9.
"""

import os
import random
import signal
import sys
from collections.abc import Generator, Iterator

import hypothesis
import pytest

# Before torch is loaded, and for every process that a test starts: two workers on two cores compute with a thread each,
# and a sum rounds as it does alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A run scores with a thread a core. On cores that others use, threads that wait for each other by spinning, as they do
# unless told, took 20 times the work itself (2.4 of 6.2 s of a language model's run).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import fedlr.config.schema
from tests.painted import drawn_by, inline_svg, painted
from tests.remembered import RememberedComposition, RememberedFiles, file_source

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

SEED = 20_261_130


@pytest.fixture(scope="session", autouse=True)
def _remembered_composition() -> Iterator[None]:
    """Compose what was composed before from memory; `tests/test_remembered.py` holds it to Hydra."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlr.config.schema.compose", RememberedComposition(fedlr.config.schema.compose))
        patch.setattr(file_source(), "load_config", RememberedFiles(file_source().load_config))
        yield


@pytest.fixture(scope="session", autouse=True)
def _painted_pictures() -> Iterator[None]:
    """Paint the pictures of reports without rendering them, but for the tests that ask for `rendered_pictures`."""
    with drawn_by(painted):
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_flower_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what Flower writes for its user out of the home folder, and apart for every process of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flwr")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what can be made again out of the home folder, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rendered_pictures() -> Iterator[None]:
    """Draw the reports of a whole module of tests as users have them."""
    with drawn_by(inline_svg):
        yield


WAITING = "tests/server/test_live_"
LONG = ("tests/simulations/", "tests/server/", "tests/client/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders of whole runs first, and what mostly waits before them: processes that share the files out then
    end together."""
    items.sort(key=lambda item: (not item.nodeid.startswith(WAITING), not item.nodeid.startswith(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Leave the process as the test found it, where a command that ran in it changes what others see."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch = sys.modules.get("torch")
    before = (torch.get_num_threads(), torch.get_default_dtype()) if torch else None
    result = yield
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    if torch and before and before != (torch.get_num_threads(), torch.get_default_dtype()):
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the global generators; a library that no test module has imported draws nothing."""
    random.seed(SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(SEED)
