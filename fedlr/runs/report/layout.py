"""The look of a page: style sheet, tables, pictures. Every value that comes from a file is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape

from fedlr.runs.report.picture import Picture
from fedlr.runs.report.svg import COLOURS


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole HTML document: no script, nothing fetched."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="fedlr">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, parts: Iterable[str]) -> str:
    """Return a titled section; the parts are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, *, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def details(summary: str, parts: Iterable[str]) -> str:
    """Return a block that opens on a click; the parts are HTML."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"


def code(text: str) -> str:
    """Return preformatted text."""
    return f"<pre><code>{escape(text)}</code></pre>"


def bullets(items: Iterable[str]) -> str:
    """Return a list of plain texts."""
    return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1, strong_row: int = -1) -> str:
    """Return a table of plain texts; columns after the first `text_columns` are numbers, on the right."""
    head = "".join(f'<th scope="col"{_side(i, text_columns)}>{escape(cell)}</th>' for i, cell in enumerate(header))
    body = []
    for number, row in enumerate(rows):
        cells = (f"<td{_side(i, text_columns)}>{escape(cell)}</td>" for i, cell in enumerate(row))
        kind = ' class="strong"' if number == strong_row else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    joined = "\n".join(body)
    filled = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{joined}\n</tbody>"
    return f'<div class="scroll"><table>\n{filled}\n</table></div>'


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Return the headline card: (name, large value, small remark) a tile."""
    cells = (
        f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="remark">{escape(remark)}</dd></div>'
        for name, value, remark in values
    )
    return '<dl class="tiles">\n' + "\n".join(cells) + "\n</dl>"


def gallery(pictures: Sequence[Picture]) -> str:
    """Return pictures with their captions, two in a row unless wide; those that are absent come last."""
    drawn = [picture for picture in pictures if picture.svg]
    halves = [picture for picture in drawn if not picture.is_wide]
    single = halves[-1] if len(halves) % 2 else None
    figures = [_figure(one, "single" if one is single else "wide" if one.is_wide else "half") for one in drawn]
    figures += [_figure(one, "wide") for one in pictures if not one.svg]
    return '<div class="gallery">\n' + "\n".join(figures) + "\n</div>"


def _figure(picture: Picture, kind: str) -> str:
    return (
        f'<figure id="{picture.name}" class="{kind}">\n<h3>{escape(picture.title)}</h3>\n'
        f"{picture.svg or ''}\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _side(index: int, text_columns: int) -> str:
    return "" if index < text_columns else ' class="number"'


def _variables(index: int) -> str:
    return " ".join(f"--{name}: {pair[index]};" for name, pair in COLOURS.items())


_STYLE = (
    f":root {{ color-scheme: light dark; {_variables(0)} --sheet: #f4f6f8; }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(1)} --sheet: #101317; }} }}\n"
    + """* { box-sizing: border-box; }
body { margin: 0; background: var(--sheet); color: var(--ink); font: 16px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
header { margin-bottom: 20px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 10px; }
h3 { font-size: 15px; margin: 0 0 6px; }
p, ul { margin: 0 0 12px; max-width: 84ch; overflow-wrap: anywhere; }
ul { padding-left: 22px; }
.lead { font-size: 17px; }
.muted, figcaption, .remark, dt { color: var(--muted); }
.warning { border-left: 4px solid var(--vermillion); padding: 8px 14px; background: var(--paper); }
.verdict { border-left: 4px solid var(--green); padding: 8px 14px; background: var(--paper); }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1px; margin: 0;
  background: var(--grid); border: 1px solid var(--grid); border-radius: 8px; overflow: hidden; }
.tiles div { background: var(--paper); padding: 14px 16px; }
.tiles dt { font-size: 13px; }
.tiles dd { margin: 0; font-size: 24px; font-weight: 600; line-height: 1.3; overflow-wrap: anywhere; }
.tiles .remark { font-size: 13px; font-weight: 400; line-height: 1.4; }
.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; background: var(--paper); min-width: 50%; font-size: 15px; }
th, td { padding: 6px 12px; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top; }
td { overflow-wrap: break-word; min-width: 7.5em; }
th { font-weight: 600; font-size: 13px; color: var(--muted); vertical-align: bottom; }
.number { text-align: right; }
td.number { white-space: nowrap; min-width: 0; }
.strong td { font-weight: 600; }
.gallery { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 16px 18px; background: var(--paper); border: 1px solid var(--grid);
  border-radius: 8px; display: flex; flex-direction: column; break-inside: avoid; }
.sheet { display: grid; grid-template-columns: repeat(10, minmax(0, 1fr)); gap: 8px; margin: 0 0 16px; }
.sheet figure { padding: 4px; border-width: 3px; border-radius: 6px; }
.sheet .right { border-color: var(--green); }
.sheet .wrong { border-color: var(--vermillion); }
.sheet img { display: block; width: 100%; height: auto; border-radius: 2px; background: #fff; }
.sheet figcaption { font-size: 11.5px; line-height: 1.3; margin-top: 4px; overflow-wrap: anywhere; }
figure.wide, figure.single { grid-column: 1 / -1; }
figure.single svg { max-width: 680px; }
figcaption { font-size: 13.5px; line-height: 1.45; margin-top: 8px; max-width: 95ch; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
details { margin: 0 0 12px; }
summary { cursor: pointer; padding: 4px 0; }
pre { background: var(--paper); border: 1px solid var(--grid); border-radius: 6px; padding: 12px 14px;
  margin: 0 0 12px; overflow-x: auto; font: 13px/1.5 ui-monospace, Consolas, "Liberation Mono", monospace; }
@media (max-width: 760px) { .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .gallery { grid-template-columns: minmax(0, 1fr); }
  .sheet { grid-template-columns: repeat(5, minmax(0, 1fr)); }
  main { padding: 20px 12px 40px; } }
@media print { body { background: none; font-size: 12px; } main { max-width: none; padding: 0; }
  h2 { break-after: avoid; } pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
"""
)
