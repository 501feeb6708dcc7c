"""The terms of an experiment: all that a device must know of a configuration before it trains, and nothing else.

The server writes them once; they are the same for every device and every round. A device checks them against its own
policy and agrees to the whole or refuses it. What the data are called, where they lie and what may be spent on them is
the device's own (client/settings.py); how updates are aggregated is the server's.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedlr.config.build import build_codec
from fedlr.config.old_names import OLD_NAMES
from fedlr.config.parts import CODECS, RULES_OF_PROTOCOL, TARGET
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
from fedlr.flower.task_terms import WITH_CLASSES, Sha256, TaskName, TaskTerms, task_of_terms
from fedlr.methods.codecs.codec import NONE, Codec
from fedlr.models.adapter_config import AdapterConfig
from fedlr.privacy.grid import ReleaseNoise
from fedlr.privacy.mechanism import Mechanism
from fedlr.tasks.task import Task

Name = Annotated[str, Field(min_length=1, max_length=200)]


class MechanismTerms(Section):
    """What noise a private step adds, and to what (`fedlr.privacy.mechanism.Mechanism`); and at which delta, or a
    smaller one, a device says what it has spent."""

    noise_multiplier: PositiveFloat
    max_grad_norm: PositiveFloat
    sample_rate: Rate
    divisor: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=1)]
    release_noise: Annotated[ReleaseNoise, Field(exclude_if=lambda kind: kind == "float")] = "float"


class Terms(Section):
    """What a server asks of every device; `mechanism: null` is training without privacy."""

    protocol: Literal[1] = 1
    experiment_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    name: Name
    num_rounds: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # of what is public: the head's start
    model_sha256: Sha256  # of the base model with its head
    # What does not apply is left out: terms of a text classification, and their hash, are those of the first release.
    label_names: Annotated[list[Name], Field(max_length=10_000, exclude_if=lambda names: not names)] = []
    label_weights: Annotated[LabelWeights | None, Field(exclude_if=lambda weights: weights is None)] = None
    max_length: PositiveInt
    pairs: Annotated[bool, Field(exclude_if=lambda pairs: not pairs)] = False  # rows of two texts
    adapter: AdapterConfig
    trainer: TrainerSection
    client_rule: Target | None
    mechanism: MechanismTerms | None
    randomness: Literal["seeded", "os"]
    # Of which devices of earlier releases know none; None: an update travels as it is.
    codec: Annotated[Target | None, Field(exclude_if=lambda codec: codec is None)] = None
    task: Annotated[TaskTerms | None, Field(exclude_if=lambda task: task is None)] = None  # None: text_classification

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

    @field_validator("codec")
    @classmethod
    def _is_of_the_release(cls, value: Target | None, info: ValidationInfo) -> Target | None:
        if value is not None and value.target not in CODECS:  # compared as text: nothing a server names is imported
            raise ValueError(f"one of {', '.join(CODECS)}, or null")
        return value

    @model_validator(mode="after")
    def _names_what_the_task_has(self) -> Self:
        if (len(self.label_names) < 2) if self.task_name in WITH_CLASSES else bool(self.label_names):
            how_many = "two or more" if self.task_name in WITH_CLASSES else "no"
            raise ValueError(f"a section with {how_many} label_names for task {self.task_name}")
        if self.pairs and self.task_name not in ("text_classification", "text_multilabel", "text_regression"):
            raise ValueError(f"a section without pairs for task {self.task_name}")
        return self

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
        task: TaskTerms | None = None,
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
            mechanism=None if mechanism is None else MechanismTerms(**mechanism.constants(), delta=e.privacy.delta),
            randomness=e.privacy.randomness,
            codec=None if e.codec.target == NONE else e.codec,
            task=task,
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
            problem = first_problem(error, _plain(text), prefix="terms")
            raise InputError(f"Expected the terms of an experiment: {problem}") from error

    def text(self) -> str:
        """Return the terms as JSON, always the same for the same terms."""
        return self.model_dump_json(by_alias=True)

    def sha256(self) -> str:
        """Return the SHA-256 of `text`: what two parties compare."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    @property
    def task_name(self) -> TaskName:
        """The name of the task."""
        return "text_classification" if self.task is None else self.task.name

    def built_task(self) -> Task:
        """Return the task: the server's, made anew."""
        return task_of_terms(self.task, self.label_names, self.label_weights)

    def built_codec(self) -> Codec | None:
        """Return what updates travel through; None: nothing.

        Raises:
            InputError: arguments that the codec does not take.
        """
        return None if self.codec is None else build_codec(self.codec)

    def private_steps(self) -> Mechanism | None:
        """Return the mechanism of every step; None without privacy."""
        return None if self.mechanism is None else Mechanism(**self.mechanism.model_dump(exclude={"delta"}))

    def announced_steps(self) -> int:
        """Return how many private steps a device is told to expect at most, over all rounds."""
        return min(self.num_rounds * self.trainer.num_steps, MOST_STEPS)

    def section(self) -> dict[str, Any]:
        """Return the terms as plain values."""
        return self.model_dump(by_alias=True)


def _plain(text: str) -> Any:
    """Return JSON as plain values, to name a key and its value; of what is none, or too deep to be written, nothing."""
    try:
        tree = json.loads(text)
        json.dumps(tree)
    except (ValueError, RecursionError):
        return {}
    return tree


def _as_protocol_1(rule: Target | None) -> Target | None:
    """Return a rule under the name that devices of every release know it by."""
    if rule is None:
        return None
    names = {OLD_NAMES[old]: old for old in RULES_OF_PROTOCOL}
    return Target.model_validate({**rule.section(), TARGET: names.get(rule.target, rule.target)})
