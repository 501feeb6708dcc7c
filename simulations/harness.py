"""EleutherAI's lm-eval on a released adapter, where it is installed: `pip install 'fedlr[harness]'`."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlr.errors import InputError
from fedlr.errors.messages import first_line

PACKAGE = "lm_eval"
BATCH_SIZE = 8


def check_harness() -> None:
    """Refuse to go on without the package.

    Raises:
        InputError: which says what to install.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(
            "Expected EleutherAI's lm-eval for --harness, got none; install it with: pip install 'fedlr[harness]'"
        )


def harness_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, folder: str | None
) -> dict[str, tuple[int, Mapping[str, float]]]:
    """Return for each task how many rows it has and its numbers, by the names that the harness gives them.

    Args:
        model: a causal language model, adapted or not; it is asked as it is, without a chat template.
        tokenizer: its own.
        tasks: names of the harness, or of YAML files in `folder`.
        folder: with tasks of the user's own; None: none. A YAML of the harness may name Python files beside it.

    Raises:
        InputError: no such task, or its data cannot be had.
    """
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"Expected --harness-tasks to be a folder of YAML files, got {folder!r}")
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        where = "" if folder is None else f" or in {folder}"
        raise InputError(f"Expected --harness to name tasks of lm-eval{where}, got {unknown[0]!r}")
    device = str(next(model.parameters()).device)
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, device=device)
    try:
        found = simple_evaluate(
            model=asked, tasks=list(tasks), task_manager=manager, log_samples=False, bootstrap_iters=0
        )
    except Exception as error:  # of datasets, of a task's own code, of the hub
        raise InputError(
            f"Expected lm-eval to score {', '.join(tasks)}, got: {first_line(error):.300}. Data on the hub need "
            "--online once"
        ) from error
    return {name: (_num_rows(found, name), _numbers(row)) for name, row in found["results"].items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what is a number: `acc,none` is told as `acc`."""
    numbers = {
        key.removesuffix(",none"): value
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "sample_len"
    }
    return {key: float(value) for key, value in numbers.items()}


def _num_rows(found: Mapping[str, Any], name: str) -> int:
    sizes = found.get("n-samples", {}).get(name, {})
    return int(sizes.get("effective", 0)) if isinstance(sizes, Mapping) else 0
