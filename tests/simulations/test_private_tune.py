"""`fedlr tune privacy.trials=...`: charged before it trains, the best alone stays, and nothing of the others is told.

Mutants killed: a charge after the first trial; trials that stay; a failed trial that wins; settings of unlike cost; a
second choice in the same folder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.files import NotWritten
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import recompute
from fedlr.privacy.trials import Trials
from fedlr.privacy.trials import _asked as steps_of_trial
from fedlr.runs.directory import BeingWritten, sole_writer, write_origin
from fedlr.runs.report import comparison_table
from fedlr.runs.report.wording import epsilon_text
from fedlr.simulations import cli, private_tune
from fedlr.simulations.notebook import simulate
from fedlr.simulations.private_tune import CHOSEN, SELECTION, TRIALS, choose_privately, cost_of
from tests.simulations.small_runs import SMALL

WORDS = (*SMALL, "data.num_validation=0.2", "privacy.trials=3")
RATES = ("trainer.optimizer.lr=0.01", "trainer.optimizer.lr=0.1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def points(*more: str) -> list[list[str]]:
    return [[*WORDS, *more, rate] for rate in RATES]


def nothing(line: str) -> None:
    """Say nothing."""


Run = Callable[..., Path]


def run_with_score(scores: dict[str, float | None], folder: Path, seen: list[str]) -> Run:
    """A trial that trains nothing: its directory has a score by its rate; None: it fails."""

    def run(experiment: Any, unfinished: Path | None, *, say: Any, is_trial: bool) -> Path:
        assert is_trial
        assert (folder / SELECTION).exists(), "trained before it was charged"
        rate = f"trainer.optimizer.lr={experiment.trainer.optimizer.section()['lr']}"
        seen.append(rate)
        score = scores[rate]
        if score is None:
            raise InputError("it came to nothing")
        run_dir = Path(experiment.tracking.output_dir) / experiment.name / "now"
        run_dir.mkdir(parents=True)
        (run_dir / "summary.json").write_text(json.dumps({"finished": True, "score": score}))
        (run_dir / "asked.yaml").write_text(f"trainer: {{optimizer: {{lr: {rate.partition('=')[2]}}}}}")
        return run_dir

    return run


def stubbed(monkeypatch: pytest.MonkeyPatch, scores: dict[str, float | None]) -> list[str]:
    seen: list[str] = []
    folder = Path("outputs/tiny-selection")
    monkeypatch.setattr(private_tune, "run_job", run_with_score(scores, folder, seen))
    monkeypatch.setattr(private_tune, "assemble", lambda experiment, seed: None)
    monkeypatch.setattr(
        private_tune, "_score", lambda run_dir: (True, json.loads((run_dir / "summary.json").read_text())["score"])
    )
    return seen


def test_a_choice_is_charged_first_states_its_epsilon_and_leaves_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--grid", "trainer.optimizer.lr=0.01,0.1", "--on", "validation", "seed=1"]
    assert cli.tune(words) == 0
    told = capsys.readouterr().out
    folder = Path("outputs/tiny-selection")
    kept = json.loads((folder / SELECTION).read_text())
    assert (folder / SELECTION).stat().st_mode & 0o077 == 0 and sorted(p.name for p in folder.iterdir()) == [
        CHOSEN,
        SELECTION,
    ]
    statement = json.loads((folder / CHOSEN / "privacy.json").read_text())
    (mechanism,) = statement["mechanisms"]
    event = PoissonSampler(mechanism["sample_rate"]).dp_event(mechanism["noise_multiplier"])
    spent = Trials(3.0).epsilon([(event, 4)], 1e-5)
    assert statement["trials"]["epsilon"] == kept["cost"]["epsilon"] == spent > statement["epsilon"]["maximum"]
    assert "best of a random number of trials" in (folder / CHOSEN / "adapter" / "README.md").read_text()
    assert recompute(folder / CHOSEN) == statement
    summary = json.loads((folder / CHOSEN / "summary.json").read_text())
    assert summary["epsilon_max"] == spent and summary["problem"] is None
    page = (folder / CHOSEN / "report.html").read_text()
    assert f"ε = {epsilon_text(spent)}" in page and "The files disagree" not in page
    assert f"ε = {epsilon_text(statement['epsilon']['maximum'])}" not in page
    assert epsilon_text(spent) in comparison_table([folder / CHOSEN])
    assert f"epsilon {spent:.2f}"[:-1] in told and "round" not in told
    assert cli.tune(words) == 2 and "Expected a selection that is not done" in capsys.readouterr().err
    assert cli.simulate(list(WORDS)) == 2 and "trials are of fedlr tune" in capsys.readouterr().err
    with pytest.raises(InputError, match="trials are of fedlr tune"):
        simulate(*WORDS, say=None)
    statement["trials"]["epsilon"] /= 2
    (folder / CHOSEN / "privacy.json").write_text(json.dumps(statement))
    with pytest.raises(InputError, match="other values of trials"):
        recompute(folder / CHOSEN)


def test_the_best_stays_alone_and_one_that_failed_never_wins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = next(s for s in range(100) if {t.point for t in _trials(s)} == {0, 1})
    said: list[str] = []
    seen = stubbed(monkeypatch, {RATES[0]: 0.5, RATES[1]: None})
    chosen = choose_privately(points(f"seed={seed}"), command=["x"], say=said.append)
    assert set(seen) == set(RATES) and len(seen) == len(_trials(seed))
    assert chosen.parts[-2:] == ("tiny-selection", CHOSEN) and not (chosen.parent / TRIALS).exists()
    assert any("lr=0.01" in line for line in said) and "it came to nothing" in capsys.readouterr().err


def test_a_selection_that_was_cut_off_goes_on_and_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(s for s in range(100) if len(_trials(s)) > 2 and {t.point for t in _trials(s)} == {0, 1})
    seen = stubbed(monkeypatch, {RATES[0]: 0.5, RATES[1]: 0.7})
    run, left = private_tune.run_job, 2

    def killed(*args: Any, **kwargs: Any) -> Path:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return run(*args, **kwargs)

    monkeypatch.setattr(private_tune, "run_job", killed)
    with pytest.raises(KeyboardInterrupt):
        choose_privately(points(f"seed={seed}"), command=["x"], say=nothing)
    charged = (Path("outputs/tiny-selection") / SELECTION).read_bytes()
    with pytest.raises(InputError, match="whose command was another"):
        choose_privately(points(f"seed={seed}"), command=["y"], say=nothing)
    monkeypatch.setattr(private_tune, "run_job", run)
    chosen = choose_privately(points(f"seed={seed}"), command=["x"], say=nothing)
    assert len(seen) == len(_trials(seed)) and (chosen.parent / SELECTION).read_bytes() == charged
    assert json.loads((chosen / "summary.json").read_text())["score"] == 0.7
    with pytest.raises(InputError, match="a selection that is not done"):
        choose_privately(points(f"seed={seed}"), command=["x"], say=nothing)


def test_nothing_that_came_out_stays_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(monkeypatch, dict.fromkeys(RATES))
    with pytest.raises(InputError, match="stays charged"):
        choose_privately(points("seed=1"), command=["x"], say=nothing)
    assert (Path("outputs/tiny-selection") / SELECTION).exists()
    seen = stubbed(monkeypatch, dict.fromkeys(RATES, 0.5))
    with pytest.raises(InputError, match="a selection that is not done"):  # that none came out was the one draw
        choose_privately(points("seed=1"), command=["x"], say=nothing)
    assert not seen


@pytest.mark.parametrize("kind", ["full", "written by another", "came to nothing"])
def test_what_says_nothing_of_a_trial_ends_the_command_and_deletes_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = next(s for s in range(100) if len(_trials(s)) > 2 and {t.point for t in _trials(s)} == {0, 1})
    seen = stubbed(monkeypatch, {RATES[0]: 0.5, RATES[1]: 0.7})
    run, folder = private_tune.run_job, Path("outputs/tiny-selection")
    full = NotWritten("No space left on device")
    full.exit_code = 75
    errors = {"full": full, "written by another": BeingWritten("another"), "came to nothing": KeyboardInterrupt()}

    def cut_off(*args: Any, **kwargs: Any) -> Path:
        if len(seen) == 2:
            raise errors[kind]
        return run(*args, **kwargs)

    monkeypatch.setattr(private_tune, "run_job", cut_off)
    with pytest.raises(type(errors[kind])):
        choose_privately(points(f"seed={seed}"), command=["x"], say=nothing)
    found = sorted((folder / TRIALS).glob("*/*/summary.json"))
    assert len(found) == 2 and not (folder / CHOSEN).exists()
    if kind == "came to nothing":
        for path in found:  # however high its score is
            path.write_text(json.dumps({"finished": True, "score": 0.99, "problem": "nothing moved"}))
    monkeypatch.setattr(private_tune, "run_job", run)
    with sole_writer(folder), pytest.raises(BeingWritten):
        choose_privately(points(f"seed={seed}"), command=["x"], say=nothing)
    chosen = choose_privately(points(f"seed={seed}"), command=["x"], say=nothing)
    assert json.loads((chosen / "summary.json").read_text())["score"] in (0.5, 0.7)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.num_steps=1"], "points with the same noise, sample rate and number of steps, got 2 kinds"),
        (["trainer.sample_rate=0.1"], "got 2 kinds"),
        (["privacy.trials_epsilon=6"], "stay within privacy.trials_epsilon=6, got"),
    ],
)
def test_what_has_no_bound_is_refused_before_anything_is_charged(words: list[str], told: str) -> None:
    both = [[*WORDS, *words], [*WORDS, "trainer.num_steps=2", *words[1:]]]
    if "trials_epsilon" in words[0]:
        both = [[*WORDS, *words]]
    with pytest.raises(InputError, match=told):
        cost_of(
            [
                compose_experiment(both[0]),
                compose_experiment([*WORDS, *words[1:]]) if len(both) > 1 else compose_experiment(both[0]),
            ]
        )
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["privacy.max_participations=1", "cohort=fixed", "cohort_size=2"],
        ["privacy=client", "cohort=fixed", "cohort_size=2", "num_rounds=4", "privacy.max_participations=2"],
        ["privacy=client", "cohort=cyclic", "cohort_size=1", "num_rounds=4"],
        ["privacy=client", "cohort=poisson", "num_rounds=3"],
    ],
)
def test_a_trial_is_charged_as_many_steps_as_its_statement_allows(words: list[str], tmp_path: Path) -> None:
    experiment = compose_experiment([*WORDS, *words])
    write_origin(tmp_path, experiment)
    asked = steps_of_trial(tmp_path)
    assert asked is not None and asked[1] == cost_of([experiment]).num_steps


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["privacy=none", "privacy.trials=3"], "one budget, of rows or of clients"),
        (["privacy=client", "privacy.epsilon=6", "cohort=fixed"], "one budget, of rows or of clients"),
        (["privacy.ledger=x", "privacy.ledger_epsilon=20"], "privacy.ledger=null"),
        (["runtime=flower", "data.num_validation=null"], "runtime=local"),
        (["tracking.tracker=wandb", "runtime.offline=false"], "tracking.tracker=null with privacy.trials"),
        (["tracking.tracker=mlflow"], "tracking.tracker=null with privacy.trials"),
        (["tracking.run_centralised=true"], "tracking.run_centralised=false"),
        (["privacy.trials=0.5"], "privacy.trials"),
        (["privacy.trials_law=uniform"], "privacy.trials_law"),
        (["privacy.trials=null", "privacy.trials_epsilon=3"], "privacy.trials with privacy.trials_epsilon"),
    ],
)
def test_what_goes_with_no_trials_is_one_clear_error(words: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        compose_experiment([*WORDS, *words])


def test_without_a_seed_all_is_the_operating_systems() -> None:
    free = compose_experiment([*WORDS, "seed=null", "privacy.randomness=os", "privacy.trials=30"])
    first, second = (private_tune.drawn(free, 2) for _ in range(2))
    assert not {t.name for t in first} & {t.name for t in second} and {t.seed for t in first} == {None}
    assert _trials(3) == _trials(3) and len({len(_trials(s)) for s in range(20)}) > 3


def _trials(seed: int) -> list[private_tune.Trial]:
    return private_tune.drawn(compose_experiment([*WORDS, f"seed={seed}"]), 2)
