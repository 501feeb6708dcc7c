"""Federated, private low-rank fine-tuning: the library behind `fedlr simulate`, `fedlr server` and `fedlr client`."""

__version__ = "0.1.0"
