"""A flame graph without a dependency: stacks sampled from a thread, and an SVG of them.

The sampler is a second thread that looks at the first one's Python frames every few milliseconds and gives the time
since its last look to what it sees. Inside a tensor operation the watched thread holds no interpreter lock, so the
sampler sees the very call that runs; between operations it has to wait for its turn, for `switch_s` at most. Work that
autograd does in C++ appears as the call that started it.
"""

import html
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedlr.runs.report.svg import COLOURS, standing_alone

Stack = tuple[str, ...]  # "function (file)", outermost first
EVERY_S, SWITCH_S = 0.002, 0.0005
WIDTH, ROW, GAP = 1200, 17, 1
SMALLEST = 0.002  # of the whole: a narrower frame is not drawn
# Frames that only pass a call on.
PASSING = {
    *("_wrapped_call_impl", "_call_impl", "wrapper", "wrapped", "inner", "decorate_context", "apply"),
    *("in_order", "<genexpr>", "submit", "part", "forward_with_checkpointing", "apply_chunking_to_forward"),
}


@contextmanager
def sampled(stacks: Counter[Stack], *, every_s: float = EVERY_S) -> Iterator[None]:
    """Add the seconds of every stack of this thread to `stacks`; stacks begin with what the caller calls."""
    watched, done = threading.get_ident(), threading.Event()
    depth = _depth(sys._getframe(2))

    def watch() -> None:
        last = time.perf_counter()
        while not done.wait(every_s):
            stack = stack_of(sys._current_frames()[watched])[depth:]
            now = time.perf_counter()
            if stack:
                stacks[stack] += now - last  # type: ignore[assignment]  # a Counter may hold seconds
            last = now

    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)


def stack_of(frame: FrameType | None) -> Stack:
    """Return a frame's stack, outermost first."""
    names = []
    while frame is not None:
        names.append(f"{frame.f_code.co_qualname} ({place(frame.f_code.co_filename)})")
        frame = frame.f_back
    return tuple(reversed(names))


def place(filename: str) -> str:
    """Return a file's last two names, which tell it and no machine.

    >>> place("/somewhere/torch/nn/functional.py")
    'nn/functional'
    """
    path = Path(filename)
    return f"{path.parent.name}/{path.stem}"


@dataclass
class Node:
    """One box: a frame below the same frames, with its seconds."""

    seconds: float = 0.0
    below: dict[str, "Node"] = field(default_factory=dict)


def tree(stacks: Mapping[Stack, float]) -> Node:
    """Return the stacks as one tree, without frames that only pass a call on."""
    root = Node()
    for stack, seconds in stacks.items():
        node = root
        node.seconds += seconds
        for name in stack:
            if name.partition(" ")[0].rpartition(".")[2] not in PASSING:
                node = node.below.setdefault(name, Node())
                node.seconds += seconds
    return root


def flame_svg(stacks: Mapping[Stack, float], *, title: str, category: Callable[[Stack], str]) -> str:
    """Return a flame graph, outermost frames on top; a frame's colour is that of its category.

    Args:
        stacks: seconds by stack.
        title: what a screen reader says.
        category: name of a colour of `fedlr.runs.report.svg.COLOURS` for a frame with those around it.
    """
    root = tree(stacks)
    boxes = list(_boxes(root, (), 0.0, root.seconds))
    rows = 1 + max((row for row, *_ in boxes), default=0)
    drawn = "\n".join(
        _box(row, x, width, stack, seconds, root.seconds, category) for row, x, width, stack, seconds in boxes
    )
    label = html.escape(title)
    return standing_alone(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {rows * ROW + 8}" role="img" '
        f'aria-label="{label}">\n<title>{label}</title>\n{drawn}\n</svg>'
    )


def _boxes(node: Node, stack: Stack, x: float, whole: float) -> Iterator[tuple[int, float, float, Stack, float]]:
    for name, child in sorted(node.below.items(), key=lambda item: -item[1].seconds):
        if child.seconds >= SMALLEST * whole:
            width = WIDTH * child.seconds / whole
            yield len(stack), x, width, (*stack, name), child.seconds
            yield from _boxes(child, (*stack, name), x, whole)
            x += width


def _box(
    row: int, x: float, width: float, stack: Stack, seconds: float, whole: float, category: Callable[[Stack], str]
) -> str:
    name, fill = stack[-1], category(stack)
    share = f"{100 * seconds / whole:.1f} %"
    letters = int((width - 6) / 6.1)
    shown = name if len(name) <= letters else _short(name)[: max(0, letters)]
    y = 4 + row * ROW
    text = (
        f'<text x="{x + 3:.1f}" y="{y + 12}" font-size="10" style="fill: #1b1f24">{html.escape(shown)}</text>'
        if letters >= 4
        else ""
    )
    return (
        f"<g><title>{html.escape(name)}: {share}</title>"
        f'<rect x="{x:.1f}" y="{y}" width="{max(0.5, width - GAP):.1f}" height="{ROW - GAP}" rx="2" '
        f'style="fill: var(--{fill}, {COLOURS[fill][0]}); fill-opacity: 0.65"/>{text}</g>'
    )


def _short(name: str) -> str:
    """Return a function's own name, or its class where a hundred functions are called the same.

    >>> _short("BertOutput.forward (bert/modeling_bert)"), _short("a.<locals>.train (bench/profile)")
    ('BertOutput', 'train')
    """
    owner, _, function = name.partition(" ")[0].rpartition(".")
    return owner.rpartition(".")[2] if function == "forward" and owner else function


def _depth(frame: FrameType | None) -> int:
    depth = 0
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return depth
