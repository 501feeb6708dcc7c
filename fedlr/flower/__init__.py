"""Strategies for a Flower user's own ServerApp: the library's methods in place of FedAvg (docs/strategies.md)."""

from fedlr.flower.strategies import FedIT as FedIT
from fedlr.flower.strategies import FedSVD as FedSVD
from fedlr.flower.strategies import FfaLora as FfaLora
from fedlr.flower.strategies import LoraFair as LoraFair
from fedlr.flower.strategies import strategy as strategy
