"""What was found before shortens a search for noise, and cannot shorten the noise.

Mutant: a hint that is returned as it is, which a file of anybody's can make too small.
"""

from pathlib import Path
from types import ModuleType

import pytest

from fedlr.privacy import accountant, noise_hints
from fedlr.privacy.mechanism import PrivacyBudget
from tests.training.small_models import mutant

BUDGET = PrivacyBudget(6.0, 1e-5)
QUESTION = (BUDGET, 0.2, 6, "rdp")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLR_CACHE", str(tmp_path))


def found(module: ModuleType = accountant) -> float:
    module.calibrate_noise_multiplier.cache_clear()
    module._epsilon.cache_clear()
    return float(module.calibrate_noise_multiplier(BUDGET, sample_rate=0.2, num_steps=6, accountant="rdp"))


def file_of(folder: Path) -> Path:
    (path,) = (folder / "noise").iterdir()
    return path


def test_a_second_search_is_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found()
    monkeypatch.setattr(accountant, "_search", lambda *_, **__: pytest.fail("searched again"))
    assert found() == first and file_of(tmp_path).is_file()


@pytest.mark.parametrize("content", ["", "12", "nonsense here", "1 0000", "\xff", "9" * 5000])
def test_a_damaged_file_is_no_hint(content: str, tmp_path: Path) -> None:
    first = found()
    file_of(tmp_path).write_text(content, encoding="latin-1")
    assert noise_hints.hint_of(QUESTION) is None and found() == first


def check_a_forged_hint_takes_no_noise_away(module: ModuleType) -> None:
    first = found(module)
    noise_hints.keep_hint(QUESTION, round(first * 1000) - 100)
    assert found(module) == first


def test_a_forged_hint_takes_no_noise_away() -> None:
    check_a_forged_hint_takes_no_noise_away(accountant)


def test_a_hint_that_is_believed_is_caught() -> None:
    believing = mutant(accountant, (" and spent(kept) <= budget.epsilon", ""))
    with pytest.raises(AssertionError):
        check_a_forged_hint_takes_no_noise_away(believing)


def test_a_hint_from_far_away_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    first = found()
    noise_hints.keep_hint(QUESTION, 1)  # whose loss distribution would take gigabytes
    looked = []
    epsilon = accountant.epsilon
    monkeypatch.setattr(accountant, "epsilon", lambda *a, **k: looked.append(k["accountant"]) or epsilon(*a, **k))
    assert found() == first and looked


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found()
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FEDLR_CACHE", str(blocked))
    assert found() == first
