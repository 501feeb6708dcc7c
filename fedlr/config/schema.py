"""An experiment: its configuration, composed from YAML and checked whole before any work.

Hydra composes YAML files and overrides into one tree; here the tree becomes a typed, frozen `Experiment`. Whatever is
wrong with it is one `InputError` that names the key, the value and what is allowed.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedlr.config.folders import check_own, is_group, options, search_path
from fedlr.config.parts import named
from fedlr.config.rules import OF_EVERY_RUN
from fedlr.errors import InputError
from fedlr.errors.limits import check_limits, check_word
from fedlr.errors.messages import dotted_keys, first_problem, one_line, unknown_key, unknown_option
from fedlr.errors.ranges import LARGEST_GRAD_NORM, LEAST_GRAD_NORM, MAX_UPDATE_RATIO, MOST_ROWS, UnitName
from fedlr.methods.rate_schedule import CONSTANT
from fedlr.models.adapter_config import AdapterConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
AUTO = "auto"  # of a number that is found from public ones when a run is prepared (`fedlr.config.auto_rates`)


def folder_name(name: str) -> str:
    """Refuse a run's name that would be several folders, a hidden one, or none."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ValueError("at most 100 letters, digits, '_', '-' and '.', such as my-run")
    return name


def device_name(name: str) -> str:
    """Refuse what is no name of a processor that PyTorch computes on."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError("cpu, cuda, or one GPU of several such as cuda:1")
    return name


def number_or_share(value: float) -> float:
    """Refuse what is neither a number of rows nor a share of them."""
    if not (0 < value < 1 or (isinstance(value, int) and value >= 1)):
        raise ValueError("a number of rows, or a share of them between 0 and 1")
    return value


def as_many_as_there_are(value: Any) -> Any:
    """Return 0 for null: as many clients as the partition finds, or all in a round (`runs.prepare.with_clients_of`)."""
    if value == 0 and not isinstance(value, bool):
        raise ValueError("1 or more, or null: as many as there are")
    return 0 if value is None else value


def between(least: float, most: float) -> AfterValidator:
    """Return what refuses a number that is not between two others, with both in the message."""

    def check(number: float) -> float:
        if not least <= number <= most:
            raise ValueError(f"between {least:g} and {most:g}")
        return number

    return AfterValidator(check)


def label_names(weights: Any) -> Any:
    """Return weights of labels by name: 0 and true are the names "0" and "true", as in `fedlr.data.table`."""
    if not isinstance(weights, Mapping):
        return weights
    named = {str(k).lower() if isinstance(k, bool) else str(k): weight for k, weight in weights.items()}
    if len(named) < len(weights):
        raise ValueError("one weight for each label")
    return named


PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]  # of rounds, steps or clients
Threads = Annotated[int, Field(ge=1, le=1024)]
LabelWeights = Annotated[dict[str, PositiveFloat], BeforeValidator(label_names)]
Rate = Annotated[float, Field(gt=0, le=1), between(1e-7, 1)]  # below, Renyi divergences round to less than nothing
LrSchedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
IF_GIVEN = Field(exclude_if=lambda value: value is None)  # a later key: runs without it are written as before
LearningRate = Annotated[float, Field(allow_inf_nan=False), between(1e-12, 1e6)]


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
    num_test: Annotated[int | float, AfterValidator(number_or_share)] | None = None
    test_path: Annotated[str, Field(min_length=1)] | None = None
    test_split: Annotated[str, Field(min_length=1)] | None = None
    num_validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    validation_path: Annotated[str, Field(min_length=1)] | None = None
    validation_split: Annotated[str, Field(min_length=1)] | None = None
    label_weights: LabelWeights | None = None
    rows_per_client: Count | None = None  # declared: what everybody may know a client to have


class PrivacySection(Section):
    """Budgets over the whole run: `epsilon` of each client for its rows, `client_epsilon` of the server for whole
    clients.

    None of both is no privacy; of both there are two epsilons, which are never added.
    """

    epsilon: Annotated[float, Field(allow_inf_nan=False), between(1e-4, 1e6)] | None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: Annotated[float, Field(ge=LEAST_GRAD_NORM, le=LARGEST_GRAD_NORM)] = 1.0
    max_participations: Count | None = None
    noise_multiplier: PositiveFloat | None = None
    accountant: Literal["pld", "rdp"] = "pld"
    randomness: Literal["seeded", "os"] = "seeded"
    unit: UnitName = "example"
    rows_per_person: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    client_epsilon: Annotated[float, Field(allow_inf_nan=False), between(1e-4, 1e6)] | None = None
    client_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    client_max_norm: Annotated[float, Field(ge=LEAST_GRAD_NORM, le=LARGEST_GRAD_NORM)] = 1.0
    client_noise_multiplier: PositiveFloat | None = None
    release_noise: Literal["float", "grid"] = "float"
    mechanism: Literal["dp_sgd", "dp_ftrl"] = "dp_sgd"
    bands: Count | None = None
    ledger: Annotated[str, Field(min_length=1, exclude_if=lambda path: path is None)] | None = None  # of all runs
    ledger_epsilon: Annotated[float, Field(allow_inf_nan=False), between(1e-4, 1e6)] | None = None
    client_clip_quantile: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, IF_GIVEN] = None
    trials: Annotated[Annotated[float, Field(ge=1, le=1000)] | None, IF_GIVEN] = None  # of `fedlr tune`, on average
    trials_law: Annotated[Literal["geometric", "poisson"] | None, IF_GIVEN] = None
    trials_epsilon: Annotated[Annotated[float, between(1e-4, 1e6)] | None, IF_GIVEN] = None

    @property
    def rows_of_unit(self) -> int:
        """How many rows of one unit `epsilon` allows for: of a person several, of an example one."""
        return (self.rows_per_person or 1) if self.unit == "person" else 1

    @property
    def is_private(self) -> bool:
        """Whether there is a budget: of each client for its rows, of the server for its clients, or both."""
        return self.epsilon is not None or self.client_epsilon is not None


class TrainerSection(Section):
    """Local training: everything here is public and the same for every client."""

    num_steps: Count
    sample_rate: Rate
    divisor: Annotated[float, Field(allow_inf_nan=False), between(1e-9, 1e9)] | Literal["auto"]
    optimizer: Target
    # Left out where every round has the whole rate: the terms that devices are sent are then those of before.
    lr_schedule: Annotated[LrSchedule, Field(exclude_if=lambda name: name == CONSTANT)] = "constant"
    warmup_rounds: Annotated[int, Field(ge=0, le=1_000_000, exclude_if=lambda rounds: not rounds)] = 0
    after_noise: Target | None
    engine: Literal["fused", "opacus"]
    check_parity: bool
    grad_sample_mode: Literal["hooks", "ghost", "loop"]
    token_budget: PositiveInt

    def number_divisor(self) -> float:
        """Return the divisor of a run that is prepared.

        Raises:
            InputError: it is still auto.
        """
        if isinstance(self.divisor, str):
            raise InputError("Expected a number in trainer.divisor, got auto: it is found when a run is prepared")
        return self.divisor


class RuntimeSection(Section):
    """Where clients train: in this program, in Flower's simulation, or on devices behind a SuperLink."""

    kind: Literal["local", "flower", "superlink"]
    device: Annotated[str, AfterValidator(device_name)]
    num_workers: Threads
    num_processes: Threads
    memory_gb: PositiveFloat | None
    base_dtype: Literal["float32", "bfloat16"]
    matmul: Literal["auto", "mkl", "onednn"] = "mkl"  # in files from before there was a choice
    cache_prefix: bool
    cache_dir: Annotated[str, Field(min_length=1)] | None
    offline: bool


class DeploymentSection(Section):
    """How a server waits for devices, and where it finds them; read with runtime=superlink and runtime=flower."""

    superlink: Annotated[str, Field(pattern=r"^[^:/]+:\d{1,5}$")]
    root_certificates: str
    superexec_secret: str
    roster: str
    ledgers: Annotated[str, Field(min_length=1)] | None = None  # beside the roster
    min_updates: PositiveInt
    round_deadline_s: PositiveFloat
    grace_s: PositiveFloat | None = 60.0
    max_attempts: PositiveInt
    poll_s: PositiveFloat
    rehearsal: bool


class TrackingSection(Section):
    """What a run leaves behind."""

    output_dir: Annotated[str, Field(min_length=1)]
    checkpoint_every: PositiveInt | None
    evaluate_every: PositiveInt = 1
    run_no_privacy: bool
    run_alone: bool
    run_centralised: bool = False
    client_accuracy: bool = False
    no_privacy_lr: LearningRate | None = None
    alone_lr: LearningRate | None = None
    evaluate_on: Literal["test", "validation"] = "test"
    tracker: Literal["tensorboard", "wandb", "mlflow"] | None = None
    tuned: Annotated[str, Field(min_length=1, max_length=1000)] | None = None


class Experiment(Section):
    """The root of the configuration."""

    name: Annotated[str, AfterValidator(folder_name)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None
    num_rounds: Count
    num_clients: Annotated[int, BeforeValidator(as_many_as_there_are), Field(ge=0, le=1_000_000)]
    cohort_size: Annotated[int, BeforeValidator(as_many_as_there_are), Field(ge=0, le=1_000_000)]
    cohort: Literal["fixed", "poisson", "cyclic"] = "fixed"
    weighting: Literal["uniform", "examples"]
    max_update_ratio: Annotated[float, Field(ge=2, allow_inf_nan=False)] | None = MAX_UPDATE_RATIO
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    server_lr_schedule: LrSchedule = "constant"
    server_warmup_rounds: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    average_last: Annotated[int, Field(ge=1, le=100)] = 1
    release: Literal["last", "best"] = "last"
    patience: Count | None = None
    task: Target = Target(_target_="text_classification")  # as every run before there was a choice
    model: Target
    data: DataSection
    partition: Target
    adapter: AdapterConfig
    method: dict[str, Any]
    codec: Target = Target(_target_="none")  # as every run before there was a choice
    privacy: PrivacySection
    trainer: TrainerSection
    runtime: RuntimeSection
    tracking: TrackingSection
    deployment: DeploymentSection

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
    parsed = parse_overrides(overrides)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            found = [composable(override) for override in parsed]
            config = compose("config", overrides=[search_path(CONFIGS), *found])
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise InputError(f"Expected a value for {missing[0]}, got none: add {missing[0]}=...")
        tree = OmegaConf.to_container(config, resolve=True)
    except (RecursionError, OverflowError, MemoryError, UnicodeError) as error:  # of Hydra's parser, whatever it meets
        raise InputError(
            f"Expected overrides that can be parsed, got {type(error).__name__}: {one_line(error)[:120]}"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        text = one_line(error).replace("ConfigKeyError raised while composing config: ", "")
        raise InputError(f"Expected overrides that fit the configuration, got an error: {text}") from error
    assert isinstance(tree, dict)
    tree.pop("experiment", None)
    experiment = check_experiment({str(key): value for key, value in tree.items()})
    chosen = {o.get_value_element_as_str() for o in parsed if o.key_or_group == "privacy"}
    epsilon = experiment.privacy.epsilon
    if "none" in chosen and experiment.privacy.client_epsilon is not None:
        raise InputError("Expected privacy=client with privacy.client_epsilon, got privacy=none: choose one of them")
    if (epsilon is not None and "none" in chosen) or (epsilon is None and "dp" in chosen):
        raise InputError(
            f"Expected a budget with privacy=dp and none with privacy=none, got privacy.epsilon={epsilon} from an "
            "override or from the experiment's own file, which overrules the choice: remove it"
        )
    return experiment


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Parse command-line words.

    Raises:
        InputError: for a word that is no KEY=VALUE, and for an option that its group does not have.
    """
    parser = OverridesParser.create()
    found = []
    for text in texts:
        check_word(text)
        try:
            override = parser.parse_overrides([text])[0]
        except HydraException as error:
            raise InputError(
                f"Expected KEY=VALUE, got {text!r} (put quotes around a value with spaces or special signs, such as "
                """'name="a b"')"""
            ) from error
        if not isinstance(override.key_or_group, str) or not override.key_or_group:
            raise InputError(f"Expected KEY=VALUE, got {text!r}, which names no key")
        if override.key_or_group.partition(".")[0] == "hydra" or override.package is not None:
            raise InputError(unknown_key(override.get_key_element().lstrip("+~"), Experiment.model_fields))
        check_option(override)
        found.append(override)
    return found


def check_option(override: Override) -> None:
    """Refuse a choice that is not in the folder of its group; all choices of a sweep are looked at."""
    group = override.key_or_group
    if not is_group(group, CONFIGS) or override.is_delete():
        return
    known = options(group, CONFIGS)
    swept = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
    for choice in swept:
        if choice not in known and (choice, group) != ("null", "experiment"):
            raise InputError(unknown_option(group, choice, known))
        check_own(group, choice, CONFIGS)


def composable(override: Override) -> str:
    """Return an override as Hydra takes it, all keys allowed: unknown ones are found later, with better hints."""
    if override.is_sweep_override():
        key, _, value = str(override.input_line).partition("=")
        raise InputError(
            f"Expected one value, got several in {override.input_line}: write a list as {key}=[{value}]; -m runs one "
            "after the other"
        )
    text = str(override.input_line).lstrip("+")
    return text if is_group(override.key_or_group, CONFIGS) or override.is_delete() else f"++{text}"


def check_experiment(tree: Mapping[str, Any]) -> Experiment:
    """Turn a plain tree into an `Experiment`, with every rule that spans several keys.

    Raises:
        InputError: for the first value that is wrong, by itself or beside others.
    """
    check_limits(tree)
    tree = named(tree)
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise InputError(first_problem(error, tree, known=known_keys(tree))) from error
    if not experiment.cohort_size:
        experiment = experiment.model_copy(update={"cohort_size": experiment.num_clients})
    OF_EVERY_RUN.check(experiment)
    return experiment


def known_keys(tree: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys that the configuration may have, apart from those of a `_target_` of its own."""
    schema = [
        f"{name}.{key}"
        for name, field in Experiment.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
        if key != "target"
    ]
    wrong = set(tree) - set(Experiment.model_fields)
    composed = [key for key in dotted_keys(tree) if key.partition(".")[0] not in wrong]
    unique = dict.fromkeys([*Experiment.model_fields, *schema, *composed])
    return [key for key in unique if not key.startswith("experiment")]
