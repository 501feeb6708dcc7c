"""What this machine and this runtime cannot do for an experiment, found before any work."""

import importlib.util
from collections.abc import Sequence

import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, ClientUpdate
from fedlr.config.codec_rules import check_codec
from fedlr.config.language_rules import CAUSAL_LM
from fedlr.config.robust_rules import check_robust
from fedlr.config.schema import Experiment
from fedlr.config.system_rules import check_system
from fedlr.errors import InputError
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.methods.layer_choice import StrongestLayers
from fedlr.methods.method import Always, Method
from fedlr.models.adapter_config import WITH_SIDE
from fedlr.models.tuners.blocks import LORA
from fedlr.rounds.round import ServerState, request_of

SEVERAL = 4  # made-up updates, enough for any rule


def check_runtime(experiment: Experiment, method: Method, rule: ClientRule) -> None:
    """Refuse a device that is not there, several processes where the package that runs them is missing, and a method
    that would need another runtime."""
    check_method(experiment, method, rule)
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


def check_method(experiment: Experiment, method: Method, rule: ClientRule | None = None) -> None:
    """Refuse what a method cannot do here; `rule` is what clients do after the noise (None: the method's)."""
    check_system(experiment, method)
    check_server_step(experiment, method)
    check_robust(experiment, method)
    rule = rule or method.client
    check_codec(experiment, method, rule)
    runtime, name = experiment.runtime, method.name
    if method.folds and runtime.base_dtype != "float32":
        raise InputError(
            f"Expected runtime.base_dtype=float32 for method={name}, which adds to the base model's weights, got "
            f"{runtime.base_dtype}: it would round most of that away"
        )
    if (method.personal or rule.remembers) and runtime.num_processes > 1:
        raise InputError(
            f"Expected runtime.num_processes=1 for method={name}, whose clients remember earlier rounds, got "
            f"{runtime.num_processes}"
        )
    if method.personal and not isinstance(method.block_schedule, Always):
        raise InputError(f"Expected method.block_schedule=always with method.personal, got another for method={name}")
    if method.personal and (experiment.adapter.has_client_ranks or method.prunes):
        raise InputError(f"Expected adapter.client_ranks=null with method.personal, got ranks for method={name}")
    rule.active(0, frozenset(method.block_schedule.roles))  # raises where the rule needs another block
    if rule.needs_both_factors and not {LORA_A, LORA_B} <= set(method.block_schedule.roles):
        raise InputError(
            "Expected a method that trains lora_A and lora_B for trainer.after_noise, such as fedit, got "
            f"{name}: where one of them trains LoRA+ is another trainer.optimizer.lr and nothing else"
        )
    if rule.alternates and experiment.trainer.engine != "fused":
        raise InputError(f"Expected trainer.engine=fused for method={name}, got {experiment.trainer.engine}")
    if rule.alternates and experiment.trainer.num_steps < 2:
        raise InputError(f"Expected trainer.num_steps >= 2 for method={name}, which trains its factors in turn, got 1")
    if experiment.adapter.has_client_ranks:
        if not method.mixed_ranks:
            raise InputError(
                f"Expected a method that aggregates mixed ranks for adapter.client_ranks, such as flexlora, got {name}"
            )
        if experiment.trainer.after_noise is not None and len(set(method.block_schedule.roles)) < 2:
            raise InputError("Expected adapter.client_ranks=null with trainer.after_noise where one factor trains")
    if HEAD in method.block_schedule.roles and experiment.task.target == CAUSAL_LM:
        raise InputError(
            f"Expected a method that trains LoRA with task=causal_lm, such as fedsvd, got {name}: the head of a "
            "language model stays frozen"
        )
    if HEAD in method.block_schedule.roles and not experiment.adapter.train_head:
        raise InputError(f"Expected adapter.train_head=true for method={name}, which trains the head, got false")
    reads_product = method.dynamic_ranks or isinstance(method.block_schedule, StrongestLayers)
    if (method.prunes or reads_product) and (start := experiment.adapter.init_lora_weights) in WITH_SIDE:
        raise InputError(
            f"Expected adapter.init_lora_weights=true or principal for method={name}, got {start}: what it takes out "
            "of the base would be ranked with what was learnt, and cut"
        )
    if (experiment.adapter.has_client_ranks or method.prunes) and experiment.trainer.engine != "fused":
        raise InputError(
            "Expected trainer.engine=fused for clients of different ranks (adapter.client_ranks, hetlora), got "
            f"{experiment.trainer.engine}"
        )


def check_server_step(experiment: Experiment, method: Method) -> None:
    """Refuse a momentum that would move nothing, and a mean of models that are not of one form."""
    e, name = experiment, method.name
    if e.server_momentum and not e.adapter.train_head and method.momentum_roles == {HEAD}:
        raise InputError(
            f"Expected adapter.train_head=true with server_momentum for method={name}, got false: its factors have no "
            "coordinates that last from round to round, so that the head alone could have a momentum; set "
            "server_momentum=0"
        )
    if e.release == "best" and method.personal:
        raise InputError(
            f"Expected release=last for method={name}, which leaves a part of the model with each client, got best: "
            "what clients keep is of the last round"
        )
    if e.average_last == 1:
        return
    for what, why in (
        (method.folds, "folds what it learns into the base"),
        (method.dynamic_ranks, "changes ranks from round to round"),
        (method.personal, "leaves a part of the model with each client"),
        (e.adapter.system != LORA, f"trains {e.adapter.system}, of which the mean of parameters is another model"),
    ):
        if what:
            raise InputError(f"Expected average_last=1 for method={name}, which {why}, got {e.average_last}")


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
