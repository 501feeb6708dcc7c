"""Frozen devices do not hold a round of a federation of processes, unless too few are left."""

import signal
import time
from pathlib import Path

import pytest

from simulations.rehearsal import SERVER
from tests.server.live import rehearsed, rounds_of, wait_for
from tests.server.whole_federation import lines


@pytest.mark.timeout(600)
def test_a_frozen_client_does_not_hold_a_round_and_below_quorum_it_waits_for_them(tmp_path: Path) -> None:
    words = ("num_rounds=4", "deployment.min_updates=2", "deployment.round_deadline_s=12", "deployment.max_attempts=99")
    with rehearsed(tmp_path / "live", *words) as rehearsal:
        wait_for(rehearsal, 1)
        first, second = rehearsal.devices[:2]
        first.send(signal.SIGSTOP)
        wait_for(rehearsal, 2)
        assert lines(rehearsal.run_dir / "metrics.jsonl")[2]["num_trained"] == 2
        second.send(signal.SIGSTOP)
        reached = rounds_of(rehearsal)[-1]
        log = rehearsal.logs / f"{SERVER}.log"
        deadline = time.monotonic() + 120
        while "abandoned" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        # A round that both had answered before they froze may still have ended.
        assert rounds_of(rehearsal)[-1] <= reached + 1
        assert "abandoned" in log.read_text()
        for device in (first, second):
            device.send(signal.SIGCONT)
        rehearsal.watch(timeout_s=240)
        assert rounds_of(rehearsal) == [0, 1, 2, 3, 4]
