"""Draw the pictures that README.md shows, from a finished run: `python docs/make_pictures.py outputs/demo/TIME`.

The picture is the report's own (`fedlr.report`). In the page its colours come from the style sheet; an SVG that stands
alone has none, so it gets the same two palettes, a background, and a size.
"""

import sys
from pathlib import Path

from fedlr.errors import InputError
from fedlr.report.learning_pictures import accuracy_by_round
from fedlr.report.run_files import read_run
from fedlr.report.svg import COLOURS

DEMO = Path(__file__).parent / "demo.svg"


def main(arguments: list[str]) -> int:
    """Draw the demo's picture; return the exit code."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python docs/make_pictures.py RUN_DIR [FILE.svg]", file=sys.stderr)
        return 2
    run_dir, path = Path(arguments[0]), Path(arguments[1]) if arguments[1:] else DEMO
    try:
        svg = accuracy_by_round(read_run(run_dir)).svg
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert svg is not None  # this picture is always drawn
    path.write_text(standing_alone(svg), encoding="utf-8")
    print(path)
    return 0


def standing_alone(svg: str) -> str:
    """Return a report's inline SVG as a file: with its palettes, light and dark, and a background."""
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    style = (
        f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }} "
        "svg * { stroke-linejoin: round; stroke-linecap: butt; } "
        "svg text { font-family: system-ui, sans-serif !important; }</style>"
        f'<rect width="100%" height="100%" rx="6" style="fill: var(--paper, {COLOURS["paper"][0]})"/>'
    )
    opening, body = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening} width="680">\n{style}{body}\n'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
