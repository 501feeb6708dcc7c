"""Every tuner of PEFT as an entry: what trains, what is shipped once, what averaging does, how it stays private."""

from fedlr.tuners.entry import Tuner
from fedlr.tuners.registry import REFUSED, TUNERS, tuner

__all__ = ["REFUSED", "TUNERS", "Tuner", "tuner"]
