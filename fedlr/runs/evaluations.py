"""evaluation.json: what the released adapter of a run scored on public tables, afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.runs.directory import read_json, write_json

EVALUATION = "evaluation.json"
COVERED = "Tables that the user named as public; no score is noised, and the privacy statement does not cover them."


@dataclass(frozen=True)
class Sample:
    """A public prompt and its answers: the one that was given, and those of both models."""

    prompt: str
    wanted: str
    base: str
    released: str


@dataclass(frozen=True)
class EvaluationEntry:
    """The scores of one table.

    Args:
        kind: `rows`, by the run's task; `answers`, what the model generates; `hellaswag` or `mmlu`; or `harness NAME`.
        of: what the table is called.
        sha256: of its files; None where it is no file.
        num_rows: of them.
        released: by name, the scores of the base model with the adapter.
        base: those of the base model alone; None where it has none of its own.
        samples: prompts and answers, as text.
    """

    kind: str
    of: str
    sha256: str | None
    num_rows: int
    released: Mapping[str, float]
    base: Mapping[str, float] | None = None
    samples: Sequence[Sample] = ()


def add_evaluations(run_dir: Path, entries: Sequence[EvaluationEntry], *, adapter_sha256: str) -> Path:
    """Write the scores beside those of other tables, in place of those of the same one; whole or not at all.

    Raises:
        InputError: evaluation.json is there and broken.
    """
    path = run_dir / EVALUATION
    before: Any = read_json(path).get("evaluations") if path.exists() else []
    if not isinstance(before, list) or not all(isinstance(one, dict) for one in before):
        raise InputError(f"Expected a list of evaluations in {path}, got something else; move the file away")
    new = [{**asdict(one), "adapter_sha256": adapter_sha256} for one in entries]
    replaced = {(one["kind"], one["of"]) for one in new}
    kept = [one for one in before if (one.get("kind"), one.get("of")) not in replaced]
    write_json(path, {"covered": COVERED, "evaluations": [*kept, *new]})
    return path
