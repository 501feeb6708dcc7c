"""What runs look like: `report.html` of one, `comparison.html` of several, from run directories alone.

The library of pictures takes half a second to load: it is loaded by whoever draws.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlr.runs.report.comparison import comparison_table, write_comparison
    from fedlr.runs.report.paper_files import PaperFiles

__all__ = ["PaperFiles", "comparison_table", "write_comparison", "write_report"]
_LATER = {"PaperFiles": "paper_files", "comparison_table": "comparison", "write_comparison": "comparison"}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run (`fedlr.runs.report.page`)."""
    from fedlr.runs.report.page import write_report as write

    return write(run_dir)


def __getattr__(name: str) -> Any:
    """Return what is loaded when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
