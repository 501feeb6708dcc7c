"""The terms of an experiment: all that a device must know of a configuration before it trains, and nothing else.

The server writes them once; they are the same for every device and every round. A device checks them against its own
policy and agrees to the whole or refuses it. What the data are called, where they lie and what may be spent on them is
the device's own (client/settings.py); how updates are aggregated is the server's.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from fedlr.config.old_names import OLD_NAMES
from fedlr.config.parts import RULES_OF_PROTOCOL, TARGET
from fedlr.config.schema import (
    AUTO,
    Experiment,
    LabelWeights,
    PositiveFloat,
    PositiveInt,
    Rate,
    Section,
    Target,
    TrainerSection,
)
from fedlr.errors import InputError
from fedlr.errors.messages import first_problem
from fedlr.errors.ranges import MOST_STEPS
from fedlr.models.adapter_config import AdapterConfig
from fedlr.privacy.mechanism import Mechanism

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class MechanismTerms(Section):
    """What noise a private step adds, and to what (`fedlr.privacy.mechanism.Mechanism`); and at which delta, or a
    smaller one, a device says what it has spent."""

    noise_multiplier: PositiveFloat
    max_grad_norm: PositiveFloat
    sample_rate: Rate
    divisor: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=1)]


class Terms(Section):
    """What a server asks of every device; `mechanism: null` is training without privacy."""

    protocol: Literal[1] = 1
    experiment_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    name: Name
    num_rounds: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # of what is public: the head's start
    model_sha256: Sha256  # of the base model with its head
    label_names: Annotated[list[Name], Field(min_length=2, max_length=10_000)]
    # Weights and pairs are left out where there are none: the terms, and their hash, are then those of before.
    label_weights: Annotated[LabelWeights | None, Field(exclude_if=lambda weights: weights is None)] = None
    max_length: PositiveInt
    pairs: Annotated[bool, Field(exclude_if=lambda pairs: not pairs)] = False  # rows of two texts
    adapter: AdapterConfig
    trainer: TrainerSection
    client_rule: Target | None
    mechanism: MechanismTerms | None
    randomness: Literal["seeded", "os"]

    @field_validator("label_weights")
    @classmethod
    def _are_of_labels(cls, value: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        if not set(value or ()) <= set(info.data.get("label_names", ())):
            raise ValueError("weights of labels that label_names has")
        return value

    @field_validator("adapter")
    @classmethod
    def _needs_no_examples(cls, value: AdapterConfig) -> AdapterConfig:
        if value.public is not None or value != value.given_to_devices():
            raise ValueError("an adapter that a device can build: starts made by the server are given when it enrols")
        return value

    @field_validator("trainer")
    @classmethod
    def _has_numbers(cls, value: TrainerSection) -> TrainerSection:
        if AUTO in (value.divisor, value.optimizer.section().get("lr")):
            raise ValueError("numbers in divisor and optimizer.lr: auto is found by the server, and sent as a number")
        return value

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        mechanism: Mechanism | None,
        *,
        experiment_id: str,
        seed: int,
        model_sha256: str,
        label_names: Sequence[str],
        pairs: bool = False,
    ) -> Self:
        """Return the terms of an experiment."""
        e, rule = experiment, experiment.method.get("client")
        return cls(
            experiment_id=experiment_id,
            name=e.name,
            num_rounds=e.num_rounds,
            seed=seed,
            model_sha256=model_sha256,
            label_names=list(label_names),
            label_weights=e.data.label_weights,
            max_length=e.data.max_length,
            pairs=pairs,
            adapter=e.adapter.given_to_devices(),
            trainer=e.trainer.model_copy(update={"after_noise": _as_protocol_1(e.trainer.after_noise)}),
            client_rule=_as_protocol_1(None if rule is None else Target.model_validate(rule)),
            mechanism=None if mechanism is None else MechanismTerms(**vars(mechanism), delta=e.privacy.delta),
            randomness=e.privacy.randomness,
        )

    @classmethod
    def read(cls, text: str) -> Self:
        """Read terms from JSON.

        Raises:
            InputError: for anything that is not exactly of this form; the text names the key.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InputError(
                f"Expected the terms of an experiment: {first_problem(error, {}, prefix='terms')}"
            ) from error

    def text(self) -> str:
        """Return the terms as JSON, always the same for the same terms."""
        return self.model_dump_json(by_alias=True)

    def sha256(self) -> str:
        """Return the SHA-256 of `text`: what two parties compare."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def private_steps(self) -> Mechanism | None:
        """Return the mechanism of every step; None without privacy."""
        return None if self.mechanism is None else Mechanism(**self.mechanism.model_dump(exclude={"delta"}))

    def announced_steps(self) -> int:
        """Return how many private steps a device is told to expect at most, over all rounds."""
        return min(self.num_rounds * self.trainer.num_steps, MOST_STEPS)

    def section(self) -> dict[str, Any]:
        """Return the terms as plain values."""
        return self.model_dump(by_alias=True)


def _as_protocol_1(rule: Target | None) -> Target | None:
    """Return a rule under the name that devices of every release know it by."""
    if rule is None:
        return None
    names = {OLD_NAMES[old]: old for old in RULES_OF_PROTOCOL}
    return Target.model_validate({**rule.section(), TARGET: names.get(rule.target, rule.target)})
