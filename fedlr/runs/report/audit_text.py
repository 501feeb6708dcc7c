"""What a report says of audit.json: what an audit of the run's configuration measured, beside what is accounted."""

from dataclasses import dataclass

from fedlr.runs.report.layout import details, paragraph, table
from fedlr.runs.report.records import Record


@dataclass(frozen=True)
class AuditResult:
    """One audit, as `fedlr audit RUN_DIR` left it."""

    holds: bool
    conclusion: str
    rows: tuple[tuple[str, str, str, str], ...]  # what, measured, accounted, verdict
    planted: tuple[tuple[str, str], ...]  # a fault, and the checks that found it


def read_audit(row: Record) -> AuditResult:
    """Return what audit.json says."""
    rows = [_row(one, "measured", "accounted") for one in row.records("findings")]
    rows += [_row(one, "epsilon_lower_bound", "epsilon") for one in row.records("one_run")]
    planted = [
        (one.text("fault"), ", ".join(map(str, one.items("found_by"))) or "not found") for one in row.records("planted")
    ]
    return AuditResult(row.get("holds") is True, row.text("conclusion"), tuple(rows), tuple(planted))


def audit_parts(audit: AuditResult | None) -> list[str]:
    """Return the HTML of an audit; nothing where there was none."""
    if audit is None:
        return []
    kind = "" if audit.holds else "warning"
    parts = [table(["Measured", "Value", "Accounted", "Verdict"], audit.rows, text_columns=1)]
    if audit.planted:
        parts.append(table(["Fault that was planted", "Found by"], audit.planted, text_columns=2))
    return [
        "<h3>Measured by an audit</h3>",
        paragraph(f"{audit.conclusion[:1].upper()}{audit.conclusion[1:]}.", kind=kind),
        details("What was measured, and what is accounted", parts),
    ]


def _row(one: Record, measured: str, accounted: str) -> tuple[str, str, str, str]:
    verdict = "holds" if one.get("holds") is True else "fails"
    return one.text("what"), _figure(one, measured), _figure(one, accounted), verdict


def _figure(one: Record, key: str) -> str:
    return "inf" if one.get(key) == "inf" else f"{one.number(key):.4g}"
