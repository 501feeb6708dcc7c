"""Rules of a built method and of this machine, and the first round played with made-up updates, before any work."""

import importlib.util
from collections.abc import Iterator, Sequence

import torch

from fedlr.adapters.state import ClientUpdate
from fedlr.config import codec_rules, method_rules, robust_rules, system_rules, unit_methods
from fedlr.config.choice import Choice
from fedlr.config.rule import Rules, rule, rules_of
from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.method import Method
from fedlr.rounds.round import ServerState, request_of

SEVERAL = 4  # made-up updates, enough for any rule


@rule("runtime.device", "runtime.num_processes")
def gpus(c: Choice) -> Iterator[str]:
    """A GPU is there, and one for each process."""
    device, num_processes = c.experiment.runtime.device, c.experiment.runtime.num_processes
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if device != "cpu" and (torch.device(device).index or 0) >= num_gpus:
        yield f"Expected runtime.device=cpu, as PyTorch finds no such GPU here, got {device}"
    if device != "cpu" and 1 < num_processes != min(num_processes, num_gpus):
        yield f"Expected runtime.num_processes <= {num_gpus}, a GPU for each of them, got {num_processes} on {device}"


@rule("runtime.num_processes")
def ray(c: Choice) -> Iterator[str]:
    """Several processes need the package ray."""
    num_processes = c.experiment.runtime.num_processes
    if num_processes > 1 and importlib.util.find_spec("ray") is None:
        yield (
            f"Expected the package ray for runtime.num_processes={num_processes}, got none; install it with "
            "pip install 'fedlr[ray]', or set runtime.num_processes=1"
        )


OF_A_METHOD: Rules[Choice] = Rules(
    "The method",
    "Asked of the configuration with the method that is built from it, before any row is read.",
    rules_of(unit_methods, system_rules, robust_rules, method_rules, codec_rules),
)
OF_THIS_MACHINE: Rules[Choice] = Rules(
    "This machine",
    "Asked after those of the method, of what is installed here.",
    (gpus, ray),
)


def check_runtime(experiment: Experiment, method: Method, rule: ClientRule) -> None:
    """Refuse a method that does not go with the rest of the configuration, and devices or packages that are missing.

    Raises:
        InputError: which names the key, its value and what to set.
    """
    check_method(experiment, method, rule)
    OF_THIS_MACHINE.check(Choice(experiment, method, rule))


def check_method(experiment: Experiment, method: Method, rule: ClientRule | None = None) -> None:
    """Refuse what a method cannot do here; `rule` is what clients do after the noise (None: the method's).

    Raises:
        InputError: which names the key, its value and what to set.
    """
    OF_A_METHOD.check(Choice(experiment, method, rule or method.client))


def check_aggregate(start: ServerState, method: Method, experiment: Experiment, *, weights: Sequence[float]) -> None:
    """Play the first round's aggregation with made-up updates, so that a rule refuses now what it cannot use.

    Raises:
        InputError: what the rule says.
    """
    tensors = start.adapter.select(request_of(start, method, train_head=experiment.adapter.train_head).shared)
    # The lightest and the heaviest clients: rules that need weights of one size see others where there are any.
    used = sorted(weight for weight in weights if weight > 0)
    num_heavy = min(experiment.cohort_size, max(SEVERAL, method.least_updates)) - 1
    chosen = [*used[:1], *used[max(1, len(used) - num_heavy) :]]
    updates = [ClientUpdate(k, tensors, w, start.round_index) for k, w in enumerate(chosen)]
    after = method.aggregate(start.adapter, updates)
    remembered = [name for name, values in after.memory.items() if values.keys() & start.adapter.tensors.keys()]
    if method.dynamic_ranks and remembered:
        raise InputError(
            "Expected a method.aggregate that remembers no tensors with method.dynamic_ranks, got one with "
            f"{remembered[0]} for method={method.name}: it has the rank of its round"
        )
