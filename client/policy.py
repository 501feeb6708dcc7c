"""What this device agrees to do, whoever asks: bounds of its owner's that no server can move (requirement R-P13).

A server is taken for hostile. Everything it can put into `Terms` and `Request`, and what stops it, before data or
ledger are touched:

    num_rounds, num_steps, sample_rate      bounds; the budget itself is the ledger's
    noise_multiplier, max_grad_norm         bounds on both sides: noise below float32's grain would be none
    mechanism = null                        refused unless the device has no budget and says so, and the other way round
    mechanism against trainer               one sample rate, one divisor: what is accounted is what is done
    grad_sample_mode = ghost                refused under a mechanism: its clip bound holds up to rounding, which
                                            tensors of a server's can make as large as they like
    check_parity                            not done under a mechanism (`fedlr.client.trainee`)
    randomness                              the device's own: "seeded", which can be subtracted, only if it says so
    divisor, learning rate, betas ...       finite and bounded: post-processing, but it would waste the budget
    optimizer, after_noise, client_rule     names of a fixed set, compared as text before anything is imported or
                                            called; arguments are plain numbers and true or false, never sections
    experiment_id                           a bounded number of experiments, as each leaves an adapter on the disk
    task                                    one that the owner allows, and that the device's own data are for
    task.template, task.max_response        a name of a fixed set, never a template; a bounded number (`Terms`)
    task.score_range                        that of the device's own data
    codec                                   a name of a fixed set, after the noise; none that picks what is large
    task.labels                             those of the device's own data, in order
    label_names                             equal to the device's own, in order
    pairs                                   as the device's own table has two texts a row, or one
    label_weights                           of these labels, positive, at most 1e9 (`Terms`); they act before the clip
    max_length, token_budget                bounds: memory and time
    adapter.system, rank, alpha, sizes      a list of systems; bounds; sizes are numbers, so no patterns and no files
    adapter.target_modules                  names, "all-linear", "auto"; no regular expression, as it may run for ever
    init_lora_weights, public               starts that the server makes, or from a file, are no terms at all (`Terms`)
    name                                    printable, as it is shown and logged
    round_index                             below num_rounds
    block, personal                         roles of the system; the head only if terms say it trains; something is sent
    rank                                    of this client, at most adapter.rank; none beside personal roles
    broadcast, enrolled, side, control      known roles, finite values, shapes of the rank, bounded numbers of values
    scale                                   the one that the terms give

Left to others: the form of a message (`flower.messages`, `flower.records`); the hashes of the model and of what turns
rows into what it reads, once they are loaded (`fedlr.client.trainee`); whether it fits the model, and what was kept
(`rounds.pools.rehearsal`, `rounds.pools.client_state`); a role that is personal no more, and a second task under one
round's name (`fedlr.client.device`); what is spent (`fedlr.privacy.ledger`).
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fedlr.adapters.state import (
    HEAD,
    LARGEST_VALUE,
    LORA_A,
    LORA_B,
    SHIPPED,
    SIDE_A,
    SIDE_B,
    Slot,
    given_ranks,
    num_values,
    roles_of,
    side_tensors,
)
from fedlr.client.owner_limits import (
    HOW_IT_RUNS,
    LARGEST_ARGUMENT,
    LARGEST_SCALE,
    LARGEST_SIZE,
    MODULE_NAME,
    MOST_BLOCKS,
    MOST_NAMES,
)
from fedlr.client.owner_limits import Policy as Policy
from fedlr.client.settings import Settings
from fedlr.config.build import build_choice, build_optimizer
from fedlr.config.language_rules import CAUSAL_LM
from fedlr.config.parts import OPTIMIZERS
from fedlr.config.schema import Target
from fedlr.errors import InputError
from fedlr.errors.messages import shown
from fedlr.errors.ranges import LEAST_GRAD_NORM
from fedlr.flower.messages import Request
from fedlr.flower.task_terms import MultiLabelTask, ScoreTask
from fedlr.flower.terms import Terms
from fedlr.models.adapter_config import AUTO_TARGETS
from fedlr.models.places import ALL_LINEAR
from fedlr.models.tuners.blocks import LORA, entry_of, role_of

WITH_PAIRS = ("text_classification", "text_multilabel", "text_regression")  # tasks whose rows may be of two texts


class PolicyRefusal(InputError):
    """What a server asks is outside what this device's owner allows; the text names key, value and bound."""


class Bound(NamedTuple):
    """A number that a server may choose, and between what: `source` says who says so."""

    key: str
    value: float
    least: float
    most: float
    source: str


def check_terms(terms: Terms, settings: Settings) -> None:
    """Refuse terms outside the owner's policy. Data, model and ledger are not touched.

    Raises:
        PolicyRefusal: naming the first key, its value and what is allowed.
    """
    policy = settings.policy
    for key, value, least, most, source in _bounds(terms, policy):
        if not least <= value <= most:  # so that nan is refused
            _refuse(key, value, f"in [{least:g}, {most:g}] ({source})")
    if not terms.name.isprintable():
        _refuse("name", terms.name, "printable")
    _check_task(terms, settings)
    if tuple(terms.label_names) != settings.label_names:
        _refuse("label_names", terms.label_names, f"{shown(list(settings.label_names))} (data.labels)")
    if settings.task in WITH_PAIRS:  # a function of the owner's own is looked at when it ran
        has_pairs = settings.data.section().get("text_pair_column") is not None
        if terms.pairs != has_pairs:
            fix = "null" if has_pairs else "the column of the second text"
            _refuse("pairs", terms.pairs, f"{str(has_pairs).lower()} (or set data.text_pair_column to {fix})")
    _check_privacy(terms, settings)
    _check_adapter(terms, policy)
    _check_section(terms.trainer.optimizer, "trainer.optimizer", policy.allowed_optimizers, "policy.allowed_optimizers")
    for where, rule in (("trainer.after_noise", terms.trainer.after_noise), ("client_rule", terms.client_rule)):
        if rule is not None:
            _check_section(rule, where, policy.allowed_rules, "policy.allowed_rules")
    _check_buildable(terms)
    if terms.codec is not None:
        _check_codec(terms)
    _check_room(terms, settings)


def check_request(request: Request, settings: Settings) -> None:
    """Refuse a request that the agreed terms do not cover; call `check_terms` first.

    Raises:
        PolicyRefusal: naming the first key, its value and what is allowed.
    """
    terms, task, policy = request.terms, request.task, settings.policy
    if not 0 <= task.round_index < terms.num_rounds:
        _refuse("round_index", task.round_index, f"in [0, {terms.num_rounds}) (num_rounds)", root="request")
    if not math.isclose(request.scale, _scale(terms), rel_tol=1e-6):
        _refuse("scale", request.scale, f"{_scale(terms):g}, which adapter.lora_alpha and rank give", root="request")
    roles = _roles(terms)
    trainable = roles if terms.adapter.train_head else roles - {HEAD}
    if len(task.block) > MOST_BLOCKS or not roles_of(task.block) <= trainable:
        _refuse("block", sorted(task.block, key=str)[:4], f"some of {', '.join(sorted(trainable))}", root="request")
    if not task.personal <= roles or not task.shared:
        _refuse(
            "personal", sorted(task.personal), "roles of the adapter, and less than all that trains", root="request"
        )
    if task.ranks and task.personal:  # what is kept would not fit the adapter
        _refuse("rank", max(task.ranks.values()), "null with personal roles", root="request")
    most, rank = policy.max_trained_values, terms.adapter.rank
    least = min([rank, *given_ranks(task.broadcast).values()]) if terms.trainer.engine == "fused" else 0
    if max(task.ranks.values(), default=0) > least:
        _refuse("rank", max(task.ranks.values()), f"at most {least}, with trainer.engine=fused alone", root="request")
    enrolled = {} if request.enrolled is None else request.enrolled.tensors
    _check_tensors(task.broadcast, "broadcast", roles, most=most, rank=rank)
    _check_tensors(enrolled, "enrolled", roles | {SHIPPED}, most=most, rank=rank)
    _check_tensors(task.control, "control", roles, most=most, rank=rank)
    _check_tensors(side_tensors(task.side), "side", {SIDE_A, SIDE_B}, most=policy.max_side_values, rank=None)
    if any(f.lora_A.ndim != 2 or f.lora_B.ndim != 2 or len(f.lora_A) != f.lora_B.shape[1] for f in task.side.values()):
        _refuse("side", "factors of other shapes", "(R, K) and (D, R)", root="request")


def _bounds(terms: Terms, policy: Policy) -> Iterator[Bound]:
    trainer, adapter, mechanism = terms.trainer, terms.adapter, terms.mechanism
    p = "policy."
    yield Bound("num_rounds", terms.num_rounds, 1, policy.max_rounds, f"{p}max_rounds")
    yield Bound("max_length", terms.max_length, 1, policy.max_length, f"{p}max_length")
    yield Bound("trainer.num_steps", trainer.num_steps, 1, policy.max_steps_per_round, f"{p}max_steps_per_round")
    yield Bound("trainer.sample_rate", trainer.sample_rate, 0, policy.max_sample_rate, f"{p}max_sample_rate")
    yield Bound("trainer.divisor", trainer.number_divisor(), policy.min_divisor, policy.max_divisor, f"{p}max_divisor")
    yield Bound("trainer.token_budget", trainer.token_budget, 1, policy.max_token_budget, f"{p}max_token_budget")
    yield Bound("adapter.rank", adapter.rank, 1, policy.max_rank, f"{p}max_rank")
    yield Bound("adapter.lora_alpha", adapter.lora_alpha, 1 / LARGEST_SCALE, LARGEST_SCALE * adapter.rank, "fixed")
    if mechanism is not None:
        noise, norm = mechanism.noise_multiplier, mechanism.max_grad_norm
        least, most = policy.min_noise_multiplier, policy.max_noise_multiplier
        yield Bound("mechanism.noise_multiplier", noise, least, most, f"{p}min_noise_multiplier")
        yield Bound("mechanism.max_grad_norm", norm, LEAST_GRAD_NORM, policy.max_grad_norm, f"{p}max_grad_norm")


def _check_task(terms: Terms, settings: Settings) -> None:
    name, own, allowed = terms.task_name, settings.task, settings.policy.allowed_tasks
    if name not in allowed:
        _refuse("task", name, f"{' or '.join(allowed)} (policy.allowed_tasks)")
    if own not in (None, name):
        _refuse("task", name, f"{own}, which this device's rows are for (data._target_)")
    if name == CAUSAL_LM and terms.adapter.train_head:
        _refuse("adapter.train_head", True, "false for a language model, whose head is its vocabulary")
    declared = settings.data.section().get("score_range")
    if isinstance(terms.task, ScoreTask) and declared is not None and list(declared) != terms.task.score_range:
        _refuse("task.score_range", terms.task.score_range, f"{shown(list(declared))} (data.score_range)")
    if isinstance(terms.task, MultiLabelTask) and own == name and list(settings.output_names) != terms.task.labels:
        _refuse("task.labels", terms.task.labels, f"{shown(list(settings.output_names))} (data.labels)")


def _check_privacy(terms: Terms, settings: Settings) -> None:
    mechanism, trainer, privacy = terms.mechanism, terms.trainer, settings.privacy
    if mechanism is None:
        if privacy.epsilon is not None or not settings.policy.allow_no_privacy:
            _refuse("mechanism", None, "noise (policy.allow_no_privacy)")
        return
    if privacy.epsilon is None:
        _refuse("mechanism", mechanism.model_dump(), "null, as this device has no budget (privacy.epsilon)")
    if privacy.delta > mechanism.delta:  # its updates would not be used, and charged for nothing
        _refuse("mechanism.delta", mechanism.delta, f"{privacy.delta:g} or more (privacy.delta)")
    if terms.randomness != privacy.randomness:
        _refuse("randomness", terms.randomness, f"{privacy.randomness} (privacy.randomness)")
    if trainer.engine == "opacus" and trainer.grad_sample_mode == "ghost":
        why = "hooks or loop, as ghost sums another pass than it measured: tensors of a server's can make it exceed C"
        _refuse("trainer.grad_sample_mode", "ghost", why)
    for key in ("sample_rate", "divisor"):
        accounted, done = getattr(mechanism, key), getattr(trainer, key)
        if accounted != done:
            _refuse(f"mechanism.{key}", accounted, f"{done:g}, as trainer.{key} is")


def _check_adapter(terms: Terms, policy: Policy) -> None:
    adapter = terms.adapter
    if adapter.system not in policy.allowed_adapters:
        _refuse("adapter.system", adapter.system, f"{' or '.join(policy.allowed_adapters)} (policy.allowed_adapters)")
    targets = adapter.target_modules
    names = ([] if targets in (ALL_LINEAR, AUTO_TARGETS) else None) if isinstance(targets, str) else targets
    if names is None or len(names) > MOST_NAMES or not all(map(MODULE_NAME.fullmatch, names)):
        _refuse("adapter.target_modules", targets, "a list of names, all-linear or auto, as patterns may run for ever")
    if len(adapter.layers or []) > MOST_NAMES:
        _refuse("adapter.layers", adapter.layers, f"at most {MOST_NAMES} numbers")
    if adapter.sizes and adapter.system == LORA:
        _refuse("adapter.sizes", adapter.sizes, "null for lora")
    for key, value in (adapter.sizes or {}).items():
        if not _is_plain(value, most=LARGEST_SIZE) or isinstance(value, list):
            _refuse(f"adapter.sizes.{key[:40]}", value, f"a number of at most {LARGEST_SIZE}, or true or false")


def _check_section(section: Target, where: str, allowed: list[Any], source: str) -> None:
    """Compare a name with those allowed, as text: what a server names is not imported to find out what it is."""
    if section.target not in allowed:
        _refuse(f"{where}._target_", section.target, f"one of {source}")
    for key, value in (section.model_extra or {}).items():
        named = key == "optimizer" and value in OPTIMIZERS  # which rules are told, and compare
        if not (named or _is_plain(value, most=LARGEST_ARGUMENT)) or (key in HOW_IT_RUNS and value):
            _refuse(f"{where}.{key[:40]}", value, f"a finite number of at most {LARGEST_ARGUMENT:g}, or true or false")


def _check_buildable(terms: Terms) -> None:
    """Find now what allowed functions say of their arguments: later it would cost the round."""
    try:
        build_optimizer(terms.trainer)
        for where, rule in (("trainer.after_noise", terms.trainer.after_noise), ("client_rule", terms.client_rule)):
            if rule is not None:
                build_choice(rule.section(), where)
    except InputError as error:
        raise PolicyRefusal(str(error)) from error


def _check_codec(terms: Terms) -> None:
    """Refuse a codec that private steps do not go with; whatever it is, it sees noised values alone."""
    try:
        codec = terms.built_codec()
    except InputError as error:
        raise PolicyRefusal(str(error)) from error
    if codec is None or terms.codec is None:
        return
    if terms.mechanism is not None and not codec.is_for_private():
        _refuse("codec", terms.codec.target, "another, as it would send noise alone")
    rule: Any = None if terms.client_rule is None else build_choice(terms.client_rule.section(), "client_rule")
    if rule is not None and rule.remembers:
        _refuse("codec", terms.codec.target, "null with a client_rule that remembers")


def _check_room(terms: Terms, settings: Settings) -> None:
    folder, most = settings.experiments_dir, settings.policy.max_experiments
    known = os.listdir(folder) if folder.is_dir() else []
    if terms.experiment_id not in known and len(known) >= most:
        what = f"one of the {len(known)} that this device knows (policy.max_experiments={most}; {folder})"
        _refuse("experiment_id", terms.experiment_id, what)


def _is_plain(value: Any, *, most: float) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 4 and all(isinstance(x, int | float) and _is_plain(x, most=most) for x in value)
    return value is None or (isinstance(value, bool | int | float) and -most <= value <= most)


def _roles(terms: Terms) -> set[str]:
    system = terms.adapter.system
    blocks = (LORA_A, LORA_B) if system == LORA else entry_of(system).blocks
    return {HEAD, *(role_of(system, block) for block in blocks)}


def _scale(terms: Terms) -> float:
    adapter = terms.adapter
    if adapter.system != LORA:
        return 1.0
    return adapter.lora_alpha / (math.sqrt(adapter.rank) if adapter.use_rslora else adapter.rank)


def _check_tensors(tensors: Mapping[Slot, Tensor], where: str, roles: set[str], *, most: int, rank: int | None) -> None:
    if (count := num_values(tensors.values())) > most:
        _refuse(where, count, f"at most {most} values", root="request")
    for slot, tensor in tensors.items():
        if slot.role not in roles or not slot.path.isprintable():
            _refuse(
                f"{where}.{slot.path[:80]}", slot.role[:80], f"a role of {', '.join(sorted(roles))}", root="request"
            )
        ranks = {LORA_A: 0, LORA_B: 1}.get(slot.role)
        if ranks is not None and rank is not None and (tensor.ndim != 2 or tensor.shape[ranks] > rank):
            _refuse(f"{where}.{slot.path[:80]}", list(tensor.shape), f"a {slot.role} of rank {rank}", root="request")
        if not tensor.numel() or not _is_bounded(tensor):
            what = f"finite values of at most {LARGEST_VALUE:g}"
            _refuse(f"{where}.{slot.path[:80]}", slot.role, what, root="request")


def _is_bounded(tensor: Tensor) -> bool:
    lowest, highest = torch.aminmax(tensor)  # one pass; both are nan where any value is
    return float(lowest) >= -LARGEST_VALUE and float(highest) <= LARGEST_VALUE


def _refuse(key: str, value: object, allowed: str, *, root: str = "terms") -> NoReturn:
    raise PolicyRefusal(f"Expected {root}.{key} to be {allowed}, got {shown(value)}")
