"""A run whose unit is a person: epsilon of several rows at once, its ledger, its statement, and what is refused.

Mutants killed: epsilon of one row in place of a person's; k times it; the worst case of all rows drawn left out.
"""

import csv
import json
import math
from pathlib import Path

import dp_accounting
import pytest

from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.privacy.accountant import calibrate_noise_multiplier, epsilon
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.privacy.statement import recompute
from fedlr.simulations.plan import make_plan
from fedlr.simulations.simulate import simulate


def of_person(rate: float, noise: float, rows: int, steps: int, delta: float = 1e-5) -> float:
    return epsilon([(PoissonSampler(rate).dp_event(noise, rows=rows), steps)], delta)


def test_a_person_of_one_row_is_an_example() -> None:
    one = epsilon([(PoissonSampler(0.1).dp_event(2.0), 5)], 1e-5)
    assert of_person(0.1, 2.0, 1, 5) == one
    assert PoissonSampler(0.1).dp_event(2.0, rows=1) == PoissonSampler(0.1).dp_event(2.0)


@pytest.mark.parametrize(("rows", "noise"), [(2, 4.0), (4, 10.0)])
def test_whole_batches_are_one_gaussian_of_k_times_the_sensitivity(rows: int, noise: float) -> None:
    gaussian = dp_accounting.pld.PLDAccountant()
    gaussian.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise / rows), 5))
    exact, found = gaussian.get_epsilon(1e-5), of_person(1.0, noise, rows, 5)
    assert found == pytest.approx(exact, rel=1e-6)


def exact_delta(eps: float, *, rate: float, noise: float, rows: int) -> float:
    """Return the delta of one step by adding up over a fine grid: the larger of both directions."""
    chances = [math.comb(rows, j) * rate**j * (1 - rate) ** (rows - j) for j in range(rows + 1)]
    step, found = 1e-2, [0.0, 0.0]
    for number in range(int(-12 * noise / step), int((rows + 12 * noise) / step)):
        x = number * step
        without = math.exp(-0.5 * (x / noise) ** 2)
        with_them = sum(p * math.exp(-0.5 * ((x - j) / noise) ** 2) for j, p in enumerate(chances))
        found[0] += max(0.0, with_them - math.exp(eps) * without)
        found[1] += max(0.0, without - math.exp(eps) * with_them)
    return max(found) * step / (noise * math.sqrt(2 * math.pi))


@pytest.mark.parametrize(("rate", "noise", "rows"), [(0.1, 1.0, 3), (0.5, 3.0, 2)])
def test_a_step_has_the_epsilon_of_a_binomial_number_of_its_rows(rate: float, noise: float, rows: int) -> None:
    """Against a sum over a grid: at the epsilon that is stated delta is right to 2 %, and below it it is larger."""
    stated = of_person(rate, noise, rows, 1, delta=1e-3)
    assert exact_delta(stated, rate=rate, noise=noise, rows=rows) == pytest.approx(1e-3, rel=0.02)
    assert exact_delta(of_person(rate, noise, 1, 1, delta=1e-3), rate=rate, noise=noise, rows=rows) > 2e-3


def test_calibrated_noise_keeps_the_budget_of_a_person_and_only_just() -> None:
    budget = PrivacyBudget(6.0, 1e-5)
    noise = calibrate_noise_multiplier(budget, sample_rate=1.0, num_steps=3, rows=3)
    assert of_person(1.0, noise, 3, 3) <= 6.0 < of_person(1.0, noise - 0.001, 3, 3)
    assert noise == pytest.approx(3 * calibrate_noise_multiplier(budget, sample_rate=1.0, num_steps=3), rel=0.01)


def persons(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "who"])
        for number in range(240):
            mood = ["bad", "good"][number % 2]
            writer.writerow([f"the film is {mood} and number {number}", mood, f"person {number % 60}"])
    return (
        "experiment=tiny",
        "data=table",
        f"data.path={path}",
        "data.labels=[bad,good]",
        "data.person_column=who",
        "data.max_length=32",
        "data.num_test=0.2",
        "partition=iid",
        "num_clients=3",
        "cohort_size=2",
        "num_rounds=2",
        "trainer.num_steps=1",
        "trainer.sample_rate=1.0",
        "runtime.num_workers=1",
        "privacy.accountant=pld",
        f"tracking.output_dir={tmp_path}",
    )


def test_a_run_states_the_cap_and_the_epsilon_of_a_person(tmp_path: Path) -> None:
    chosen = compose_experiment(
        [*persons(tmp_path), "privacy.unit=person", "privacy.rows_per_person=3", "privacy.epsilon=8"]
    )
    run_dir = simulate(chosen, say=lambda line: None)
    told = json.loads((run_dir / "privacy.json").read_text(encoding="utf-8"))
    (mechanism,) = told["mechanisms"]
    assert told["unit"].startswith("one person") and told["rows_per_person"] == 3
    assert "at most 3 rows of a person" in told["statement"]
    most = max(row["participations"] for row in map(json.loads, (run_dir / "clients.jsonl").read_text().splitlines()))
    assert told["epsilon"]["maximum"] == of_person(1.0, mechanism["noise_multiplier"], 3, most) <= 8
    assert not any("several rows of one person" in line for line in told["not_covered"])
    assert recompute(run_dir) == told
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert (summary["privacy"], summary["unit"]) == ("dp of persons", "person")
    header = json.loads((run_dir / "ledger.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert header["unit"] == told["unit"] and header["rows_per_person"] == 3
    plan = make_plan(chosen)
    assert "one person, of whom at most 3 rows" in plan
    for text in (plan, json.dumps(told), (run_dir / "report.html").read_text(encoding="utf-8")):
        assert "left out" not in text  # how many rows were too many is nobody's to know


UNIT = ("privacy.unit=person", "privacy.rows_per_person=3")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no cap": (("privacy.unit=person",), "privacy.rows_per_person"),
    "no column": ((*UNIT, "data.person_column=null"), "data.person_column"),
    "no budget": ((*UNIT, "privacy=none", "privacy.epsilon=null"), "privacy.epsilon"),
    "rdp": ((*UNIT, "privacy.accountant=rdp"), "accountant=pld"),
    "devices": ((*UNIT, "runtime=superlink"), "runtime=local"),
    "a cap of nobody": (("privacy.rows_per_person=3",), "privacy.unit=person"),
    "too large a cap": (("privacy.unit=person", "privacy.rows_per_person=65"), "rows_per_person"),
}


@pytest.mark.parametrize("overrides", WRONG.values(), ids=WRONG)
def test_what_does_not_go_with_persons_is_one_clear_error(
    overrides: tuple[tuple[str, ...], str], tmp_path: Path
) -> None:
    given, named = overrides
    with pytest.raises(InputError, match=named):
        compose_experiment([*persons(tmp_path), *given])


def test_a_partition_by_label_is_refused_with_persons(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="partition=iid"):
        make_plan(compose_experiment([*persons(tmp_path), *UNIT, "partition=dirichlet"]))
