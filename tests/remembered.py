"""Hydra's composition, with what depends on the chosen files alone remembered for a whole run of tests.

Hydra reads and merges some twenty YAML files for each experiment, about 0.1 s, and the tests compose some thousand of
them out of a few dozen choices. Here files are merged once a choice; values (`++key=value`) are then put in by Hydra's
own code, on a copy. Whatever fails is composed again by Hydra alone, so that every error is its own. A file of another
choice is parsed once (`RememberedFiles`). What is remembered is kept pickled, in memory: to read it takes a quarter of
what `deepcopy` of OmegaConf's nodes does.
"""

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

import fedlr.config.schema
from fedlr.config.folders import folders

Compose = Callable[..., DictConfig]


def file_source() -> type[FileConfigSource]:
    """Return the class that Hydra reads files by: its first look for plugins makes another one of the same name."""
    Plugins.instance()
    return vars(sys.modules[FileConfigSource.__module__])["FileConfigSource"]  # type: ignore[no-any-return]


class RememberedComposition:
    """Takes the place of `fedlr.config.schema.compose`."""

    def __init__(self, compose: Compose) -> None:
        self._compose = compose
        self._chosen: dict[tuple[object, ...], bytes] = {}

    def __call__(self, config_name: str, overrides: Sequence[str]) -> DictConfig:
        """Return what Hydra composes."""
        values = [text for text in overrides if text.startswith("++")]
        choices = tuple(text for text in overrides if not text.startswith("++"))
        if any(text.startswith("~") for text in choices):
            return self._compose(config_name, overrides=list(overrides))
        key = (*map(files_of, folders(fedlr.config.schema.CONFIGS)), *choices)
        try:
            if key not in self._chosen:
                self._chosen[key] = pickle.dumps(self._compose(config_name, overrides=list(choices)))
            config = pickle.loads(self._chosen[key])
            ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
        except Exception:
            return self._compose(config_name, overrides=list(overrides))
        return config


class RememberedFiles:
    """Takes the place of `FileConfigSource.load_config`: a file that did not change is parsed once."""

    def __init__(self, load: Callable[[FileConfigSource, str], ConfigResult]) -> None:
        self._load = load
        self._read: dict[tuple[object, ...], bytes] = {}

    def __get__(self, source: FileConfigSource, kind: type) -> Callable[[str], ConfigResult]:
        return lambda config_path: self(source, config_path)

    def __call__(self, source: FileConfigSource, config_path: str) -> ConfigResult:
        """Return what Hydra reads."""
        path = os.path.join(source.path, source._normalize_file_name(config_path))
        try:
            stat = os.stat(path)
        except OSError:
            return self._load(source, config_path)
        key = (source.provider, source.path, config_path, stat.st_mtime_ns, stat.st_size)
        if key not in self._read:
            self._read[key] = pickle.dumps(self._load(source, config_path))
        return pickle.loads(self._read[key])  # type: ignore[no-any-return]


def files_of(folder: Path) -> tuple[object, ...]:
    """Return what changes when a file below a folder does."""
    stats = [(path, path.stat()) for path in sorted(folder.rglob("*.yaml"))]
    return (folder, *((path.name, stat.st_mtime_ns, stat.st_size) for path, stat in stats))
