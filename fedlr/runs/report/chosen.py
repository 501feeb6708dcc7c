"""Whether the settings of a run were chosen beforehand, and on which rows; and whether its scores are for choosing."""

from fedlr.runs.plain_yaml import plain_yaml
from fedlr.runs.report.run_files import Run

ON_VALIDATION = (
    "All scores of this run are of validation rows, on which settings are chosen: report none of them, but those of "
    "test rows (tracking.evaluate_on=test)."
)


def how_chosen(run: Run) -> list[str]:
    """Return one sentence for each of the two that holds, from the run's configuration."""
    try:
        config = plain_yaml(run.config)
    except ValueError:
        return []
    section = config.get("tracking") if isinstance(config, dict) else None
    tracking = section if isinstance(section, dict) else {}
    found = [ON_VALIDATION] if tracking.get("evaluate_on") == "validation" else []
    if isinstance(tuned := tracking.get("tuned"), str):
        found.append(f"Tuned: {tuned}.")
    return found
