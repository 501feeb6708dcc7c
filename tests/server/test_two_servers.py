"""Two servers of one secret start at one SuperLink at the same moment, in two processes: each has its own run.

A pause between a run's start and the taking of its task lets them meet. Without the lock three starts went well too, so
this shows that two servers work, and not that the lock is why.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.live_superlink import QUIET, ROOT, superlink

STARTS = 3  # of each server
SERVER = """
import sys, time
import fedlr.server.link
from fedlr.config.schema import compose_experiment
link, folder, starts, acquire = sys.argv[1], sys.argv[2], int(sys.argv[3]), fedlr.server.link._acquire
fedlr.server.link._acquire = lambda *given, **named: time.sleep(1) or acquire(*given, **named)
deployment = compose_experiment([
    "experiment=tiny", "runtime=superlink", "privacy.randomness=os", "seed=null", f"deployment.superlink={link}",
    f"deployment.root_certificates={folder}/ca.crt", f"deployment.superexec_secret={folder}/secret",
]).deployment
print("ready", flush=True)
sys.stdin.readline()
for _ in range(starts):
    with fedlr.server.link.flower_run(deployment, patience_s=20) as grid:
        print(grid._run.run_id, flush=True)
        time.sleep(0.2)
"""


def runs_of_two(folder: Path) -> list[list[str]]:
    """Return the runs that each of two servers held."""
    with superlink(folder) as link:
        call = [sys.executable, "-c", SERVER, link.address, str(folder), str(STARTS)]
        environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
        both = [
            subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(2)
        ]
        for one in both:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        for one in both:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        return [one.communicate(timeout=300)[0].split() for one in both]


@pytest.mark.slow
def test_two_servers_of_one_secret_never_take_each_others_task(tmp_path: Path) -> None:
    runs = runs_of_two(tmp_path)
    assert [len(own) for own in runs] == [STARTS, STARTS]
    assert len({*runs[0], *runs[1]}) == 2 * STARTS
