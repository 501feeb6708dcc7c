"""What the tests compose from memory is what Hydra composes, value by value and error by error.

Mutants this file kills: a choice that is remembered for another, a memory that an earlier value changed; a file that is
remembered for another, or for what it was before.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlr.config.schema import CONFIGS
from tests import remembered
from tests.training.small_models import mutant

FileConfigSource = remembered.file_source()
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
VALUES = [
    "++num_rounds=7",
    "++privacy.epsilon=3",
    "++trainer.optimizer.lr=0.25",
    "++adapter.targets=[query]",
    "++new.k=1",
]
WORDS = [
    [],
    *([f"experiment={name}", *VALUES] for name in EXPERIMENTS),
    ["experiment=tiny"],
    ["experiment=tiny", "method=ffa_lora", "privacy=none"],
    ["privacy=none", "++num_rounds=2", "experiment=tiny", "method=ffa_lora", "++num_rounds=3"],
    ["experiment=tiny", "~privacy.epsilon", "++num_rounds=2"],
    ["experiment=tiny", "++data={path: x}"],
    ["experiment=tiny", "++name=${seed}"],
    ["experiment=tiny", "++privacy.epsilon.below=1"],
    ["experiment=tiny", "method={a: 1}"],
    ["experiment=nowhere", "++num_rounds=2"],
]


def composed(make: Callable, words: list[str]) -> tuple[object, object]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = make("config", overrides=words)
        except (HydraException, OmegaConfBaseException) as error:
            return type(error), str(error)
    return OmegaConf.to_container(config, resolve=True), OmegaConf.missing_keys(config)


def check_it_composes_as_hydra(module: ModuleType) -> None:
    make = module.RememberedComposition(compose)
    for index in (*range(len(WORDS)), *range(len(WORDS))):
        assert composed(make, WORDS[index]) == of_hydra(index)


@cache
def of_hydra(index: int) -> tuple[object, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileConfigSource, "load_config", FileConfigSource.__dict__["load_config"]._load)
        return composed(compose, WORDS[index])


def test_what_is_remembered_is_what_hydra_composes() -> None:
    check_it_composes_as_hydra(remembered)


@pytest.mark.parametrize(
    "change",
    [
        [('not text.startswith("++"))\n', 'not text.startswith("++"))[:1]\n')],
        [("pickle.dumps(self._compose(", "(self._compose("), ("pickle.loads(self._chosen[key])", "self._chosen[key]")],
    ],
    ids=["remembered for another", "changed in memory"],
)
def test_a_wrong_memory_is_seen(change: list[tuple[str, str]]) -> None:
    with pytest.raises(AssertionError):
        check_it_composes_as_hydra(mutant(remembered, *change))


def check_files_are_read_as_they_are(module: ModuleType, folder: Path) -> None:
    source = FileConfigSource("test", f"file://{folder}")
    read = module.RememberedFiles(FileConfigSource.__dict__["load_config"]._load)
    for time, text in enumerate(("a: 1", "a: 2", "{}")):
        for name in ("one", "two"):
            (folder / f"{name}.yaml").write_text(f"# @package of_{name}\n{text}\n{name}: {{x: 0}}\n" * (text != "{}"))
            os.utime(folder / f"{name}.yaml", (time, time))
        for name in ("one", "two", "one"):
            found, hydras = read(source, name), read._load(source, name)
            assert (found.config, found.header) == (hydras.config, hydras.header)
            found.config["a"] = found.header["package"] = "changed by its reader"
    with pytest.raises(ConfigLoadError):
        read(source, "three")


def test_a_file_is_parsed_once_and_read_as_it_is(tmp_path: Path) -> None:
    check_files_are_read_as_they_are(remembered, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        [("source.path, config_path, stat", "source.path, stat")],
        [(", stat.st_mtime_ns, stat.st_size)\n        if", ")\n        if")],
        [("pickle.dumps(self._load(", "(self._load("), ("pickle.loads(self._read[key])", "self._read[key]")],
    ],
    ids=["another file", "as it was", "changed by a reader"],
)
def test_a_wrong_memory_of_files_is_seen(change: list[tuple[str, str]], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_files_are_read_as_they_are(mutant(remembered, *change), tmp_path)
