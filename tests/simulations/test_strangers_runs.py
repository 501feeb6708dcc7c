"""A run directory that somebody sent, its hashes recomputed: whatever its files name, nothing of theirs is run.

Mutants this file kills: a registry that is not asked (`MUTANTS`), a part of one's own that is compared by its
beginning, a YAML reader that makes objects.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlr.config.parts import GET_METHOD
from fedlr.config.schema import check_experiment, compose_experiment
from fedlr.errors import InputError
from fedlr.models.network import pretrained
from fedlr.runs.checkpoint import read_checkpoint, save_checkpoint
from fedlr.runs.directory import CHECKPOINTS
from fedlr.server.app import experiment_of
from fedlr.simulations import cli
from fedlr.simulations.checkpoints import about_experiment
from fedlr.simulations.simulate import simulate
from tests.simulations.small_runs import SMALL

CANARY = "canary_of_a_stranger"
SOURCE = """
from pathlib import Path
MARK = Path(__file__).with_suffix(".mark")
MARK.write_text("imported")
from fedlr.methods.aggregate.mean import weighted_mean
from fedlr.tasks.synthetic import synthetic_text
"""


def part(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"_target_": name, **arguments}


def function(name: str) -> dict[str, Any]:
    return part(GET_METHOD, path=name)


# What a stranger writes into config.yaml, by dotted key.
TREES: Mapping[str, Mapping[str, Any]] = {
    "a program as data": {"data": part("os.system", command="touch {mark}", public=True, max_length=16, num_test=24)},
    "a module as data": {"data._target_": f"{CANARY}.synthetic_text"},
    "a module, in the other spelling": {"data._target_": f"{CANARY}:synthetic_text"},
    "a module as partition": {"partition._target_": f"{CANARY}.iid"},
    "a module as model": {"model._target_": f"{CANARY}.tiny_random"},
    "a module as method": {"method._target_": f"{CANARY}.Method"},
    "a part within a module of ours": {"data._target_": "fedlr.runs.directory.subprocess.run"},
    "exec as aggregate": {"method.aggregate": function("builtins.exec")},
    "a module as aggregate": {"method.aggregate": function(f"{CANARY}.weighted_mean")},
    "a class as aggregate": {"method.aggregate": part(f"{CANARY}.Median")},
    "a module as finaliser": {"method.finalise": function(f"{CANARY}.keep")},
    "a module as broadcast": {"method.broadcast": function(f"{CANARY}.full_adapter")},
    "a module as schedule": {"method.block_schedule._target_": f"{CANARY}.Always"},
    "a module as rule": {"method.client": part(f"{CANARY}.Rule")},
    "a module as optimizer": {"trainer.optimizer._target_": f"{CANARY}.SGD"},
    "a module after the noise": {"trainer.after_noise": part(f"{CANARY}.Rule")},
    "a part in an argument": {"model.head": part(f"{CANARY}.head")},
    "a part in a list": {"adapter.sizes": {"x": [part(f"{CANARY}.head")]}},
    "Hydra's launcher": {"hydra": {"launcher": part(f"{CANARY}.Launcher")}},
    "a handler of logs": {"hydra": {"job_logging": {"handlers": {"x": {"class": f"{CANARY}.Handler"}}}}},
    "a registered part where none belongs": {"runtime.device": part("fedlr.models.network.tiny_random")},
    "a resolver": {"trainer.optimizer.lr": "${oc.env:HOME}"},
}
TEXTS = {
    "a tag": "!!python/object/apply:os.system ['touch {mark}']\n",
    "a tag deep in it": "name: x\ndata: !!python/object/new:os.system ['touch {mark}']\n",
    "a module by tag": "x: !!python/module:canary_of_a_stranger\n",
    "ten billion values": "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n",
    "a deep text": "[" * 5_000,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died before its first round."""

    class Cut(BaseException):
        pass

    def dies(*args: Any, **options: Any) -> Any:
        raise Cut

    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlr.simulations.rounds.federated_rounds", dies)
        with pytest.raises(Cut):
            simulate(compose_experiment([*SMALL, f"tracking.output_dir={folder}"]), say=lambda line: None)
    (run_dir,) = folder.glob("*/*/")
    return run_dir


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is there once anything of the stranger's was run."""
    (tmp_path / f"{CANARY}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path / f"{CANARY}.mark"
    sys.modules.pop(CANARY, None)


def rewrite(run_dir: Path, changes: Mapping[str, Any], mark: Path) -> None:
    """Change a run's configuration, and all that is a function of it, where it is still a configuration."""
    path = run_dir / "config.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        section[last] = json.loads(json.dumps(value).replace("{mark}", str(mark)))
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    try:
        about = about_experiment(check_experiment(tree))
    except InputError:
        return
    checkpoint = read_checkpoint(run_dir / CHECKPOINTS / "round-00000")
    save_checkpoint(run_dir / CHECKPOINTS, checkpoint.state, {**checkpoint.facts, **about}, more=checkpoint.more)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Traceback" not in told, told
    return told


@pytest.fixture
def sent(killed: Path) -> Iterator[Path]:
    kept = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    yield killed
    for path in [path for path in killed.rglob("*") if path.is_file()]:
        path.unlink() if path not in kept else path.write_bytes(kept[path])


def test_nothing_that_a_strangers_run_names_is_imported_or_called(
    sent: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = (sent / "config.yaml").read_text(encoding="utf-8")
    for what, changes in TREES.items():
        (sent / "config.yaml").write_text(original, encoding="utf-8")
        rewrite(sent, changes, mark)
        assert cli.resume([str(sent)]) == 2, what
        told = one_line(capsys)
        assert "config.yaml" in told or "Expected" in told, what
        assert not mark.exists() and CANARY not in sys.modules, what
    for what, text in TEXTS.items():
        (sent / "config.yaml").write_text(text.replace("{mark}", str(mark)), encoding="utf-8")
        for command in (cli.resume, cli.report, cli.statement):
            assert command([str(sent)]) == 2, what
            one_line(capsys)
        assert not mark.exists() and CANARY not in sys.modules, what


def test_a_part_of_ones_own_is_resumed_by_whoever_names_it(
    sent: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{CANARY}.weighted_mean"
    rewrite(sent, {"method.aggregate": function(name)}, mark)
    for near in ("", "x", CANARY, f"{CANARY}.weighted_mea", f"{CANARY}:weighted_mean", f"{name}2"):
        assert cli.resume([str(sent), *(["--own-part", near] if near else [])]) == 2
        told = one_line(capsys)
        assert f"'{name}'" in told or f'"{name}"' in told
        assert f"--own-part {name}" in told
        assert not mark.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlr.simulations.simulate.write_report", lambda run_dir: None)
        assert cli.resume([str(sent), "--own-part", "x", "--own-part", name]) == 0
    assert mark.exists() and (sent / "summary.json").exists()


def test_a_registry_that_is_not_asked_is_seen(sent: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlr.runs.directory.require_registered", lambda tree, **options: None)
    rewrite(sent, TREES["a module as aggregate"], mark)
    cli.resume([str(sent)])
    assert mark.exists()


def test_an_experiment_that_comes_by_flower_names_registered_parts_only(
    mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        run_config: dict[str, Any] = {}

    monkeypatch.delenv("FEDLR_EXPERIMENT", raising=False)
    tree = compose_experiment(list(SMALL)).resolved()
    tree["method"]["aggregate"] = function(f"{CANARY}.weighted_mean")
    Context.run_config["cfg"] = json.dumps(tree)
    with pytest.raises(InputError, match="FEDLR_OWN_PARTS"):
        experiment_of(Context())  # type: ignore[arg-type]
    monkeypatch.setenv("FEDLR_OWN_PARTS", f"other.part {CANARY}.weighted_mean")
    assert experiment_of(Context()).method == tree["method"]  # type: ignore[arg-type]
    assert not mark.exists()


def saved_model(folder: Path) -> None:
    from fedlr.models.network import tiny_random

    base = tiny_random(label_names=("a", "b"), seed=0)
    base.network.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def with_code(folder: Path, mark: Path) -> None:
    (folder / "modeling_x.py").write_text(SOURCE)
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling_x.C", "AutoModelForSequenceClassification": "x.M"})


def with_tokenizer_code(folder: Path, mark: Path) -> None:
    (folder / "tok_x.py").write_text(SOURCE)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok_x.T", "tok_x.T"]}, tokenizer_class="T")


def with_a_pickle(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cbuiltins\nexec\n(S\"open('%s','w')\"\ntR." % str(mark).encode())


def with_an_adapter(folder: Path, mark: Path) -> None:
    mapping = {"parent_library": CANARY, "base_model_class": "M"}
    content = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "auto_mapping": mapping, "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def with_a_quantiser(folder: Path, mark: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": CANARY, "modules": [f"{CANARY}.x"]})


def with_kernels(folder: Path, mark: Path) -> None:
    edit(folder / "config.json", _attn_implementation=f"{CANARY}/kernel", attn_implementation=f"{CANARY}/kernel")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MODELS: tuple[Callable[[Path, Path], None], ...] = (
    with_code,
    with_tokenizer_code,
    with_a_pickle,
    with_an_adapter,
    with_a_quantiser,
    with_kernels,
)


@pytest.mark.parametrize("change", MODELS, ids=lambda change: change.__name__)
def test_a_model_folder_brings_tensors_and_no_code(
    tmp_path: Path, mark: Path, change: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "model"
    saved_model(folder)
    change(folder, mark)
    try:
        pretrained(name_or_path=str(folder), label_names=("a", "b"), seed=0)
    except InputError as error:
        assert "model.name_or_path" in str(error) and "\n" not in str(error)
    assert not mark.exists() and CANARY not in sys.modules
