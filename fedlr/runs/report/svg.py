"""A picture as inline SVG: same input, same bytes; text stays text; colours follow the page, light or dark.

Surprises: ids of several inline SVGs share one page, so each picture prefixes its own; matplotlib's `<style>`
would style the whole page, so it is dropped (the page has the two rules); `$` in a label would start
mathematics, so `text.parse_math` is off.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Sized
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fedlr.runs.report.wording import power_of_ten
from fedlr.tasks.evaluation import Metric

# name: (light, dark). Okabe and Ito (2008), lightened or darkened where the paper asks for it.
COLOURS = {
    "ink": ("#1b1f24", "#e6e9ed"),
    "muted": ("#59626d", "#a3acb8"),
    "grid": ("#dfe3e8", "#343b44"),
    "paper": ("#fffffe", "#181c21"),
    "blue": ("#0072b2", "#4aa8e0"),
    "orange": ("#e69f00", "#f0b429"),
    "green": ("#009e73", "#2cc295"),
    "vermillion": ("#d55e00", "#f0803c"),
    "sky": ("#56b4e9", "#8accf2"),
    "purple": ("#cc79a7", "#df9cc2"),
    "yellow": ("#d6c71a", "#f0e442"),
    "grey": ("#8a939e", "#8a939e"),
}
SERIES = ("blue", "orange", "green", "vermillion", "sky", "purple", "yellow", "grey")
HALF_WIDTH_IN, FULL_WIDTH_IN = 5.4, 11.0
MOST_MARKED = 45  # beyond this many points a line needs no markers and bars run into each other

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["grey"][0],
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLOURS["ink"][0],
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; wider than most, so that nothing gets clipped
    "font.size": 9,
    "grid.color": COLOURS["grid"][0],
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": COLOURS["ink"][0],
    "text.parse_math": False,
    "xtick.color": COLOURS["grey"][0],
    "xtick.labelcolor": COLOURS["muted"][0],
    "xtick.labelsize": 8.5,
    "ytick.color": COLOURS["grey"][0],
    "ytick.labelcolor": COLOURS["muted"][0],
    "ytick.labelsize": 8.5,
    "ytick.left": False,
}


def colour(name: str) -> str:
    """Return the light form of a named colour; the page turns it into a variable."""
    return COLOURS[name][0]


def inline_svg(
    name: str,
    title: str,
    paint: Callable[[Figure], None],
    *,
    width_in: float = HALF_WIDTH_IN,
    height_in: float = 3.1,
) -> str:
    """Return one `<svg>` element.

    Args:
        name: prefix of every id in it; unique on the page.
        title: what a screen reader says.
        paint: draws on an empty figure.
        width_in, height_in: size in inches; the page scales it to its column.
    """
    text = io.StringIO()
    # Labels are written as text: a glyph that is missing here is drawn by the reader's fonts.
    with matplotlib.rc_context(cast(Any, {**_STYLE, "svg.hashsalt": name})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        paint(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _for_page(text.getvalue(), name, title)


def standing_alone(svg: str) -> str:
    """Return an inline SVG as a file: a page's style sheet brings its colours, alone it needs both palettes, a
    background and a size."""
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    style = (
        f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }} "
        "svg * { stroke-linejoin: round; stroke-linecap: butt; } "
        "svg text { font-family: system-ui, sans-serif !important; }</style>"
        f'<rect width="100%" height="100%" rx="6" style="fill: var(--paper, {COLOURS["paper"][0]})"/>'
    )
    opening, body = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening} width="680">\n{style}{body}\n'


def legend(figure: Figure, axes: Axes, *, columns: int = 3) -> None:
    """Put the legend above the axes, where it can cover no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.0, columnspacing=1.4)


def round_axis(axes: Axes, *, label: str = "Rounds completed") -> None:
    """Label the horizontal axis with whole rounds."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1, steps=[1, 2, 5, 10]))


def bar_limits(axes: Axes, first: int, last: int) -> None:
    """Leave room beside the bars from `first` to `last`, so that a few of them stay narrow; ticks are under bars only.

    Call it after `round_axis`, whose ticks would go on into that room.
    """
    pad = max(0.6, (6 - (last - first)) / 2)
    ticks = MaxNLocator(integer=True, nbins=8, min_n_ticks=1, steps=[1, 2, 5, 10]).tick_values(first, last)
    axes.set_xticks(sorted({first, last} | {int(tick) for tick in ticks if first <= tick <= last}))
    axes.set_xlim(first - pad, last + pad)


def marker(shape: str, points: Sized) -> str:
    """Return the marker of a line, none when there are too many points to tell apart."""
    return shape if len(points) <= MOST_MARKED else ""


def percent_axis(axes: Axes, *, label: str = "Accuracy (%)") -> None:
    """Label the vertical axis of shares in percent."""
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))


def score_axis(axes: Axes, metric: Metric) -> None:
    """Label the vertical axis of scores: shares in percent."""
    name = metric.heading
    if metric.is_share:
        percent_axis(axes, label=f"{name} (%)")
    else:
        axes.set_ylabel(name)


def log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic with plain-text ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def _for_page(document: str, name: str, title: str) -> str:
    """Cut the `<svg>` element out of a document and make it fit to stand beside others in a page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("'DejaVu Sans'", "sans-serif")
    for key, (light, _) in COLOURS.items():
        svg = svg.replace(f": {light}", f": var(--{key}, {light})")
    opening = re.search(r'viewBox="[^"]*"', svg)
    assert opening is not None
    label, box = html.escape(title), opening.group()
    start = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}'
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'{start} role="img" aria-label="{label}">\n<title>{label}</title>{body}'
