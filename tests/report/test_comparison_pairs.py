"""Arms against one method, pair by pair: Student's paired interval, and no pair that is not one.

Mutants this file kills: the interval of two independent samples; pairs by order and not by seed; the sign turned; a run
of another budget, split or clip of the reference as a partner; a pair whose other half is missing left out in silence;
a repeated run that counts twice; a label that hides another clip or rate.
"""

import math
from pathlib import Path

import pytest
from scipy import stats

from fedlr.errors import InputError
from fedlr.runs.report import comparison_table, write_comparison
from fedlr.runs.report.comparison_pairs import PairedArm, paired_arms
from fedlr.runs.report.run_files import read_run
from tests.report.run_directory import write_run
from tests.report.test_report_page import drawings, fetched

OURS, THEIRS = (0.81, 0.70, 0.77, 0.66), (0.80, 0.68, 0.74, 0.62)  # differences of 1, 2, 3 and 4 points


def run(root: Path, method: str, seed: int, accuracy: float, *, budget: float = 6.0, extra: str = "") -> Path:
    """Write a run; `extra` is added to its configuration, after its section of privacy."""
    folder = root / f"{len(list(root.iterdir()))}"
    change = {"final_accuracy": accuracy}
    write_run(folder, method=method, privacy="dp", seed=seed, num_rounds=3, budget=budget, change=change)
    with (folder / "config.yaml").open("a", encoding="utf-8") as file:
        file.write(extra)
    return folder


def four_pairs(root: Path) -> list[Path]:
    """Both arms, the seeds of one in another order than those of the other."""
    ours = [run(root, "renewal", seed, accuracy) for seed, accuracy in enumerate(OURS)]
    return ours + [run(root, "fedsvd", seed, THEIRS[seed]) for seed in (2, 0, 3, 1)]


def arms(run_dirs: list[Path], against: str = "fedsvd") -> list[PairedArm]:
    return paired_arms([read_run(run_dir) for run_dir in run_dirs], against=against)


def test_the_interval_is_that_of_the_paired_t_test(tmp_path: Path) -> None:
    (arm,) = arms(four_pairs(tmp_path))
    # By hand: mean 2.5, standard deviation sqrt(5 / 3), t of 3 degrees of freedom 3.182446.
    assert arm.interval.mean == pytest.approx(0.025)
    assert arm.interval.half_width == pytest.approx(0.01 * 3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)
    paired = stats.ttest_rel(OURS, THEIRS).confidence_interval(0.95)
    assert arm.interval.ends == pytest.approx((paired.low, paired.high), rel=1e-9)
    unpaired = stats.ttest_ind(OURS, THEIRS).confidence_interval(0.95)
    assert unpaired.low < 0 < arm.interval.ends[0], "the seeds differ by more than the arms: only pairs can tell"
    assert arm.seeds == (0, 1, 2, 3) and (arm.own, arm.reference) == (OURS, THEIRS)


def test_against_the_other_arm_the_sign_turns(tmp_path: Path) -> None:
    (arm,) = arms(four_pairs(tmp_path), against="renewal")
    assert arm.label == "fedsvd" and arm.interval.mean == pytest.approx(-0.025)


def test_a_repeated_run_counts_with_its_first(tmp_path: Path) -> None:
    (arm,) = arms([*four_pairs(tmp_path), run(tmp_path, "renewal", 0, 0.83)])
    assert arm.interval.num_values == 4 and arm.own[0] == pytest.approx(0.82)


@pytest.mark.parametrize(
    ("method", "seed", "budget", "told"),
    [
        ("renewal", 4, 6.0, "no fedsvd for renewal, seed 4, dp, ε ≤ 6"),
        ("fedsvd", 4, 6.0, "no renewal for fedsvd, seed 4, dp, ε ≤ 6"),
        ("renewal", 0, 3.0, "no fedsvd for renewal, seed 0, dp, ε ≤ 3"),
        ("fedsvd", 0, 3.0, "no other method for fedsvd, seed 0, dp, ε ≤ 3"),
    ],
)
def test_a_run_without_a_partner_is_refused(method: str, seed: int, budget: float, told: str, tmp_path: Path) -> None:
    lonely = run(tmp_path, method, seed, 0.7, budget=budget)
    with pytest.raises(InputError, match=told):
        arms([*four_pairs(tmp_path), lonely])


def test_runs_of_another_split_or_task_are_no_partners(tmp_path: Path) -> None:
    alpha = [run(tmp_path, m, 0, 0.7, extra=f"partition:\n  alpha: {a}\n") for m, a in (("a", 0.5), ("b", 1.0))]
    with pytest.raises(
        InputError, match=r"no other method for a, .* partition.alpha=0.5; no a for b, .* partition.alpha=1.0"
    ):
        arms(alpha, against="a")


def test_what_sets_an_arm_apart_from_its_partner_is_told(tmp_path: Path) -> None:
    clip, rate = "  max_grad_norm: {}\n", "trainer:\n  optimizer:\n    lr: {}\n"
    matched = [run(tmp_path, "ffa_lora", s, 0.7, extra=(clip + rate).format(0.058, 3.0)) for s in (0, 1)]
    plain = [run(tmp_path, "ffa_lora", s, 0.7, extra=(clip + rate).format(0.1, 1.0)) for s in (0, 1)]
    reference = [run(tmp_path, "fedsvd", s, 0.7, extra=(clip + rate).format(0.1, 1.0)) for s in (0, 1)]
    assert [arm.label for arm in arms(matched + plain + reference)] == [
        "ffa_lora",
        "ffa_lora (privacy.max_grad_norm=0.058, trainer.optimizer.lr=3.0)",
    ]


def test_of_several_arms_of_the_reference_the_one_with_the_same_setting_is_the_partner(tmp_path: Path) -> None:
    rate = "trainer:\n  optimizer:\n    lr: {}\n"
    accuracy = {("fedsvd", 1.0): 0.5, ("fedsvd", 2.0): 0.6, ("renewal", 1.0): 0.7, ("renewal", 2.0): 0.7}
    runs = [run(tmp_path, m, s, a, extra=rate.format(lr)) for (m, lr), a in accuracy.items() for s in (0, 1)]
    assert [(arm.label, round(arm.interval.mean, 9)) for arm in arms(runs)] == [
        ("renewal (trainer.optimizer.lr=1.0)", 0.2),
        ("renewal (trainer.optimizer.lr=2.0)", 0.1),
    ]
    odd = [run(tmp_path, "renewal", seed, 0.7, extra=rate.format(5.0)) for seed in (0, 1)]
    with pytest.raises(InputError, match="no fedsvd for renewal"):
        arms([*runs, *odd])


def test_data_are_tasks_of_their_own_and_told_by_their_file(tmp_path: Path) -> None:
    data = "data:\n  path: somewhere/{}.csv\n  labels: of {}\n"
    runs = [
        run(tmp_path, method, seed, accuracy, extra=data.format(name, name))
        for name, method, accuracy in (("mail", "a", 0.9), ("mail", "b", 0.8), ("film", "a", 0.6), ("film", "b", 0.7))
        for seed in (0, 1)
    ]
    found = [(arm.task, round(arm.interval.mean, 9)) for arm in arms(runs, against="a")]
    assert found == [("data=film", 0.1), ("data=mail", -0.1)]


def test_nothing_to_pair_is_refused(tmp_path: Path) -> None:
    pairs = four_pairs(tmp_path)
    with pytest.raises(InputError, match="runs of 'fedit' and of another method .* got only fedsvd, renewal"):
        arms(pairs, against="fedit")
    with pytest.raises(InputError, match="got only renewal"):
        arms(pairs[:4], against="renewal")
    period = "method:\n  period: {}\n"
    two = [run(tmp_path, "x", 0, 0.7, extra=period.format(p)) for p in (2, 5)]
    with pytest.raises(InputError, match=r"one configuration of x .* differ in method\.period"):
        arms([*pairs, *two], against="x")
    unseeded = write_run(tmp_path / "unseeded", num_rounds=3, change={"seed": None})
    with pytest.raises(InputError, match="with a seed to pair them by"):
        arms([*pairs, unseeded])


def test_the_table_and_the_page_show_the_same_and_the_picture_its_bars(tmp_path: Path) -> None:
    pairs = four_pairs(tmp_path)
    header, row = comparison_table(pairs, against="fedsvd").splitlines()[-2:]
    assert header.startswith("against fedsvd") and len(header) == len(row)
    assert row.split()[-4:] == ["+2.5", "+0.4", "to", "+4.6"]
    page = write_comparison(pairs, tmp_path / "paired.html", against="fedsvd").read_text(encoding="utf-8")
    assert ">+2.5<" in page and ">+0.4 to +4.6<" in page and fetched(page) == []
    assert drawings(page)["paired"].count("stroke-width: 4") == 1 + 1  # the interval, and the legend's example
    assert "paired" not in drawings(write_comparison(pairs, tmp_path / "plain.html").read_text(encoding="utf-8"))
    alone = [pairs[0], pairs[5]]
    assert comparison_table(alone, against="fedsvd").splitlines()[-1].split()[-2:] == ["+1.0", "none"]
    single = write_comparison(alone, tmp_path / "single.html", against="fedsvd").read_text(encoding="utf-8")
    assert drawings(single)["paired"].count("stroke-width: 4") == 1 and "Of one pair there is no bar." in single
