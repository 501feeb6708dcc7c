"""The baseline of one party with all rows: the same rows, and the mean gradient of all.

Mutant: a divisor of one client for the rows of all.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from fedlr.errors import InputError
from fedlr.runs.directory import METRICS
from fedlr.simulations.cli import simulate
from fedlr.simulations.federation import Federation
from fedlr.simulations.simulate import run_rounds
from tests.server.whole_federation import lines
from tests.simulations.small_runs import experiment, federation, quiet

FULL = ("cohort_size=4", "trainer.num_steps=1", "trainer.sample_rate=1.0", "method=fedavg", "adapter.train_head=true")


def losses_of(f: Federation, folder: Path) -> list[float]:
    folder.mkdir()
    run_rounds(f, folder, ledger=None, progress=quiet(f.experiment))
    return [row["loss"] for row in lines(folder / METRICS)]


def test_full_steps_of_all_clients_are_those_of_one_party(tmp_path: Path) -> None:
    f = federation(*FULL, "privacy=none")
    apart, together = losses_of(f, tmp_path / "apart"), losses_of(f.centralised(), tmp_path / "together")
    assert together == pytest.approx(apart, rel=1e-5) and apart[-1] != apart[0]


def test_another_divisor_is_seen(tmp_path: Path) -> None:
    f = federation(*FULL, "privacy=none")
    one = f.centralised()
    wrong = replace(one, training=replace(one.training, divisor=f.training.divisor))
    apart, together = losses_of(f, tmp_path / "apart"), losses_of(wrong, tmp_path / "together")
    assert together[-1] != pytest.approx(apart[-1], rel=1e-3)


def test_it_holds_every_row_once_and_spends_nothing() -> None:
    f = federation("privacy.max_participations=2")
    one = f.centralised()
    (share,) = one.clients
    assert sorted(share.rows) == sorted(row for client in f.clients for row in client.rows)
    assert one.mechanism is None and one.budget is None and one.experiment.max_participations == f.experiment.num_rounds


def test_it_is_refused_on_private_rows_and_stands_in_the_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tracking.run_centralised=false"):
        experiment("data.public=false", "tracking.run_centralised=true")
    words = ["experiment=tiny", "num_rounds=1", "tracking.run_centralised=true", f"tracking.output_dir={tmp_path}"]
    assert simulate(words) == 0
    (page,) = tmp_path.rglob("report.html")
    assert "All rows at one place" in page.read_text()
