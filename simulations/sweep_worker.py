"""A process of a sweep: takes runs on its standard input and says on its standard output what comes of them.

Both are lines of JSON. In: the overrides of a run, and the folder of an earlier one to finish. Out: what the run says,
then its directory, or why it failed. When the input ends the sweep is over, or its process is gone: this one ends then,
in the middle of a run too, which can be taken up as after any crash.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from fedlr.errors import InputError
from fedlr.runs.commands import quiet_libraries, ready
from fedlr.simulations.sweep import run_job, told


def main() -> int:
    """Serve a sweep until it has no more runs."""
    quiet_libraries()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message
    waiting: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_read, args=(sys.stdin, waiting, busy), daemon=True).start()
    while (asked := waiting.get()) is not None:
        answer = serve(asked, say=lambda line: _write(out, {"said": line}))
        busy.clear()
        _write(out, answer)
    return 0


def serve(asked: dict[str, Any], *, say: Callable[[str], None]) -> dict[str, str]:
    """Do one run and return what came of it."""
    unfinished = asked["unfinished"]
    try:
        experiment = ready(asked["overrides"])
        return {"run_dir": str(run_job(experiment, None if unfinished is None else Path(unfinished), say=say))}
    except Exception as error:
        if not isinstance(error, InputError):
            traceback.print_exc()
        return {"failed": told(error)}


def _read(lines: TextIO, waiting: "SimpleQueue[dict[str, Any] | None]", busy: threading.Event) -> None:
    for line in lines:
        busy.set()
        waiting.put(json.loads(line))
    if busy.is_set():
        os._exit(1)
    waiting.put(None)


def _write(out: TextIO, message: dict[str, str]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
