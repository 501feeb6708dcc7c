"""What this machine and this runtime cannot do for an experiment, found before any work."""

import importlib.util

import torch

from fedlr.errors import InputError
from fedlr.experiment import Experiment
from fedlr.method import Method


def check_runtime(experiment: Experiment, method: Method) -> None:
    """Refuse a device that is not there, several processes where the package that runs them is missing, and a method
    that would need another runtime."""
    check_method(experiment, method)
    device, num_processes = experiment.runtime.device, experiment.runtime.num_processes
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device != "cpu" and (torch.device(device).index or 0) >= num_gpus:
        raise InputError(f"Expected runtime.device=cpu, as PyTorch finds no such GPU here, got {device}")
    if device != "cpu" and 1 < num_processes != min(num_processes, num_gpus):
        raise InputError(
            f"Expected runtime.num_processes <= {num_gpus}, a GPU for each of them, got {num_processes} on {device}"
        )
    if num_processes > 1 and importlib.util.find_spec("ray") is None:
        raise InputError(
            f"Expected the package ray for runtime.num_processes={num_processes}, got none; install it with "
            "pip install 'fedlr[ray]', or set runtime.num_processes=1"
        )


def check_method(experiment: Experiment, method: Method) -> None:
    """Refuse what a method cannot do in this runtime."""
    runtime, name = experiment.runtime, method.name
    if method.folds and runtime.base_dtype != "float32":
        raise InputError(
            f"Expected runtime.base_dtype=float32 for method={name}, which adds to the base model's weights, got "
            f"{runtime.base_dtype}: it would round most of that away"
        )
    if (method.personal or method.client.remembers) and runtime.num_processes > 1:
        raise InputError(
            f"Expected runtime.num_processes=1 for method={name}, whose clients remember earlier rounds, got "
            f"{runtime.num_processes}"
        )
    if method.client.alternates and experiment.trainer.engine != "fused":
        raise InputError(f"Expected trainer.engine=fused for method={name}, got {experiment.trainer.engine}")
    if method.client.alternates and experiment.trainer.num_steps < 2:
        raise InputError(f"Expected trainer.num_steps >= 2 for method={name}, which trains its factors in turn, got 1")
    if experiment.adapter.client_ranks is not None:
        if not method.mixed_ranks:
            raise InputError(
                f"Expected a method that aggregates mixed ranks for adapter.client_ranks, such as flexlora, got {name}"
            )
        if experiment.trainer.engine != "fused":
            raise InputError(f"Expected trainer.engine=fused for adapter.client_ranks, got {experiment.trainer.engine}")
