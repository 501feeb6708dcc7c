"""A picture of a report: an SVG and how to read it, in a sentence, or why there is none."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedlr.runs.report.svg import FULL_WIDTH_IN, HALF_WIDTH_IN, bar_limits, inline_svg

MOST_CLIENTS = 200  # beyond which pictures and tables show how clients are spread, and not each of them


@dataclass(frozen=True)
class Picture:
    """`svg` is None when there is nothing to draw; `caption` then says why. Text is not escaped yet."""

    name: str
    title: str
    caption: str
    svg: str | None = None
    is_wide: bool = False


def drawn(
    name: str,
    title: str,
    caption: str,
    paint: Callable[[Figure], None],
    *,
    is_wide: bool = False,
    height_in: float = 3.1,
) -> Picture:
    """Return a picture made by `paint`."""
    width_in = FULL_WIDTH_IN if is_wide else HALF_WIDTH_IN
    svg = inline_svg(name, title, paint, width_in=width_in, height_in=height_in)
    return Picture(name, title, caption, svg, is_wide)


def clipped(label: str) -> str:
    """Shorten a label for a legend or an axis; a leading underscore would hide it there."""
    text = label if len(label) <= 22 else label[:21] + "…"
    return "\u200b" + text if text.startswith("_") or not text else text


def client_axis(axes: Axes, client_ids: list[int]) -> None:
    """Label one position a client, with every id when there is room."""
    every = -(-len(client_ids) // 20)
    bar_limits(axes, 0, len(client_ids) - 1)
    axes.set_xticks(range(0, len(client_ids), every), [str(one) for one in client_ids[::every]])
    axes.set_xlabel("Client")
