"""A run that ends again and again for what passes by itself is started later each time, whatever systemd can do.

`RestartSteps=` of a unit needs systemd 254, and Debian 12 has 252. So the process itself waits before it ends: nothing
the first time, then half a minute, and twice as long each time up to half an hour, on top of the unit's RestartSec=30.
How often it ended so in a row is a file of the run directory; a round that is done in between begins anew. Only under
systemd (INVOCATION_ID): who starts it by hand waits for nothing, nor does `systemctl restart`.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlr.errors import PassingError
from fedlr.files import is_full, write_whole

ENDS = "ends_in_a_row"
RESTART_S, MOST_S = 30.0, 1800.0  # of the unit; and from an end to the next start, at most


def wait_s(ends: int) -> float:
    """Return how long the process waits after so many ends in a row, beside what the unit waits.

    >>> [wait_s(ends) for ends in (1, 2, 3, 4, 50)]
    [0.0, 30.0, 90.0, 210.0, 1770.0]
    """
    return min(RESTART_S * 2.0 ** min(ends - 1, 20), MOST_S) - RESTART_S


@contextmanager
def longer_each_time(
    run_dir: Path, *, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Let an end that passes by itself take longer than the one before it.

    Args:
        run_dir: of the run, which is there.
        say: told why the process waits, before it does.
        sleep: waits for some seconds.
    """
    before = _recorded(run_dir)
    try:
        yield
    except Exception as error:
        if not (isinstance(error, PassingError) or is_full(error)):
            raise
        ends = 1 if _recorded(run_dir) > before else _ends(run_dir) + 1
        with suppress(OSError):  # a full disk: then it is counted no further
            write_whole(run_dir / ENDS, str(ends))
        if (seconds := wait_s(ends)) and "INVOCATION_ID" in os.environ:
            say(f"{error}\n  {ends} ends in a row without a round: waiting {seconds:.0f} s before this one")
            sleep(seconds)
        raise
    with suppress(OSError):
        (run_dir / ENDS).unlink(missing_ok=True)


def _recorded(run_dir: Path) -> int:
    """Return how much is recorded of rounds that are done."""
    with suppress(OSError):
        return (run_dir / "metrics.jsonl").stat().st_size
    return 0


def _ends(run_dir: Path) -> int:
    """Return how many ends in a row there were; 0 where nobody knows, or the file is not whole."""
    with suppress(OSError, ValueError):
        text = (run_dir / ENDS).read_text(encoding="utf-8")
        return min(int(text), 1000) if text.isdecimal() and len(text) < 10 else 0
    return 0
