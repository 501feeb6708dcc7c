"""What runs look like: `report.html` of one, `comparison.html` of several, from run directories alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlr.runs.report.comparison import comparison_table, write_comparison
    from fedlr.runs.report.page import write_report
    from fedlr.runs.report.paper_files import PaperFiles

__all__ = ["PaperFiles", "comparison_table", "write_comparison", "write_report"]
_PLACES = {
    "PaperFiles": "paper_files",
    "comparison_table": "comparison",
    "write_comparison": "comparison",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    """Return a function of the pages when it is asked for: whoever words a number needs no library of pictures."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
