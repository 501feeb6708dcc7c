"""What a device trains with: the resident base model with its adapter, and its own examples, ready for one round."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from client.settings import Settings
from fedlr.adapters.state import HEAD, AdapterState, Block, roles_of
from fedlr.config.build import build, build_choice
from fedlr.config.schema import RuntimeSection
from fedlr.data.table import LabelledText
from fedlr.errors import InputError
from fedlr.flower.messages import RefusalReason
from fedlr.flower.terms import Terms
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.models.base_delta import SideWeights
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.peft_state import LAYOUT, read_adapter
from fedlr.models.tuners.attach import attach
from fedlr.privacy.mechanism import check_delta
from fedlr.rounds.pools.fused import FusedPool
from fedlr.rounds.pools.local import Charges, LocalPool
from fedlr.rounds.pools.rehearsal import Rehearsal, with_largest_id
from fedlr.rounds.round import RoundRequest
from fedlr.runs.prepare import check_trainable, local_training, reads_features, working_model
from fedlr.streams import OsRandomness, SeededRandomness
from fedlr.tasks.examples import Examples, Share
from fedlr.tasks.reading import check_reading, read_texts
from fedlr.tasks.text_classification import TextClassification
from fedlr.tasks.tokenise import tokenise
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
    model: AdaptedModel
    working: nn.Module
    share: Share
    side: SideWeights  # one, as the pools that follow each other merge into the same weights
    rehearsal: Rehearsal
    features: bool  # whether a text is kept as what the head reads: then nothing but the head can train

    @classmethod
    def prepare(
        cls, settings: Settings, terms: Terms, *, features: bool = False, say: Callable[[str], None]
    ) -> "Trainee":
        """Load the base model and the examples, once an experiment.

        Args:
            settings: the device's own.
            terms: what it agreed to.
            features: whether the rounds train the head alone, on adapters that are zero (`only_head`).
            say: the device's own log.

        Raises:
            Unfit: the device's model, or its labels or data, are not what the terms need.
            InputError: what the terms ask of them cannot be done here.
        """
        with torch_threads(1):
            with unfit("model"):
                base: BaseModel = build(
                    settings.model.section(), "model", label_names=tuple(terms.label_names), seed=terms.seed
                )
                check_model(base, settings, terms)
                check_reading(base, max_length=terms.max_length, has_pairs=terms.pairs)
                model = attach(base, terms.adapter, seed=terms.seed)
            constant = constant_rows(base.tokenizer, terms, num_long=settings.runtime.num_workers)
            with unfit("data"):
                tokenised = read_texts(own_examples(settings, terms), base, max_length=terms.max_length)
            tables: list[Examples] = [
                constant.table,
                tokenised,
            ]  # the constant rows first: where they fail, no text is read
            runtime = runtime_of(settings)
            features = runtime.cache_prefix and features and reads_features(model, {HEAD}, read_adapter(model))
            working, (table, own) = working_model(runtime, model, tables, features=features, say=say)
        rehearsal = Rehearsal(replace(constant, table=table), say)
        return cls(settings, terms, model, working, Share.whole(own), SideWeights(working), rehearsal, features)

    def check(self, block: Block) -> None:
        """Refuse a block of which the engine cannot train the roles.

        Raises:
            InputError: which names the layer and the setting to change.
        """
        task = classification(self.terms)
        check_trainable(self.model, roles_of(block), self.terms.trainer, self.terms.adapter, first=block, task=task)

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
        training = local_training(trainer, rule, classification(terms), num_rounds=terms.num_rounds)
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


def classification(terms: Terms) -> TextClassification:
    """Return the task of the terms."""
    return TextClassification(tuple(terms.label_names), terms.label_weights)


def own_examples(settings: Settings, terms: Terms) -> LabelledText:
    """Read the device's own table.

    Raises:
        InputError: it cannot be read, has other labels than the terms, or is too large for the owner's delta.
    """
    data: LabelledText = build(settings.data.section(), "data", seed=terms.seed)
    if list(data.label_names) != terms.label_names:
        raise InputError(
            f"Expected the label names {terms.label_names} of the terms in data.labels, got {list(data.label_names)}"
        )
    if (data.pairs is not None) != terms.pairs:
        wanted, got = ("pairs", "single texts") if terms.pairs else ("single texts", "pairs")
        raise InputError(f"Expected rows of {wanted}, as the terms say, got {got}; set data.text_pair_column")
    if settings.privacy.epsilon is not None:
        check_delta(settings.privacy.delta, len(data))
    return data


def only_head(task: RoundRequest, enrolled: AdapterState | None) -> bool:
    """Return whether a round trains the head alone, on layers that are those of the base model, to the bit."""
    sent = {slot.role for slot in task.broadcast} | roles_of(task.block)
    if enrolled is None or sent != {HEAD} or task.side or enrolled.side:
        return False
    return not any(layer.lora_B.any() for layer in enrolled.factors().values())


def constant_rows(tokenizer: PreTrainedTokenizerBase, terms: Terms, *, num_long: int) -> Share:
    """Return a short row and as many of the largest length as are computed side by side; nobody's data."""
    texts = ("a", *["a " * terms.max_length] * num_long)
    labels = np.arange(len(texts)) % len(terms.label_names)
    pairs = texts if terms.pairs else None
    data = LabelledText(texts, labels, tuple(terms.label_names), None, "constant rows", pairs=pairs)
    share = Share.whole(tokenise(data, tokenizer, max_length=terms.max_length))
    largest = max(tokenizer.get_vocab().values(), default=0)
    return share if largest in tokenizer.all_special_ids else with_largest_id(share, largest)


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
        cache_prefix=own.cache_prefix,
        cache_dir=None,
        offline=True,
    )
