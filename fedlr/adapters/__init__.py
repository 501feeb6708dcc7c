"""Adapters as tensors: named factors, and what can be computed of them. No model is needed, and no PEFT."""
