"""Every tuner of PEFT as an entry: what trains, what is shipped once, what averaging does, how it stays private."""

from fedlr.models.tuners.entry import Tuner
from fedlr.models.tuners.registry import REFUSED, TUNERS, tuner

__all__ = ["REFUSED", "TUNERS", "Tuner", "tuner"]
