"""What runs look like: `report.html` of one, `comparison.html` of several, from run directories alone."""

from fedlr.runs.report.comparison import comparison_table, write_comparison
from fedlr.runs.report.page import write_report
from fedlr.runs.report.paper_files import PaperFiles

__all__ = ["PaperFiles", "comparison_table", "write_comparison", "write_report"]
