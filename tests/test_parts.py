"""The registry of parts: what the shipped files name is in it, and what is in it is what belongs there.

Mutants this file kills: a part that a shipped file names and the registry lacks; a part in a wrong section; a kind that
is found out by calling (`MUTANTS`); a walk that stops at the first level, or passes lists over.
"""

import importlib
import inspect
import pkgutil
import sys
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import fedlr.data
import fedlr.methods.aggregate
import fedlr.methods.client_rules
import fedlr.models.tuners
from fedlr.adapters.state import AdapterState, Block
from fedlr.client.bounds import Policy
from fedlr.config import parts, slots
from fedlr.config.build import build, build_choice, build_optimizer, find
from fedlr.config.parts import (
    GET_METHOD,
    OPTIMIZERS,
    PARTS,
    RULES,
    RULES_OF_PROTOCOL,
    name_of,
    named,
    named_parts,
    own_parts_of,
    require_registered,
)
from fedlr.config.schema import CONFIGS, compose_experiment
from fedlr.data.table import LabelledText
from fedlr.errors import InputError

LIBRARY = (fedlr.methods.aggregate, fedlr.methods.client_rules, fedlr.data, fedlr.models.tuners)
NOT_TO_BE_NAMED = {
    "fedlr.methods.aggregate.layer_mean.BoundLayerMean",  # LayerMean makes it, with a model
    "fedlr.methods.client_rules.chain.Chain",  # of rules that are objects already
    "fedlr.data.table.split_train_test",  # returns two
}


def shipped_trees() -> list[tuple[str, Any]]:
    """Every file of a group, under its group's name, as a configuration holds it."""
    found = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        group = path.parent.relative_to(CONFIGS).as_posix()
        found.append((str(path), tree if group in (".", "experiment") else {group: tree}))
    return found


def test_every_name_that_a_shipped_file_gives_is_a_registered_part_of_its_section() -> None:
    trees = shipped_trees()
    assert len(trees) > 50 and sum(len(list(named_parts(tree))) for _, tree in trees) > 140
    for path, tree in trees:
        if tree.get("data", {}).get("_target_") != "???":  # data=own, which the user fills in
            require_registered(tree, source=path)


def test_every_registered_part_is_what_belongs_in_its_section() -> None:
    assert set(PARTS) <= set(slots.KINDS)
    for section, names in PARTS.items():
        kind = slots.KINDS[section]
        for place in names.values():
            found = resolve_name(place)
            as_it_is = kind.num_arguments is not None and slots._gives(found, kind)
            assert slots._makes(found, kind) or as_it_is, f"{section}: {place}"
            assert place.rpartition(".")[0] in (found.__module__, "torch.optim")


def test_every_part_of_the_library_is_registered() -> None:
    """By its signature: a rule that is added and forgotten here could not be resumed."""
    registered = {place for names in PARTS.values() for place in names.values()} | NOT_TO_BE_NAMED
    modules = [
        "fedlr.methods.method",
        "fedlr.methods.layer_choice",
        "fedlr.methods.client_rules.rule",
        "fedlr.models.network",
    ]
    for package in LIBRARY:
        modules += [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    classes = [kind for section, kind in slots.KINDS.items() if section != "trainer.optimizer"]
    for module in map(importlib.import_module, modules):
        for name, found in inspect.getmembers(module):
            if not inspect.isclass(found) or found.__module__ != module.__name__ or name.startswith("_"):
                continue
            is_abstract = inspect.isabstract(found) or getattr(found, "_is_protocol", False)
            is_part = any(slots._makes(found, kind) for kind in classes if kind.num_arguments is not None)
            is_rule = slots._makes(found, slots.KINDS["method.client"])
            if not is_abstract and (is_part or is_rule):
                assert f"{module.__name__}.{name}" in registered


def test_a_device_allows_what_is_registered() -> None:
    policy = Policy.model_validate({"allowed_models": ["0" * 64]})
    assert (policy.allowed_optimizers, policy.allowed_rules) == (list(OPTIMIZERS), list(RULES_OF_PROTOCOL))
    assert {name_of(old, "client_rule") for old in RULES_OF_PROTOCOL} == set(RULES)
    assert all(issubclass(resolve_name(name), torch.optim.Optimizer) for name in OPTIMIZERS)


CALLS: list[str] = []


def typed(data: Any = None, **more: Any) -> LabelledText:
    raise AssertionError("called")


def untyped(*args: Any, **more: Any):  # type: ignore[no-untyped-def]
    CALLS.append("untyped")


def of_another_type(*args: Any, **more: Any) -> str:
    CALLS.append("of_another_type")
    return ""


def median(adapter: AdapterState, updates: Any) -> AdapterState:
    return adapter


def one_argument(adapter: AdapterState) -> AdapterState:
    return adapter


class Median:
    def __init__(self, depth: int = 1) -> None:
        CALLS.append("Median")

    def __call__(self, adapter: AdapterState, updates: Any) -> AdapterState:
        return adapter


class Turns:
    roles = ("lora_B",)

    def __call__(self, round_index: int, adapter: AdapterState) -> Block:
        return frozenset()


def make_median() -> Median:
    return Median()


HERE = "parts_of_a_users_own"
WRONG = {
    "data._target_": [
        "os.system",
        "os:system",
        "builtins.exec",
        "fedlr.runs.directory.subprocess.run",
        "antigravity.x",
    ],
    "model._target_": ["fedlr.data.table.load_table", "{here}.untyped", "{here}.of_another_type", "math.pi"],
    "partition._target_": ["{here}.typed", "torch.load", "hydra.utils.instantiate"],
    "method.aggregate.path": ["builtins.exec", "builtins.print", "{here}.one_argument", "{here}.untyped", "torch.load"],
    "method.aggregate._target_": ["fedlr.methods.method.keep", "keep", "{here}.median", "{here}.Turns", "pickle.loads"],
    "method.aggregate": ["builtins.exec", "{here}.one_argument", "{here}.Turns", "keep", "weighted_meen", "lr"],
    "method.finalise.path": ["{here}.median", "fedlr.methods.method.full_adapter", "sys.exit"],
    "method.broadcast.path": ["{here}.median", "builtins.dict"],
    "method.block_schedule._target_": ["{here}.Median", "builtins.frozenset"],
    "method.client._target_": ["{here}.Median", "types.SimpleNamespace"],
    "trainer.optimizer._target_": ["{here}.Median", "os.getcwd", "torch.optim.lr_scheduler.StepLR"],
    "trainer.after_noise._target_": ["torch.optim.SGD", "{here}.untyped"],
    "client_rule._target_": ["os.system", "{here}.Median"],
}
RIGHT = {
    "data._target_": ["{here}.typed"],
    "method.aggregate.path": ["{here}.median"],
    "method.aggregate": ["{here}.median", "{here}.Median", "lora_fair", "weighted_mean"],
    "method.aggregate._target_": ["{here}.Median", "{here}.make_median"],
    "method.block_schedule._target_": ["{here}.Turns"],
    "method.broadcast.path": ["fedlr.methods.method.trained_block"],
    "trainer.optimizer._target_": ["torch.optim.LBFGS"],
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this module, which pytest imports on its own, a name."""
    CALLS.clear()
    module = ModuleType(HERE)
    module.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, HERE, module)


def test_what_does_not_belong_at_a_key_is_refused_before_it_is_called() -> None:
    for where, names in WRONG.items():
        for name in names:
            with pytest.raises(InputError, match=rf"^Expected {where} ") as refused:
                find(name.format(here=HERE), where)
            assert "\n" not in str(refused.value)
    for where, names in RIGHT.items():
        for name in names:
            assert callable(find(name.format(here=HERE), where))
    assert CALLS == []


MUTANTS = {"a kind that is found out by calling": ("fedlr.config.build.check_kind", lambda found, name, where: None)}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_section_whose_kind_is_wrong_calls_nothing(monkeypatch: pytest.MonkeyPatch, mutant: str | None) -> None:
    if mutant:
        monkeypatch.setattr(*MUTANTS[mutant])
    trainer = compose_experiment(["experiment=tiny"]).trainer
    wrong = trainer.model_copy(
        update={"optimizer": trainer.optimizer.model_validate({"_target_": f"{HERE}.untyped", "lr": 1.0})}
    )
    for act in (
        lambda: build({"_target_": f"{HERE}.of_another_type"}, "model", label_names=("a",), seed=0),
        lambda: build_choice({"_target_": f"{HERE}.Median"}, "method.finalise"),
        lambda: build_optimizer(wrong),
    ):
        with pytest.raises(InputError):
            act()
            raise InputError  # of a mutant that makes it
    assert bool(CALLS) is (mutant is not None)


READ = {
    "data": {"_target_": "os.system", "command": "true"},
    "method": {"aggregate": {"_target_": GET_METHOD, "path": "builtins.exec"}},
    "model": {"_target_": "fedlr.models.pretrained", "tokenizer": {"_target_": "fedlr.models.tiny_random"}},
    "trainer": {"optimizer": {"_target_": "torch.optim.SGD", "groups": [[{"_target_": "torch.optim.SGD"}]]}},
    "partition": {"_target_": GET_METHOD, "path": "fedlr.data.partition.iid"},
    "hydra": {"launcher": {"_target_": "fedlr.models.tiny_random"}},
    "finalise": {"_target_": "fedlr.method.SvdRefactor"},
}
OLD: dict[str, Any] = {
    "data": {"_target_": "table", "path": "fedlr.method.keep"},
    "method": {
        "_target_": "fedlr.method.Method",
        "aggregate": {"_target_": GET_METHOD, "path": "fedlr.aggregate.mean.weighted_mean"},
        "finalise": {"_target_": "fedlr.method.SvdRefactor"},
        "broadcast": {"_target_": GET_METHOD, "path": "mine.send"},
        "client": {"_target_": "fedlr.client_rules.proximal.FedProx", "mu": 0.1},
    },
}
NEW = {
    "data": {"_target_": "table", "path": "fedlr.method.keep"},
    "method": {
        "_target_": "method",
        "aggregate": {"_target_": "weighted_mean"},
        "finalise": {"_target_": "svd_refactor"},
        "broadcast": {"_target_": GET_METHOD, "path": "mine.send"},
        "client": {"_target_": "fedprox", "mu": 0.1},
    },
}


def test_dotted_paths_of_older_releases_stand_for_names_in_their_own_group_only() -> None:
    assert named(OLD) == NEW == named(NEW)
    short = {"method": {"aggregate": "weighted_mean", "finalise": "mine.Finaliser", "broadcast": "keep"}}
    assert named(short)["method"] == {**short["method"], "aggregate": {"_target_": "weighted_mean"}}
    assert [entry[0] for entry in named_parts(short)] == ["method.broadcast", "method.finalise", "method.aggregate"]
    require_registered({"data": OLD["data"]}, source="FILE")
    with pytest.raises(InputError, match=r"method\.finalise in FILE .*mine\.Finaliser"):
        require_registered({"method": {**short["method"], "broadcast": "full_adapter"}}, source="FILE")
    assert own_parts_of(OLD) == ["mine.send"] and own_parts_of(short) == ["keep", "mine.Finaliser"]


def test_a_configuration_that_was_read_names_registered_parts_in_their_sections_only() -> None:
    for key, value in READ.items():
        with pytest.raises(InputError, match=f"Expected .*{key}.* in FILE"):
            require_registered({key: value}, source="FILE", own_parts=["tiny_random"])
    own = {"data": {"_target_": "mine.load"}}
    for near in ("mine.load2", "mine", "mine:load", "Mine.load", " mine.load"):
        with pytest.raises(InputError, match=r"data\._target_ in FILE .*'?\"?mine\.load"):
            require_registered(own, source="FILE", own_parts=[near])
    require_registered(own, source="FILE", own_parts=["mine.load"])
    assert own_parts_of({**own, "model": {"_target_": "tiny_random"}}) == ["mine.load"]


def test_a_walk_of_the_first_level_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shallow(tree: Any) -> Any:
        return [(key, "_target_", part["_target_"]) for key, part in tree.items() if "_target_" in part]

    monkeypatch.setattr(parts, "named_parts", shallow)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_configuration_that_was_read_names_registered_parts_in_their_sections_only()


def test_a_deep_tree_is_walked() -> None:
    tree: Any = {"_target_": "os.system"}
    for _ in range(5_000):
        tree = {"x": tree}
    with pytest.raises(InputError, match="no name of a function"):
        require_registered(tree, source="FILE")
