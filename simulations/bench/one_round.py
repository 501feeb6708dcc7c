"""One round of ours, in a fresh process: `python -m fedlr.simulations.bench.one_round OUT.safetensors OVERRIDE ...`."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedlr.simulations.bench.settings import scratch_root
from fedlr.simulations.bench.worker import Session


def main(arguments: Sequence[str]) -> int:
    """Assemble, train everyone in one round, leave the trained tensors of the mean in a file."""
    out, *overrides = arguments
    with tempfile.TemporaryDirectory(dir=scratch_root()) as folder:
        session = Session(Path(folder))
        told = session.assemble(overrides)
        session.round(told["num_clients"], keep=out)
        session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
