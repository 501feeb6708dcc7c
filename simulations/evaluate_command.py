"""`fedlr evaluate`: what a released adapter scores on public rows, as text, as a file and in the run's report."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlr.config.offline import go_offline
from fedlr.errors import InputError
from fedlr.errors.messages import shown
from fedlr.runs.commands import option
from fedlr.simulations.cli import command, existing_run, flag, only_one, options, say

if TYPE_CHECKING:
    from fedlr.runs.evaluations import EvaluationEntry

MOST_TOKENS, MOST_SHOWN = 4096, 100
SHOWN = 70  # characters of a sample


@command
def evaluate(arguments: list[str]) -> None:
    """Score the adapter of a finished run on public rows: fedlr evaluate RUN_DIR --on TABLE [data.KEY=VALUE ...]

    TABLE is a file, a folder or a data set, read as the run's own rows were (data.KEY=VALUE changes how), or held-out:
    the rows that the run held out. Whoever names a table says that it is public: no score is noised and the privacy
    statement does not cover it, so rows that clients train on are refused.
    Of classes, numbers and pictures it tells the scores of the run's task. Of a language model, beside its base model:
    perplexity of answers, by group where rows have one; next tokens that are right;
    --generate TOKENS: exact match and ROUGE-L of greedy answers, needs fedlr[eval]; --show N keeps N of them as text;
    --hellaswag FILE, --mmlu FILE: multiple choice by likelihood, as it is and by length;
    --harness TASK,TASK: tasks of EleutherAI's lm-eval, needs fedlr[harness]; --harness-tasks FOLDER has your own, whose
    code runs; --online lets it fetch.
    Scores are added to RUN_DIR/evaluation.json and to the report. --own-part PATH as in `fedlr resume`.
    """
    own_parts = options(arguments, "--own-part", "the name of a function of your own")
    on = option(arguments, "--on", "a table, or held-out")
    questions = {name: option(arguments, f"--{name}", "a file of questions") for name in ("hellaswag", "mmlu")}
    generate = number(option(arguments, "--generate", "a number of tokens"), "--generate", MOST_TOKENS)
    show = number(option(arguments, "--show", "a number of answers"), "--show", MOST_SHOWN)
    tasks = option(arguments, "--harness", "names of tasks")
    folder = option(arguments, "--harness-tasks", "a folder")
    online = flag(arguments, "--online")
    changes = data_changes([word for word in arguments if "=" in word])
    run_dir = existing_run(only_one([word for word in arguments if "=" not in word]))
    from fedlr.runs.directory import sole_writer

    go_offline(not online)
    from fedlr.runs.evaluations import add_evaluations
    from fedlr.runs.report import write_report
    from fedlr.simulations.evaluate import Asked, evaluate_run

    asked = Asked(
        on=on,
        changes=changes,
        questions={name: path for name, path in questions.items() if path is not None},  # type: ignore[misc]
        generate=generate,
        show=show or 0,
        harness=tuple(name for name in (tasks or "").split(",") if name),
        harness_tasks=folder,
    )
    with sole_writer(run_dir):
        found, adapter_sha256 = evaluate_run(run_dir, asked, own_parts=own_parts, say=say)
        say("\n" + "\n".join(lines_of(found)))
        path = add_evaluations(run_dir, found, adapter_sha256=adapter_sha256)
        write_report(run_dir)
    say(f"\nscores in {path}, and in {run_dir / 'report.html'}")


def number(typed: str | None, name: str, most: int) -> int | None:
    """Return a number that was typed, None where none was.

    >>> number("48", "--generate", 4096)
    48
    """
    if typed is None:
        return None
    if not (typed.isascii() and typed.isdigit() and 1 <= int(typed[:9]) <= most):
        raise InputError(f"Expected {name} to be a number from 1 to {most}, got {shown(typed)}")
    return int(typed)


def data_changes(words: Sequence[str]) -> dict[str, Any]:
    """Return what `data.KEY=VALUE` words say.

    >>> data_changes(["data.format=alpaca", "data.labels=[good,bad]"])
    {'format': 'alpaca', 'labels': ['good', 'bad']}
    """
    from fedlr.config.schema import parse_overrides

    changes = {}
    for override in parse_overrides(words):
        section, _, key = override.key_or_group.partition(".")
        if section != "data" or not key or key in ("path", "_target_"):
            raise InputError(f"Expected data.KEY=VALUE, how the table is read, got {override.input_line}")
        changes[key] = override.value()
    return changes


def lines_of(found: Sequence["EvaluationEntry"]) -> list[str]:
    """Return the scores as a table for a terminal, and below it what was answered."""
    rows = [("", "base", "released")]
    for entry in found:
        rows.append((f"{entry.kind}: {entry.num_rows:,} of {entry.of}", "", ""))
        base = entry.base or {}
        rows += [(f"  {name}", figure(base.get(name)), figure(value)) for name, value in entry.released.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    told = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]
    for entry in found:
        for sample in entry.samples:
            told += ["", *(f"{name:>8}: {text_of(value)}" for name, value in vars(sample).items())]
    return told


def figure(value: float | None) -> str:
    """Write a score; nothing where there is none.

    >>> figure(62.41234), figure(None)
    ('62.41', '')
    """
    return "" if value is None else f"{value:.4g}"


def text_of(text: str) -> str:
    """Return the beginning of a text on one line, without signs that a terminal would obey."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}..."
