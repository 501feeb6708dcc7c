"""What a server goes on with is what it began with, and a start more harms no result.

Mutants these tests reject: a server that goes on with another base model, another start or lost lines; one that takes a
simulation's directory for an empty one; one that cannot leave its results behind a second time.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import fedlr.server.cli
import fedlr.server.run as run_module
from fedlr.errors import InputError
from fedlr.runs.directory import sole_writer
from fedlr.server.federation import assemble
from fedlr.server.going_on import check_same
from fedlr.server.run import Run
from tests.server.test_federation import Killed, killed_at
from tests.server.whole_federation import SMALL, Federation, experiment


def test_a_server_that_dies_while_it_leaves_results_behind_leaves_them_at_the_next_start(tmp_path: Path) -> None:
    f = Federation(experiment("num_rounds=1"), tmp_path)
    run = f.finish()
    with killed_at(run_module, "summarise"), pytest.raises(Killed):
        run.leave_behind()
    again = f.start()
    again.leave_behind()
    assert again.is_done
    assert (run.run_dir / "summary.json").exists()


@pytest.mark.parametrize("what", ["terms_sha256", "start_sha256"])
def test_a_run_does_not_go_on_with_another_base_or_start_than_it_began_with(what: str, tmp_path: Path) -> None:
    f = Federation(experiment("num_rounds=1"), tmp_path)
    f.finish()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    original = Run._about
    Run._about = lambda self: {**original(self), what: "0" * 64}  # type: ignore[method-assign]
    try:
        with pytest.raises(InputError, match=what):
            f.start()
    finally:
        Run._about = original  # type: ignore[method-assign]
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_server_whose_model_changed_between_two_starts_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = Federation(experiment("num_rounds=1"), tmp_path)
    f.start()
    other = experiment("num_rounds=1", "model.hidden_size=24")
    monkeypatch.setattr(run_module, "assemble", lambda e, **given: replace(assemble(other, **given), experiment=e))
    with pytest.raises(InputError, match="another than when it began"):
        f.start()


def test_a_server_whose_lines_were_lost_says_so(tmp_path: Path) -> None:
    f = Federation(experiment("num_rounds=1"), tmp_path)
    metrics = f.finish().run_dir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(InputError, match="2 lines of 1 rounds .*, got 1"):
        f.start()


def test_a_server_takes_no_directory_of_a_simulation(tmp_path: Path) -> None:
    f = Federation(experiment("num_rounds=1"), tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="of another run"):
        f.start()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_run_of_before_there_were_test_tables_goes_on_and_one_with_a_new_choice_does_not(tmp_path: Path) -> None:
    began = experiment("num_rounds=1").resolved()
    for key in ("test_path", "test_split"):
        del began["data"][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(began))
    check_same(experiment("num_rounds=1"), tmp_path)
    with pytest.raises(InputError, match="another data"):
        check_same(experiment("num_rounds=1", "data.num_test=null", "data.test_path=held-out.csv"), tmp_path)


def test_a_run_of_before_there_was_noise_on_a_grid_goes_on_and_one_with_that_does_not(tmp_path: Path) -> None:
    began = experiment("num_rounds=1").resolved()
    for key in ("release_noise", "mechanism", "bands", "ledger", "ledger_epsilon"):
        began["privacy"].pop(key, None)
    began["data"]["fetched_by"] = "python -m another.name"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(began))
    now = experiment("num_rounds=1")
    check_same(now, tmp_path)
    for key, value in (("release_noise", "grid"), ("mechanism", "dp_ftrl"), ("bands", 2), ("ledger", "all.jsonl")):
        changed = now.model_copy(update={"privacy": now.privacy.model_copy(update={key: value})})
        with pytest.raises(InputError, match="another privacy"):
            check_same(changed, tmp_path)


def test_a_server_holds_the_directory_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Path] = []

    def finish(this: Run) -> None:
        with pytest.raises(InputError, match="which one is"), sole_writer(this.run_dir):
            pass
        held.append(this.run_dir)

    monkeypatch.setattr(fedlr.server.cli, "finish", finish)
    assert fedlr.server.cli.run([*SMALL, "deployment.rehearsal=true", f"tracking.output_dir={tmp_path}"]) == 0
    assert len(held) == 1
