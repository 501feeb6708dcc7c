"""Federated, private low-rank fine-tuning with LoRA methods and accounted DP-SGD."""

__version__ = "0.1.0"
