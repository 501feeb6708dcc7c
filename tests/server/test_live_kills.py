"""Whatever is killed, a federation of processes has the simulation's numbers, and nothing counts twice.

What is killed gets SIGKILL and is started again by the watch, as systemd would.
"""

import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from simulations.federation_command import LARGEST_DIFFERENCE, adapter_difference
from simulations.rehearsal import PROXY, SERVER, SUPERLINK
from tests.server.live import charges, rehearsed, rounds_of, simulated, wait_for
from tests.server.whole_federation import lines


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_with_all_rounds_and_nothing_counted_twice(
    num_kills: int, tmp_path: Path
) -> None:
    # Every client in every round: an update that was lost or counted twice would show in the adapter.
    words = (
        "num_rounds=10",
        "deployment.min_updates=3",
        "deployment.round_deadline_s=15",
        "deployment.max_attempts=99",
    )
    draw = random.Random(num_kills)
    with rehearsed(tmp_path / "live", *words) as rehearsal:
        names = [SERVER, SUPERLINK, PROXY, *(path.stem for path in rehearsal.settings)]
        killed: Counter[str] = Counter()
        for number in range(num_kills):
            # Spread over the rounds, so that the run is not over before the last.
            wait_for(rehearsal, (number * 9) // num_kills)
            time.sleep(draw.uniform(0.0, 2.0))
            name = names[number % len(names)] if number < len(names) else draw.choice(names)
            if rehearsal.processes[name].code is None:
                rehearsal.processes[name].send(signal.SIGKILL)
                killed[name] += 1
            rehearsal.step()
        rehearsal.watch(timeout_s=600)
        assert killed.total() >= num_kills * 0.8 and len(killed) == len(names)
        assert rounds_of(rehearsal) == list(range(11))
        assert [row["num_trained"] for row in lines(rehearsal.run_dir / "metrics.jsonl")][1:] == [3] * 10
        # Seeded noise: what is computed again is the same to the bit and is charged once, never less than once.
        assert charges(rehearsal) == [10, 10, 10]
        expected = simulated(tmp_path / "local", "num_rounds=10")
        assert adapter_difference(expected / "adapter", rehearsal.run_dir / "adapter") <= LARGEST_DIFFERENCE
