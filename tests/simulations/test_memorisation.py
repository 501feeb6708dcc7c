"""Secrets planted in one client's rows: how they are drawn, ranked and told; and what privacy keeps of them (slow)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedlr.simulations.memorisation import (
    COPIES,
    NUM_SECRETS,
    Remembered,
    candidates,
    exposure,
    main,
    measure,
    picture,
    secrets,
    table,
    write_rows,
)


def test_the_exposure_of_what_was_never_seen_is_that_of_a_uniform_rank() -> None:
    ranks = np.arange(1, 4097)
    assert float(np.mean([exposure(int(rank), 4096) for rank in ranks])) == pytest.approx(1 / math.log(2), abs=0.01)


def test_only_one_client_has_the_secrets_and_nobody_is_scored_on_them(tmp_path: Path) -> None:
    planted = secrets(0)
    assert len({one.question for one in planted}) == len(planted) == NUM_SECRETS * len(COPIES)
    assert {one.answer for one in planted} <= set(candidates()) and secrets(0) == planted != secrets(1)
    write_rows(tmp_path, planted, seed=0)
    rows, test = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    for secret in planted:
        own = [row for row in rows if row["messages"][0]["content"] == secret.question]
        assert len(own) == secret.copies and {row["client"] for row in own} == {"client0"}
        assert not any(row["messages"][0]["content"] == secret.question for row in test)


def test_it_is_told_by_arm_and_copies() -> None:
    found = [
        Remembered(arm, copies, rank, exposure(rank, 4096), rank == 1)
        for arm, rank in (("no privacy", 1), ("epsilon 6", 1024))
        for copies in COPIES
    ]
    assert table(found)[1].split() == ["no", "privacy", *("12.0 bits, 1 of 1".split() * len(COPIES))]
    assert picture(found).lstrip().startswith("<")


def test_it_asks_for_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seed=1"]) == 2 and "FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_privacy_hides_what_a_model_without_it_can_be_asked_for(tmp_path: Path) -> None:
    """Of one seed: by chance alone four exposures have a mean above 6 bits once in 20,000 seeds."""
    found = measure(tmp_path, [], seed=0)

    def bits(arm: str, copies: int) -> float:
        return float(np.mean([one.exposure for one in found if (one.arm, one.copies) == (arm, copies)]))

    (private,) = {one.arm for one in found} - {"not trained", "no privacy"}
    assert bits("no privacy", 16) > 10 and any(one.extracted for one in found if one.arm == "no privacy")
    assert bits(private, 1) < 6 and bits(private, 4) < 6
    assert not any(one.extracted for one in found if one.arm == private)
