"""Federated, private low-rank fine-tuning with LoRA methods and accounted DP-SGD."""

import os

__version__ = "0.1.0"

# The same numbers wherever a tensor lies in memory: without this, small products of Intel's library depend on the
# alignment of their operands (measured on an AMD Zen 4: multiples of 16 bytes that are not multiples of 64). It is read
# at the first product of the process, and costs nothing that could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO")
