"""Stands for `fedlr.simulations.sweep_worker`: it runs nothing, and fails or dies where a seed says so.

`seed=7` fails, `seed=9` kills the process; any other ends in a folder of the seed's name.
"""

import json
import os
import signal
import sys


def main() -> None:
    """Answer every line of the input."""
    for line in sys.stdin:
        seed = json.loads(line)["overrides"][-1].partition("=")[2]
        print(json.dumps({"said": f"\nthreads {os.environ['OMP_NUM_THREADS']}\n  round 1/1"}), flush=True)
        if seed == "9":
            os.kill(os.getpid(), signal.SIGKILL)
        print(json.dumps({"failed": "no luck"} if seed == "7" else {"run_dir": f"made/{seed}"}), flush=True)


if __name__ == "__main__":
    main()
