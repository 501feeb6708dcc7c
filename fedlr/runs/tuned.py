"""`tuned.yaml`: which settings `fedlr tune` chose for each arm, and on what; `fedlr simulate --tuned` takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fedlr.errors import InputError
from fedlr.errors.messages import first_problem
from fedlr.files import create_whole
from fedlr.runs.plain_yaml import plain_yaml


@dataclass(frozen=True)
class TunedArm:
    """What was chosen for one arm.

    Args:
        arm: the words of the command that make the arm, such as method=fedsvd.
        chosen: the words that were chosen for it, and the numbers that were found for it where they were auto.
        score: of the chosen ones, the mean over the seeds.
        scores: by the words of each point of the grid.
    """

    arm: tuple[str, ...]
    chosen: tuple[str, ...]
    score: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Tuned:
    """What was tuned, on what, and what came of it.

    Args:
        command: as it was typed.
        rows: that it was chosen on, as a sentence.
        beside: words without which the chosen ones were chosen on rows that are now trained on or tested.
        metric: by which the best was chosen, a mean over `seeds`.
        seeds: of the runs.
        num_points: of the grid: as many for every arm.
        arms: one for each combination of the other swept keys.
    """

    command: str
    rows: str
    beside: tuple[str, ...]
    metric: str
    seeds: tuple[str, ...]
    num_points: int
    arms: tuple[TunedArm, ...]

    def words_of(self, overrides: Sequence[str]) -> list[str]:
        """Return the words to add to a run: what was chosen for its arm, and that it was.

        Raises:
            InputError: the run is none of the arms, or sets what was chosen to something else.
        """
        found = [arm for arm in self.arms if set(arm.arm) <= set(overrides)]
        if not found:
            known = "; ".join(" ".join(arm.arm) for arm in self.arms)
            raise InputError(
                f"Expected a run that was tuned, with the words of an arm ({known}), got {' '.join(overrides)}: tune "
                "it too, or leave it out"
            )
        typed = {word.partition("=")[0].lstrip("+"): word for word in overrides}
        words = [*self.beside, *found[0].chosen]
        for word in words:
            key = word.partition("=")[0]
            if key in typed and typed[key] not in (word, f"{key}=auto"):
                raise InputError(f"Expected {word} as it was tuned, got {typed[key]}: leave it out, or tune again")
        return [*(word for word in words if word not in overrides), f'tracking.tuned="{self.sentence(found[0])}"']

    def sentence(self, arm: TunedArm) -> str:
        """Return what a report says of the choice; without quotation marks, as it becomes a word of a command."""
        settings = ", ".join(arm.chosen).replace('"', "").replace("\\", "")
        return (
            f"{settings} was the best of {self.num_points} by {self.metric} on {self.rows} "
            f"(mean of seeds {', '.join(self.seeds)}); every arm had as many"
        )


def write_tuned(tuned: Tuned, path: Path) -> None:
    """Write a file that must not exist."""
    plain = yaml.safe_dump(_plain(asdict(tuned)), sort_keys=False, width=120)
    create_whole(path, f"# fedlr simulate --tuned {path.name} ...\n{plain}")


class _Arm(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    arm: list[str]
    chosen: list[str]
    score: float
    scores: dict[str, float]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    command: str
    rows: str
    beside: list[str]
    metric: str
    seeds: list[str]
    num_points: int
    arms: list[_Arm]


def read_tuned(path: Path) -> Tuned:
    """Read what `write_tuned` wrote.

    Raises:
        InputError: it is missing or something else.
    """
    try:
        tree = plain_yaml(path.read_text(encoding="utf-8"))
        found = _File.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"Expected a file of `fedlr tune` in {path}: {first_problem(error, tree)}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"Expected a file of `fedlr tune`, got {path}: {error}") from error
    arms = [TunedArm(tuple(one.arm), tuple(one.chosen), one.score, one.scores) for one in found.arms]
    return Tuned(
        found.command,
        found.rows,
        tuple(found.beside),
        found.metric,
        tuple(found.seeds),
        found.num_points,
        tuple(arms),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
