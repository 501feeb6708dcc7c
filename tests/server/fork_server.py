"""A process that only imports, and forks: what a command loads in 8 s of one core is there at once in its children.

Asked by lines of JSON on its standard input, one answer a line on its output; see `forked.py`. Nothing is computed and
no thread is started before a fork. It ends, and its children with it, when its input does.
"""

import ctypes
import gc
import json
import os
import random
import runpy
import signal
import sys
from collections.abc import Sequence
from typing import Any

import flwr.superlink.cli
import tokenizers

import fedlr.client.cli
import fedlr.client.device
import fedlr.client.device_checks
import fedlr.client.node
import fedlr.client.settings
import fedlr.server.app
import fedlr.server.cli
import fedlr.server.enrol
import fedlr.server.link
import fedlr.server.proxy
import fedlr.server.run
import fedlr.server.view.commands
import fedlr.server.view.serving

LOADED = (client, flwr, server, tokenizers)  # and all that they import
PR_SET_PDEATHSIG = 1  # of prctl(2)
CODES: dict[int, int] = {}  # of children that have ended


def main() -> None:
    """Answer until nobody asks; in a child, run what was asked for and end as the interpreter ends."""
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be gone in the children"
    gc.collect()
    gc.freeze()  # so that the memory that children share stays shared
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "ended" in asked:
            print(json.dumps(ended(asked["ended"])), file=answers, flush=True)
        elif (pid := os.fork()) == 0:
            answers.close()
            become(asked)
            return run(asked["command"])
        else:
            print(pid, file=answers, flush=True)


def ended(pid: int) -> int | None:
    """Return the exit code of a child, negative for a signal; None while it runs."""
    if pid not in CODES:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            CODES[pid] = os.waitstatus_to_exitcode(status)
    return CODES.get(pid)


def become(asked: dict[str, Any]) -> None:
    """Take a session, files, environment and folder of its own."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, own in ((0, nothing), (1, log), (2, log)):
        os.dup2(own, number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    random.seed()


def run(command: Sequence[str]) -> None:
    """Run `python -m`, `python -c` or an installed program, as a new interpreter would."""
    match command:
        case [program, "-m", module, *_] if program == sys.executable:
            sys.argv = list(command[2:])
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [program, "-c", code, *_] if program == sys.executable:
            sys.argv = list(command[1:2]) + list(command[3:])
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case _:
            sys.argv = list(command)
            runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
