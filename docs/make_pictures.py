"""Draw the pictures that README.md shows, from a finished run: `python docs/make_pictures.py outputs/demo/TIME`.

The picture is the report's own (`fedlr.runs.report`). Those of docs/performance.md come from `fedlr bench docs`.
"""

import sys
from pathlib import Path

from fedlr.errors import InputError
from fedlr.runs.report.learning_pictures import accuracy_by_round
from fedlr.runs.report.run_files import read_run
from fedlr.runs.report.svg import standing_alone

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
