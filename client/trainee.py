"""What a device trains with: the resident base model with its adapter, and its own examples, ready for one round."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlr.adapters.state import HEAD, AdapterState, Block, roles_of
from fedlr.client.own_rows import LateRows, check_form, encode_readable
from fedlr.client.settings import Settings
from fedlr.config.build import build, build_choice
from fedlr.config.schema import RuntimeSection
from fedlr.data.store import TableStore
from fedlr.data.table import Table
from fedlr.errors import InputError
from fedlr.flower.messages import RefusalReason
from fedlr.flower.task_terms import LanguageTask, MultiLabelTask, ScoreTask, reading_sha256
from fedlr.flower.terms import Terms
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.models.base_delta import SideWeights
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import LAYOUT, read_adapter
from fedlr.models.products import library_of
from fedlr.models.tuners.attach import attach
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import Charges, LocalPool
from fedlr.rounds.pools.rehearsal import Rehearsal
from fedlr.rounds.round import RoundRequest
from fedlr.runs.prepare import (
    check_trainable,
    local_training,
    past_frozen,
    reads_features,
    state_store,
    working_model,
)
from fedlr.streams import OsRandomness, SeededRandomness
from fedlr.tasks.constant_rows import constant_share, constant_table
from fedlr.tasks.examples import Examples, Share
from fedlr.tasks.task import Task
from fedlr.training.threads import torch_threads


class Unfit(InputError):
    """What this device has does not fit the terms; `reason` is the word for it that may leave."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@contextmanager
def unfit(reason: RefusalReason) -> Iterator[None]:
    """Let bad input be `Unfit`, for this reason."""
    try:
        yield
    except InputError as error:
        raise Unfit(reason, str(error)) from error


@dataclass(frozen=True)
class Trainee:
    """A model, examples and terms that fit together; one is resident for as long as the terms stay."""

    settings: Settings
    terms: Terms
    task: Task
    model: AdaptedModel
    working: nn.Module
    share: Share
    side: SideWeights  # one, as the pools that follow each other merge into the same weights
    rehearsal: Rehearsal
    features: bool  # whether a row is kept as what the head reads: then nothing but the head can train

    @classmethod
    def prepare(
        cls, settings: Settings, terms: Terms, rows: Table, *, features: bool = False, say: Callable[[str], None]
    ) -> "Trainee":
        """Load the base model and encode the rows, once an experiment.

        Args:
            settings: the device's own.
            terms: what it agreed to.
            rows: the device's own (`fedlr.client.own_rows`); whether one can be read decides nothing that is told.
            features: whether the rounds train the head alone, on adapters that are zero (`only_head`).
            say: the device's own log.

        Raises:
            Unfit: the device's model, or the form of its table, is not what the terms need.
            InputError: what the terms ask of them cannot be done here.
        """
        task, max_length = terms.built_task(), terms.max_length
        with torch_threads(1):
            with unfit("model"):
                base = own_model(settings, terms)
                constants = constant_rows(task, base, terms, num_long=settings.runtime.num_workers)
                task.check(base, constants, max_length=max_length)
                model = attach(base, terms.adapter, seed=terms.seed)
            constant = constant_share(task, base, constants, max_length=max_length)
            with unfit("data"):
                check_form(rows, terms)
            # The constant rows first: where they fail, no row of a person's is read.
            runtime = runtime_of(settings)
            features = runtime.cache_prefix and features and reads_features(model, {HEAD}, read_adapter(model))
            working, (table,) = working_model(runtime, model, [constant.table], features=features, say=say)
            rehearsal = Rehearsal(replace(constant, table=table), say)
            own = encode_readable(task, base, rows, max_length=max_length, say=say)
            if own is not None and own.num_truncated:
                say(f"{own.num_truncated} of {len(own)} rows are cut to {max_length} tokens")
            if own is not None and runtime.cache_prefix:
                own = past_prefix(runtime, model, own, rehearsal, features=features)
        share = Share(table, np.empty(0, dtype=np.int64)) if own is None else Share.whole(own)
        return cls(settings, terms, task, model, working, share, SideWeights(working), rehearsal, features)

    def check(self, block: Block) -> None:
        """Refuse a block of which the engine cannot train the roles.

        Raises:
            InputError: which names the layer and the setting to change.
        """
        terms = self.terms
        check_trainable(self.model, roles_of(block), terms.trainer, terms.adapter, first=block, task=self.task)

    def pool(self, client_id: int, enrolled: AdapterState, ledger: Charges | None) -> FusedPool | LocalPool:
        """Return a pool of one client: the same code that trains it in a simulation."""
        terms, trainer = self.terms, self.terms.trainer
        check_enrolled(enrolled, read_adapter(self.model))
        if (layout := getattr(self.working, LAYOUT, None)) is not None:
            layout.load_shipped(self.working, enrolled.tensors)
        rule = ClientRule() if terms.client_rule is None else build_choice(terms.client_rule.section(), "client_rule")
        if not isinstance(rule, ClientRule):
            raise InputError(f"Expected client_rule to make a ClientRule, got {type(rule).__name__}")
        is_seeded = terms.randomness == "seeded"
        training = local_training(trainer, rule, self.task, num_rounds=terms.num_rounds)
        if terms.mechanism is not None:
            # Each row by itself: tensors or a learning rate of a server's can make a row's gradient hang by more than C
            # on how wide the rows beside it are, as float32 rounds.
            training = replace(training, token_budget=1)
        common: dict[str, Any] = {
            "enrolled": enrolled,
            "training": training,
            "mechanism": terms.private_steps(),
            "ledger": ledger,
            "randomness": SeededRandomness(terms.seed) if is_seeded else OsRandomness(),
            "weights": {client_id: 1.0},  # the server's to choose
            "num_workers": self.settings.runtime.num_workers,
            "side": self.side,
            # Without a mechanism what was drawn is seen in the update anyway.
            "rehearsal": None if terms.mechanism is None else self.rehearsal,
        }
        share = {client_id: self.share}
        if trainer.engine == "opacus":
            return LocalPool(self.working, share, grad_sample_mode=trainer.grad_sample_mode, **common)
        # A check on private rows fails or not with what was drawn, and tensors of a server's can make it fail.
        check_parity = trainer.check_parity and terms.mechanism is None
        return FusedPool(self.working, share, check_parity=check_parity, **common)


def own_model(settings: Settings, terms: Terms) -> BaseModel:
    """Load the device's base model, and refuse one that is not what the terms name.

    Raises:
        InputError: with the two hashes.
    """
    names = settings.output_names
    base: BaseModel = build(settings.model.section(), "model", label_names=names, seed=terms.seed)
    check_model(base, settings, terms)
    check_tokenizer(base, terms)
    return base


def past_prefix(
    runtime: RuntimeSection, model: AdaptedModel, rows: Examples, rehearsal: Rehearsal, *, features: bool
) -> Examples:
    """Return a device's rows past the layers that are cached: kept, or passed anew in every step where that fails.

    How many and how long they are decides what memory and disk keeping them takes, and nobody else is told of it:
    constant rows have passed, and the model that trains is the same.
    """
    threads, say = runtime.num_workers, rehearsal.say
    try:
        return past_frozen(model, rows, features, num_threads=threads, store=state_store(runtime, say=say))
    except Exception as error:  # the memory, the disk, an operation that does not take a value
        why = f"{type(error).__name__}: {error}"
        say(f"the rows cannot be kept past the frozen layers, and pass them in every step instead: {why}")
    return LateRows(rows, lambda few: past_frozen(model, few, features, num_threads=1, store=TableStore()), rehearsal)


def only_head(task: RoundRequest, enrolled: AdapterState | None) -> bool:
    """Return whether a round trains the head alone, on layers that are those of the base model, to the bit."""
    sent = {slot.role for slot in task.broadcast} | roles_of(task.block)
    if enrolled is None or sent != {HEAD} or task.side or enrolled.side:
        return False
    return not any(layer.lora_B.any() for layer in enrolled.factors().values())


def constant_rows(task: Task, base: BaseModel, terms: Terms, *, num_long: int) -> Table:
    """Return a short row and as many of the largest length as are computed side by side; nobody's data."""
    has_turns = not isinstance(terms.task, LanguageTask) or terms.task.has_turns
    return constant_table(
        task, base, max_length=terms.max_length, num_long=num_long, has_pairs=terms.pairs, has_turns=has_turns
    )


def check_enrolled(enrolled: AdapterState, own: AdapterState) -> None:
    """Refuse an enrolled adapter that lacks more than the head, which follows from the seed: what is left out would be
    an earlier one's.

    Raises:
        InputError: it does, or has tensors of another type.
    """
    given = {slot: tensor.dtype for slot, tensor in enrolled.tensors.items()}
    wanted = {slot: tensor.dtype for slot, tensor in own.tensors.items() if slot.role != HEAD or slot in given}
    if given != wanted:
        raise InputError(f"Expected all {len(wanted)} tensors of the adapter, of its types, got {len(given)}")
    own.overlaid(enrolled.tensors)  # raises for other shapes


def check_model(base: BaseModel, settings: Settings, terms: Terms) -> None:
    """Refuse a base model that is not the one the terms name, or that the policy does not allow.

    Raises:
        InputError: with the two hashes.
    """
    if base.body_sha256 not in settings.policy.allowed_models:
        raise InputError(f"Expected policy.allowed_models to hold the base model {base.body_sha256}, got none such")
    if base.fingerprint != terms.model_sha256:
        raise InputError(
            f"Expected the base model {terms.model_sha256[:12]} of the server, got {base.fingerprint[:12]} from "
            f"{base.source}; install the same package or folder, and set the operator's model.pooling "
            "and model.head_std"
        )


def check_tokenizer(base: BaseModel, terms: Terms) -> None:
    """Refuse a tokenizer, a chat template, or a processor of pictures that is not the one the terms name.

    Raises:
        InputError: with the two hashes.
    """
    if terms.task is None or isinstance(terms.task, ScoreTask | MultiLabelTask):
        return
    if isinstance(terms.task, LanguageTask):
        what, asked = "tokenizer with its chat template", terms.task
        found = reading_sha256(base, template=asked.template, has_turns=asked.has_turns)
    else:
        what, found = "preprocessor_config.json (size, mean and deviation of pixels)", reading_sha256(base)
    if found != terms.task.reading_sha256:
        raise InputError(
            f"Expected the {what} of SHA-256 {terms.task.reading_sha256[:12]}, as the server has, got {found[:12]} "
            f"from {base.source}; install the same package or folder, and the same version of tokenizers"
        )


def runtime_of(settings: Settings) -> RuntimeSection:
    """Return the device's part of a configuration's runtime."""
    own = settings.runtime
    if own.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"Expected runtime.device=cpu, as PyTorch finds no GPU here, got {own.device}")
    return RuntimeSection(
        kind="local",
        device=own.device,
        num_workers=own.num_workers,
        num_processes=1,
        memory_gb=None,
        base_dtype="float32",
        matmul=library_of(own.matmul),
        cache_prefix=own.cache_prefix,
        cache_dir=None,
        offline=True,
    )
