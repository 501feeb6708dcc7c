"""Two servers of one secret start at one SuperLink at the same moment, in processes of their own: each has a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.live_superlink import QUIET, ROOT, superlink

STARTS = 5  # of each server
SERVER = """
import sys, time
from fedlr.config.schema import compose_experiment
from fedlr.server.link import flower_run
link, folder, starts = sys.argv[1], sys.argv[2], int(sys.argv[3])
deployment = compose_experiment([
    "experiment=tiny", "runtime=superlink", "privacy.randomness=os", "seed=null", f"deployment.superlink={link}",
    f"deployment.root_certificates={folder}/ca.crt", f"deployment.superexec_secret={folder}/secret",
]).deployment
print("ready", flush=True)
sys.stdin.readline()
for _ in range(starts):
    with flower_run(deployment) as grid:
        print(grid._run.run_id, flush=True)
        time.sleep(0.2)
"""


@pytest.mark.slow
def test_two_servers_of_one_secret_never_hold_one_run(tmp_path: Path) -> None:
    with superlink(tmp_path) as link:
        call = [sys.executable, "-c", SERVER, link.address, str(tmp_path), str(STARTS)]
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
        runs = [one.communicate(timeout=300)[0].split() for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert [len(own) for own in runs] == [STARTS, STARTS]
    assert len({*runs[0], *runs[1]}) == 2 * STARTS, "one run, two servers"
