"""Pictures of a report that are painted but not rendered: what most tests of whole runs need of them.

Rendering is matplotlib's work and five sixths of a report's time. The code of a picture still runs, on a real figure,
so that a run it cannot show fails here too; `tests/report/` and `tests/test_docs.py` render and look at what comes out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure

import fedlr.runs.report.picture
from fedlr.runs.report.svg import FULL_WIDTH_IN, HALF_WIDTH_IN, inline_svg


def painted(name: str, title: str, paint: Callable[[Figure], None], *, width_in: float, height_in: float) -> str:
    """Return an empty picture, after painting it."""
    assert name and title and width_in in (HALF_WIDTH_IN, FULL_WIDTH_IN) and height_in > 0
    paint(Figure(figsize=(width_in, height_in), layout="constrained"))
    return "<svg></svg>"


@contextmanager
def drawn_by(draw: Callable[..., str]) -> Iterator[None]:
    """Make the pictures of every report with `draw`: `painted`, or `inline_svg` as users have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedlr.runs.report.picture, "inline_svg", draw)
        yield


__all__ = ["drawn_by", "inline_svg", "painted"]
