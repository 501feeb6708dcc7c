"""A run of DP-FTRL: charged by participation, resumed with the same noise, stated for what it is, refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.privacy.accountant import epsilon
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import recompute
from fedlr.runs.directory import METRICS, SERVER_LEDGER
from fedlr.runs.units import client_mechanism
from fedlr.simulations.choosing import charge_the_rest
from fedlr.simulations.federation import assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.plan import client_unit_lines
from fedlr.simulations.resume import resume
from fedlr.simulations.simulate import simulate
from tests.simulations.small_runs import experiment, federation

FTRL = (
    "privacy=client",
    "privacy.client_epsilon=20",
    "privacy.accountant=rdp",
    "privacy.mechanism=dp_ftrl",
    "cohort=cyclic",
    "cohort_size=2",
    "num_rounds=5",
    "tracking.checkpoint_every=1",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(experiment(*FTRL, f"tracking.output_dir={tmp_path_factory.mktemp('ftrl')}"), say=lambda line: None)


def test_a_run_states_its_mechanism_its_order_and_the_epsilon_of_its_participations(run_dir: Path) -> None:
    told = json.loads((run_dir / "privacy.json").read_text(encoding="utf-8"))
    (mechanism,) = told["mechanisms"]
    event = PoissonSampler(1.0).dp_event(mechanism["noise_multiplier"])
    assert told["epsilon"]["maximum"] == epsilon([(event, 3)], told["delta"], accountant="rdp") <= 20
    assert "DP-FTRL" in mechanism["name"] and mechanism["bands"] == mechanism["separation"] == 2
    assert told["amplification"].startswith("none") and "once in 2 rounds" in told["amplification"]
    assert sorted(read_ledger(run_dir / SERVER_LEDGER)[1].of(0)) == [0, 2, 4]
    assert recompute(run_dir) == told


def test_a_run_that_is_cut_off_draws_the_same_noise_again_and_is_charged_once(run_dir: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(run_dir, cut)
    for name in ("summary.json", "privacy.json", "report.html"):
        (cut / name).unlink()
    for number in (4, 5):  # in the middle of the second cycle
        shutil.rmtree(cut / "checkpoints" / f"round-{number:05d}")
    resume(cut, say=lambda line: None)
    whole, again = ((folder / METRICS).read_text(encoding="utf-8") for folder in (run_dir, cut))
    unlike = ("seconds", "train_s", "aggregate_s", "evaluate_s")
    for one, other in zip(whole.splitlines(), again.splitlines(), strict=True):
        rows = [{k: v for k, v in json.loads(line).items() if k not in unlike} for line in (one, other)]
        assert rows[0] == rows[1]
    tensors = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run_dir, cut)]
    assert tensors[0] == tensors[1]
    assert sorted(read_ledger(cut / SERVER_LEDGER)[1].of(0)) == [0, 2, 4]


def test_noise_is_set_for_the_participations_of_a_client_and_the_same_with_and_without_bands() -> None:
    for words, bands in (((), 2), (("privacy.bands=1",), 1), (("privacy.mechanism=dp_sgd",), 1)):
        _, mechanism = client_mechanism(experiment(*FTRL, *words))
        _, of_all = client_mechanism(experiment(*FTRL, "privacy.mechanism=dp_sgd", "cohort=fixed"))
        assert mechanism is not None and of_all is not None
        assert mechanism.bands == bands and mechanism.separation == 2
        assert mechanism.noise_multiplier < of_all.noise_multiplier, "3 participations of 5 rounds"


def test_a_plan_says_how_much_smaller_the_noise_is_in_the_sum() -> None:
    text = "\n".join(client_unit_lines(assemble(experiment(*FTRL), seed=0)))
    assert "once in 2 rounds" in text and "times smaller in the sum" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("cohort=fixed",), "cohort=cyclic"),
        (("cohort=poisson",), "cohort=cyclic"),
        (("privacy.bands=3",), r"privacy.bands in \[1, 2\]"),
        (("cohort_size=4",), "lower cohort_size"),
        (("privacy.release_noise=grid",), "release_noise=float"),
        (("method=rolora",), "other tensors from round to round"),
        (("method=flora",), "no bound|stacks"),
        (("privacy.mechanism=dp_sgd", "privacy.bands=2"), "dp_ftrl with privacy.bands"),
        (("privacy.max_participations=3",), "max_participations=null"),
        (("patience=2", "data.num_validation=0.1"), "patience"),
        (("runtime=flower",), "runtime=local"),
    ],
)
def test_what_has_no_proof_is_refused_by_name(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError, match=named):
        assemble(experiment(*FTRL, *words), seed=0)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("privacy.mechanism=dp_ftrl",), "privacy.unit=example"),
        (("cohort=cyclic",), "cohort=fixed with privacy.unit=example"),
    ],
)
def test_rows_have_no_such_mechanism_yet(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError, match=named):
        compose_experiment(["experiment=tiny", *words])


def test_rounds_that_are_not_asked_are_charged_in_the_order_of_the_clients(tmp_path: Path) -> None:
    """With budgets of both units: an end that somebody chose leaves the epsilon of all announced rounds."""
    f = federation(*FTRL, "privacy.epsilon=8")
    ledger = create_ledger(f, tmp_path / "ledger.jsonl")
    charge_the_rest(f, ledger, num_rounds=1)
    charges = read_ledger(tmp_path / "ledger.jsonl")[1]
    assert {client: sorted(charges.of(client)) for client in range(4)} == {0: [2, 4], 1: [1, 3], 2: [2, 4], 3: [1, 3]}
