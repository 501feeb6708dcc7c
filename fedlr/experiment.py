"""An experiment: its configuration, composed from YAML and checked whole before any work.

Hydra composes YAML files and overrides into one tree; here the tree becomes a typed, frozen `Experiment`. Whatever is
wrong with it is one `InputError` that names the key, the value and what is allowed.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlr.errors import InputError
from fedlr.models import AdapterConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions, no changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Target(Section):
    """A section that names a callable in `_target_`; the other keys are its arguments, checked by `build`."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    target: str = Field(alias="_target_")

    def section(self) -> dict[str, Any]:
        """Return `_target_` and its arguments, as `build` takes them."""
        return {"_target_": self.target, **(self.model_extra or {})}


class DataSection(Target):
    """Where the examples come from, and what may be said of them."""

    public: bool
    max_length: PositiveInt
    num_test: PositiveInt


class PrivacySection(Section):
    """The budget of each client over the whole run; `epsilon: null` is no privacy."""

    epsilon: PositiveFloat | None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: PositiveFloat = 1.0
    max_participations: PositiveInt | None = None
    noise_multiplier: PositiveFloat | None = None
    accountant: Literal["pld", "rdp"] = "pld"
    randomness: Literal["seeded", "os"] = "seeded"


class TrainerSection(Section):
    """Local training: everything here is public and the same for every client."""

    num_steps: PositiveInt
    sample_rate: Rate
    divisor: PositiveFloat
    optimizer: Target
    grad_sample_mode: Literal["hooks", "ghost", "loop"]
    token_budget: PositiveInt


class RuntimeSection(Section):
    """Where clients train."""

    num_workers: PositiveInt
    cache_prefix: bool
    offline: bool


class TrackingSection(Section):
    """What a run leaves behind."""

    output_dir: str
    run_no_privacy: bool
    run_alone: bool


class Experiment(Section):
    """The root of the configuration."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None
    num_rounds: PositiveInt
    num_clients: PositiveInt
    cohort_size: PositiveInt
    weighting: Literal["uniform", "examples"]
    model: Target
    data: DataSection
    partition: Target
    adapter: AdapterConfig
    method: dict[str, Any]
    privacy: PrivacySection
    trainer: TrainerSection
    runtime: RuntimeSection
    tracking: TrackingSection

    @property
    def max_participations(self) -> int:
        """Rounds that one client may train in."""
        return self.privacy.max_participations or self.num_rounds

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain values, as it is written next to the results."""
        return self.model_dump(by_alias=True)


def compose_experiment(overrides: Sequence[str]) -> Experiment:
    """Compose the YAML groups with command-line overrides into a checked experiment.

    Raises:
        InputError: for an unknown key, group or option, a wrong type, or a value out of range.
    """
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("config", overrides=list(overrides))
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)) from error
    assert isinstance(tree, dict)
    tree.pop("experiment", None)
    return check_experiment({str(key): value for key, value in tree.items()})


def check_experiment(tree: Mapping[str, Any]) -> Experiment:
    """Turn a plain tree into an `Experiment`, with every rule that spans several keys."""
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error
    e = experiment
    if e.cohort_size > e.num_clients:
        raise InputError(f"Expected cohort_size <= num_clients={e.num_clients}, got {e.cohort_size}")
    if e.max_participations > e.num_rounds:
        raise InputError(
            f"Expected privacy.max_participations <= num_rounds={e.num_rounds}, got {e.max_participations}"
        )
    if e.max_participations * e.num_clients < e.num_rounds * e.cohort_size:
        raise InputError(
            f"Expected privacy.max_participations >= {-(-e.num_rounds * e.cohort_size // e.num_clients)} so that "
            f"{e.num_clients} clients can fill {e.num_rounds} rounds of {e.cohort_size}, got {e.max_participations}"
        )
    if e.weighting == "examples" and not e.data.public and e.privacy.epsilon is not None:
        raise InputError(
            "Expected weighting=uniform, got 'examples': weights by size reveal whether one row is present; "
            "if sizes are public knowledge, say data.public=true"
        )
    if e.privacy.randomness == "os" and e.seed is not None:
        raise InputError(
            f"Expected seed=null with privacy.randomness=os, got seed={e.seed}: noise that a seed can "
            "repeat can be subtracted"
        )
    return experiment


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Turn an error of the configuration library into one line that names the value and what is allowed."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__).split()) if error.__cause__ else ""
    if "is not in struct" in cause or "is not in struct" in text:
        for override in overrides:
            key = override.lstrip("+~").split("=", 1)[0]
            if key and key in text:
                return unknown_key(key, all_keys())
    if "Could not find" in text or "Could not override" in text or "No match in the defaults" in text:
        text = text.split(" Config search path:")[0].replace("Available options in", "; options of")
    return f"Expected a configuration that can be composed: {text}"


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that a key does not exist, with the nearest ones that do."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or list(known)[:8]
    return f"Expected a known key, got {key!r}; did you mean {' or '.join(near)}?"


def all_keys() -> list[str]:
    """Return the dotted keys of the default configuration."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config")
    return list(_dotted(config))


def first_problem(error: ValidationError, *, prefix: str = "") -> str:
    """Render the first problem that validation found: key, value and what is allowed."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in [*([prefix] if prefix else []), *problem["loc"]])
    if problem["type"] == "extra_forbidden":
        return f"Expected a known key, got {where!r}"
    if problem["type"] == "missing":
        return f"Expected a value for {where}, got none"
    wanted = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    got = json.dumps(problem["input"], default=repr)
    return f"Expected {where} to be {wanted}, got {got}"


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return [prefix]
    inner = [key for k in node for key in _dotted(node._get_node(k), f"{prefix}.{k}" if prefix else str(k))]
    return [prefix, *inner] if prefix else inner
