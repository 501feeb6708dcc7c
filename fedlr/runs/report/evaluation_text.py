"""What a report says of evaluation.json: scores on tables that were named as public after the run."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlr.runs.report.layout import details, paragraph, table
from fedlr.runs.report.records import Record

MOST_SAMPLES = 20  # of a table


@dataclass(frozen=True)
class Evaluated:
    """One table, as `fedlr evaluate RUN_DIR` left it."""

    kind: str
    of: str
    num_rows: int
    adapter_sha256: str
    scores: tuple[tuple[str, str, str], ...]  # name, base, released
    samples: tuple[tuple[str, str, str, str], ...]  # prompt, wanted, base, released


def read_evaluations(row: Record) -> tuple[Evaluated, ...]:
    """Return what evaluation.json says."""
    return tuple(_evaluated(one) for one in row.records("evaluations"))


def evaluation_parts(found: Sequence[Evaluated], *, adapter_sha256: str) -> list[str]:
    """Return the HTML of evaluations; nothing where there was none.

    Args:
        found: of any table.
        adapter_sha256: of the run's adapter, as its summary says; others' scores are named as such.
    """
    if not found:
        return []
    parts = [
        "<h3>Scored afterwards</h3>",
        paragraph(
            "On tables that were named as public by fedlr evaluate: no score is noised, and the privacy statement does "
            "not cover these rows."
        ),
    ]
    for one in found:
        parts.append(paragraph(f"{one.kind}: {one.num_rows:,} of {one.of}"))
        if one.adapter_sha256 != adapter_sha256:
            parts.append(paragraph("This was another adapter than the one of this run.", kind="warning"))
        parts.append(table(["Score", "Base model", "Released"], one.scores, text_columns=1))
        if one.samples:
            header = ["Prompt", "Answer that was given", "Base model", "Released"]
            shown = table(header, one.samples[:MOST_SAMPLES], text_columns=4)
            parts.append(details("What the models answer, the likeliest token each time", [shown]))
    return parts


def _evaluated(one: Record) -> Evaluated:
    released, base = (one.numbers(key, may_diverge=True) for key in ("released", "base"))
    order = list(one.nested("released").values)
    scores = [(name, f"{base[name]:.4g}" if name in base else "", f"{released[name]:.4g}") for name in order]
    samples = [
        (row.text("prompt"), row.text("wanted"), row.text("base"), row.text("released"))
        for row in one.records("samples")
    ]
    return Evaluated(
        one.text("kind"),
        one.text("of"),
        one.count("num_rows"),
        one.text("adapter_sha256"),
        tuple(scores),
        tuple(samples),
    )
