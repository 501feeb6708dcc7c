"""`client.yaml`: what one device is, holds and allows. Nothing in it comes from a server, or is sent to one.

Relative paths are relative to the file. A key that is wrong is one `InputError` that names it (docs/client_yaml.md).
"""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, ValidationError
from yaml import YAMLError

from fedlr.client.owner_limits import MODELS_OF_TASK, TASK_OF_DATA, Policy
from fedlr.config.parts import name_of
from fedlr.config.schema import PositiveFloat, PositiveInt, Section, Target, device_name
from fedlr.data.multilabel import declared_labels
from fedlr.data.values import named
from fedlr.errors import InputError
from fedlr.errors.messages import dotted, first_problem, one_line, shown
from fedlr.errors.ranges import require_delta
from fedlr.flower.addresses import host_and_port
from fedlr.flower.node_key import require_private
from fedlr.flower.task_terms import WITH_CLASSES, TaskName
from fedlr.privacy.ledger import PrivacyLedger
from fedlr.privacy.mechanism import PrivacyBudget

FOLDER_MODE = 0o700
Text = Annotated[str, Field(min_length=1, max_length=200)]


def server_address(address: str) -> str:
    """Refuse what is not HOST:PORT."""
    try:
        host_and_port(address)
    except InputError as error:
        raise ValueError("HOST:PORT without https://, such as fl.example.org:8443") from error
    return address


class ServerSection(Section):
    """Where the server is, and how the two know each other."""

    address: Annotated[str, AfterValidator(server_address)]
    root_certificates: Path
    private_key: Path


class PrivacySection(Section):
    """What may be spent on this device's data over the life of its ledger; `epsilon: null` is no privacy."""

    epsilon: PositiveFloat | None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accountant: Literal["pld", "rdp"] = "pld"
    randomness: Literal["os", "seeded"] = "os"


class RuntimeSection(Section):
    """Where this device trains."""

    device: Annotated[str, AfterValidator(device_name)] = "cpu"
    num_workers: PositiveInt = 1
    cache_prefix: bool = False
    matmul: Literal["auto", "mkl", "onednn"] = "auto"


class Settings(Section):
    """The root of `client.yaml`."""

    server: ServerSection
    name: Text
    state_dir: Path
    dataset_id: Text
    model: Target
    data: Target
    privacy: PrivacySection
    policy: Policy
    runtime: RuntimeSection = RuntimeSection()

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels, in their order: from the file, never from the data."""
        if self.task == "text_multilabel":  # whose labels are outputs, and no row is of one
            return ()
        section = self.data.section()
        return tuple(named(label) for label in section.get("labels") or section.get("label_groups") or ())

    @property
    def task(self) -> TaskName | None:
        """The task that the data are for; None where a function of the owner's own reads them."""
        return TASK_OF_DATA.get(name_of(self.data.target, "data"))

    @property
    def output_names(self) -> tuple[str, ...]:
        """What the outputs of the model's head stand for, in their order."""
        if self.task == "text_multilabel":
            return declared_labels(self.data.section().get("labels"))
        return ("score",) if self.task == "text_regression" else self.label_names

    @property
    def ledger_path(self) -> Path:
        """The ledger of everything that was ever spent on this device's data."""
        return self.state_dir / "ledger.jsonl"

    @property
    def experiments_dir(self) -> Path:
        """What was agreed and released, a folder an experiment."""
        return self.state_dir / "experiments"

    def budget(self) -> PrivacyBudget | None:
        """Return the budget; None without privacy."""
        privacy = self.privacy
        return None if privacy.epsilon is None else PrivacyBudget(privacy.epsilon, privacy.delta)

    def open_ledger(self) -> PrivacyLedger | None:
        """Open and verify this device's ledger; None without privacy.

        Raises:
            InputError: it is missing, which is never a budget of which nothing is spent; it was changed; or it belongs
                to another budget or other data.
        """
        budget = self.budget()
        if budget is None:
            return None
        if not self.ledger_path.exists():
            raise InputError(
                f"Expected this device's ledger in {self.ledger_path}, got none; a missing ledger is not an unspent "
                "budget: restore it, or on a device that never trained on these data make one with `fedlr client init`"
            )
        p = self.privacy
        return PrivacyLedger.open(
            self.ledger_path, budget, dataset_id=self.dataset_id, randomness=p.randomness, accountant=p.accountant
        )


def load_settings(path: Path) -> Settings:
    """Read and check `client.yaml`; neither data nor model nor ledger are touched.

    Raises:
        InputError: for the first thing that is wrong with it, or with the files it names.
    """
    tree = absolute(read_yaml(path), path.resolve().parent)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error, tree, known=list(known_keys(Settings)))}") from error
    try:
        check_consistent(settings)
        check_files(settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:  # a folder that may not be entered
        raise InputError(f"{path}: Expected files that can be looked at, got {error}") from error
    return settings


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file with plain values; `${oc.env:NAME}` stands for a variable of the environment."""
    try:
        config = OmegaConf.load(path)
        missing = sorted(OmegaConf.missing_keys(config))
        tree = OmegaConf.to_container(config, resolve=True)
    except OSError as error:
        raise InputError(
            f"Expected a device's settings in {path}, got {error.strerror}; client/example.yaml is a start"
        ) from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise InputError(
            f"Expected {path} to be YAML with sections of keys, got an error: {one_line(error)}"
        ) from error
    if missing or not isinstance(tree, dict):
        raise InputError(f"{path}: Expected a value for {missing[0]}, got none" if missing else f"{path} is no section")
    return {str(key): value for key, value in tree.items()}


def absolute(tree: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tree with its paths absolute; names of models that are no folders stay as they are."""
    found = dict(tree)
    if isinstance(server := tree.get("server"), Mapping):
        files = {key: _path(server[key], folder) for key in ("root_certificates", "private_key") if key in server}
        found["server"] = {**server, **files}
    if "state_dir" in tree:
        found["state_dir"] = _path(tree["state_dir"], folder)
    data, model = tree.get("data"), tree.get("model")
    if isinstance(data, Mapping) and isinstance(data.get("path"), str):
        found["data"] = {**data, "path": str(_path(data["path"], folder))}  # never the name of a data set on a hub
    if isinstance(model, Mapping) and isinstance(name := model.get("name_or_path"), str):
        local = Path(_path(name, folder))
        is_local = name.startswith((".", "/", "~")) or local.is_dir()
        found["model"] = {**model, "name_or_path": str(local) if is_local else name}
    return found


def check_consistent(settings: Settings) -> None:
    """Refuse settings that contradict each other."""
    privacy, policy, section = settings.privacy, settings.policy, settings.data.section()
    check_model_and_data(settings)
    names = settings.label_names
    tasks = policy.allowed_tasks if settings.task is None else [settings.task]
    if not set(tasks) & set(WITH_CLASSES):
        if names:
            raise InputError(f"Expected no data.labels for rows without classes, got {shown(list(names))}")
    elif not isinstance(section.get("labels") or [], list) or len(set(names)) < max(2, len(names)) or "" in names:
        raise InputError(
            "Expected data.labels to be two or more different names, as names that are found in data tell what they "
            f"hold, got {shown(section.get('labels'))}"
        )
    if privacy.epsilon is not None:
        require_delta(privacy.delta, privacy.accountant)
    if privacy.epsilon is None and not policy.allow_no_privacy:
        raise InputError(
            "Expected policy.allow_no_privacy=true with privacy.epsilon=null, got false: without a budget everything "
            "that leaves may reveal the data, so it is said twice"
        )
    if privacy.epsilon is not None and policy.allow_no_privacy:
        raise InputError(
            f"Expected policy.allow_no_privacy=false with privacy.epsilon={privacy.epsilon:g}, got true: a round "
            "without noise would spend more than any budget"
        )
    if privacy.randomness == "seeded" and not policy.allow_seeded_randomness:
        raise InputError(
            "Expected privacy.randomness=os, got 'seeded': whoever knows the seed can subtract the noise; for a "
            "simulation on data of no one's, set policy.allow_seeded_randomness=true as well"
        )


def check_model_and_data(settings: Settings) -> None:
    """Refuse a model that cannot read such data, and a task that the policy does not allow."""
    task, data = settings.task, settings.data.target
    if task is None:
        return
    model, fitting = name_of(settings.model.target, "model"), MODELS_OF_TASK[task]
    if model in sum(MODELS_OF_TASK.values(), ()) and model not in fitting:
        raise InputError(f"Expected model._target_ to be {fitting[0]} with data._target_={data}, got {model}")
    if task not in settings.policy.allowed_tasks:
        raise InputError(
            f"Expected policy.allowed_tasks to hold {task}, which data._target_={data} is for, got "
            f"{shown(settings.policy.allowed_tasks)}: without it this device refuses everything"
        )
    if task == "causal_lm" and settings.runtime.cache_prefix:
        raise InputError(f"Expected runtime.cache_prefix=false with data._target_={data}, got true")


def check_files(settings: Settings) -> None:
    """Refuse secrets that others may read, files that are missing, and a state folder that is not this user's alone."""
    server, folder = settings.server, settings.state_dir
    if not server.root_certificates.is_file():
        raise InputError(f"Expected root certificates in {server.root_certificates}, got no file; ask for ca.crt")
    require_private(server.private_key)
    _require_owner(server.private_key)
    if folder.exists():
        if not folder.is_dir():
            raise InputError(f"Expected state_dir to be a folder, got the file {folder}")
        if (mode := stat.S_IMODE(folder.stat().st_mode)) & 0o077:
            raise InputError(
                f"Expected state_dir to be open to its owner only, got mode {mode:04o}; chmod 700 {folder}"
            )
        _require_owner(folder)


def known_keys(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """Return every dotted key of a section and of the sections in it."""
    for name, field in kind.model_fields.items():
        key = dotted(prefix, name)
        yield key
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            if not issubclass(field.annotation, Target):
                yield from known_keys(field.annotation, key)


def _path(value: Any, folder: Path) -> Any:
    return folder / Path(value).expanduser() if isinstance(value, str) and value else value


def _require_owner(path: Path) -> None:
    if path.stat().st_uid != os.getuid():
        raise InputError(
            f"Expected {path} to belong to the user that runs the client (uid {os.getuid()}), got uid "
            f"{path.stat().st_uid}; chown it"
        )
