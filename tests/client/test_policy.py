"""A hostile server gets one word out of a device and nothing else: no row is read, no step taken, no byte charged.

Every case goes the whole way, through `fedlr.client.device.Device.answer`. The file with the data is a trap: opening it
fails, and is remembered; a sane request falls into it, which shows that it works.

Mutants this file kills: every bound and every refusal of client/policy.py, removed one at a time.
"""

import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules, resolve_name
from typing import Any

import pytest
import torch

import fedlr.client.policy
import fedlr.methods.client_rules
from fedlr.adapters.state import LORA_B, Slot
from fedlr.client.bounds import OPTIMIZERS
from fedlr.client.bounds import RULES_OF_PROTOCOL as ALLOWED_RULES
from fedlr.client.device import Device
from fedlr.client.policy import PolicyRefusal, check_terms
from fedlr.client.settings import Settings
from fedlr.config.parts import place_of
from fedlr.config.schema import compose_experiment
from fedlr.errors import InputError
from fedlr.flower.messages import Reply, Request
from fedlr.flower.terms import Terms
from fedlr.methods.client_rules.chain import Chain
from fedlr.methods.client_rules.rule import ClientRule
from fedlr.runs.prepare import private_mechanism
from fedlr.training.cohort import ELEMENTWISE
from tests.client.device_files import PATH, device_settings, terms_tree
from tests.client.hostile_server import AFTER_THE_MODEL, BOUNDS, CASES, RULES, TERMS, sane_request, section

OPENED: list[str] = []
TRAPPED: set[str] = set()
ROWS = (".csv", ".jsonl", ".png")  # what a device's data are files of


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and TRAPPED and str(arguments[0]) in TRAPPED:
        OPENED.append(str(arguments[0]))
        raise PermissionError("the trap")


sys.addaudithook(_watch)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Callable[..., Settings]]:
    """Return what makes a device's settings whose data cannot be opened unnoticed."""

    def ready(**changes: Any) -> Settings:
        settings = device_settings(tmp_path / "device", **BOUNDS, **changes)
        files = [path for path in (tmp_path / "device").rglob("*.*") if path.suffix in ROWS]
        TRAPPED.update(str(path) for path in files if path != settings.ledger_path)
        return settings

    OPENED.clear()
    yield ready
    TRAPPED.clear()


@pytest.mark.parametrize("name", CASES)
def test_device_refuses_before_it_touches_data_or_ledger(name: str, trap: Callable[..., Settings]) -> None:
    settings = trap(**CASES[name].device)
    said: list[str] = []
    ledger = settings.ledger_path.read_bytes() if settings.ledger_path.exists() else b""
    kept, device = sorted(settings.state_dir.rglob("*")), Device(settings, say=said.append)
    try:
        reply = Reply.read(device.answer(CASES[name].record()))
        assert reply.facts.refused in ("policy", "model") and not reply.tensors, said
    except InputError:  # no request at all
        pass
    assert not OPENED
    assert device.num_models_loaded == 0
    assert sorted(settings.state_dir.rglob("*")) == kept or name in AFTER_THE_MODEL  # no adapter is kept either
    assert (settings.ledger_path.read_bytes() if ledger else b"") == ledger
    assert len(" ".join(said)) < 2_000  # what a server sends does not fill the device's log


def test_forty_hostile_configurations_are_forty() -> None:
    assert len(TERMS) >= 40 and len(CASES) >= 100


def test_sane_request_falls_into_the_trap_and_trains_without_it(trap: Callable[..., Settings]) -> None:
    settings = trap()
    said: list[str] = []
    ledger = settings.ledger_path.read_bytes()
    reply = Reply.read(Device(settings, say=said.append).answer(sane_request().record()))
    assert OPENED and reply.facts.refused in ("data", "device_error") and settings.ledger_path.read_bytes() == ledger
    TRAPPED.clear()
    reply = Reply.read(Device(settings, say=said.append).answer(sane_request().record()))
    assert reply.facts.refused is None, said
    assert set(reply.tensors) == {Slot(PATH, LORA_B)} and len(settings.ledger_path.read_bytes()) > len(ledger)


@cache
def requested(name: str) -> Request | None:
    """Return what a device reads of a case; None where it is no request at all."""
    try:
        return Request.read(CASES[name].record())
    except InputError:
        return None


def accepted(policy: Any, by_device: Mapping[str, Settings]) -> Iterator[str]:
    """Return the cases that a policy lets pass."""
    for name, settings in by_device.items():
        if (request := requested(name)) is None:
            continue
        try:
            policy.check_terms(request.terms, settings)
            policy.check_request(request, settings)
        except InputError:
            continue
        yield name


def changed_policy(source: str) -> types.ModuleType:
    module = types.ModuleType("fedlr.client.policy")
    exec(compile(source, "<mutant of client.policy>", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def by_device(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Settings]:
    """Return the settings of the device that each case is about."""
    kinds = {repr(case.device): case.device for case in CASES.values()}
    made = {
        kind: device_settings(tmp_path_factory.mktemp("device"), **BOUNDS, **changes) for kind, changes in kinds.items()
    }
    return {name: made[repr(case.device)] for name, case in CASES.items()}


def sites() -> Mapping[str, str]:
    """Return, for every bound and every refusal in client/policy.py, the module without it."""
    source = Path(fedlr.client.policy.__file__).read_text()
    bounds = {m[0].strip(): source.replace(m[0], "") for m in re.finditer(r" +yield Bound\(.*\n", source)}
    calls = [m.start() for m in re.finditer(r"(?<!def )_refuse\(", source)]
    lines = {at: source[:at].count("\n") + 1 for at in calls}
    return bounds | {
        f"refusal in line {lines[at]}": f"{source[:at]}_pass{source[at + 7 :]}\n\ndef _pass(*_, **__): ...\n"
        for at in calls
    }


@pytest.mark.parametrize("source", sites().values(), ids=sites())
def test_every_bound_and_refusal_is_what_stops_some_case(source: str, by_device: Mapping[str, Settings]) -> None:
    assert set(accepted(changed_policy(source), by_device)) > set(AFTER_THE_MODEL)


# One half of a condition, or one call, left out.
HALVES = {
    " or len(names) > MOST_NAMES": "",
    " or not all(map(MODULE_NAME.fullmatch, names))": "",
    "if targets in (ALL_LINEAR, AUTO_TARGETS) else None": "",
    "len(task.block) > MOST_BLOCKS or ": "",
    " or not roles_of(task.block) <= trainable": "",
    "roles if terms.adapter.train_head else roles - {HEAD}": "roles",
    "not task.personal <= roles or ": "",
    " or not task.shared": "",
    "slot.role not in roles or ": "",
    " or not slot.path.isprintable()": "",
    "tensor.ndim != 2 or ": "",
    "float(lowest) >= -LARGEST_VALUE and ": "",
    " and float(highest) <= LARGEST_VALUE": "",
    " or len(f.lora_A) != f.lora_B.shape[1]": "",
    " or (key in HOW_IT_RUNS and value)": "",
    " and -most <= value <= most": "",
    " or isinstance(value, list)": "",
    '    _check_tensors(task.broadcast, "broadcast", roles, most=most, rank=rank)\n': "",
    '    _check_tensors(enrolled, "enrolled", roles | {SHIPPED}, most=most, rank=rank)\n': "",
    '    _check_tensors(task.control, "control", roles, most=most, rank=rank)\n': "",
    "    _check_privacy(terms, settings)\n": "",
    "    _check_adapter(terms, policy)\n": "",
    "    _check_buildable(terms)\n": "",
}


@pytest.mark.parametrize(("old", "new"), HALVES.items(), ids=HALVES)
def test_every_half_of_a_condition_is_what_stops_some_case(
    old: str, new: str, by_device: Mapping[str, Settings]
) -> None:
    source = Path(fedlr.client.policy.__file__).read_text()
    if old not in source:
        raise RuntimeError(f"the mutant no longer applies: {old!r}")
    mutant = changed_policy(source.replace(old, new))
    assert set(accepted(mutant, by_device)) > set(AFTER_THE_MODEL)


def test_policy_alone_lets_pass_only_what_the_model_must_tell(by_device: Mapping[str, Settings]) -> None:
    assert tuple(accepted(fedlr.client.policy, by_device)) == AFTER_THE_MODEL


SANE: Mapping[str, Mapping[str, Any]] = {
    "Adam on both factors and the head": {
        "trainer.optimizer": section("torch.optim.AdamW", lr=0.01, betas=[0.9, 0.99], weight_decay=0.0),
        "adapter.train_head": True,
    },
    "a rule of the trainer's": {"trainer.after_noise": section(f"{RULES}preconditioned.ScaledGradient", reg=0.1)},
    "SCAFFOLD": {"client_rule": section(f"{RULES}scaffold.ScaffoldClient", lr=0.5, optimizer="torch.optim.SGD")},
    "all layers": {"adapter.target_modules": "all-linear"},
    "the last layer": {"adapter.layers": [5]},
    "Opacus": {"trainer.engine": "opacus", "trainer.grad_sample_mode": "hooks"},
}


@pytest.mark.parametrize("terms", SANE.values(), ids=SANE)
def test_sane_terms_are_accepted(terms: Mapping[str, Any], tmp_path: Path) -> None:
    check_terms(Terms.read(json.dumps(terms_tree(terms))), device_settings(tmp_path / "device"))


@pytest.mark.parametrize("name", ["tiny", "federation", "fedsvd_paper"])
def test_experiments_of_this_project_are_within_the_default_policy(name: str, tmp_path: Path) -> None:
    experiment = compose_experiment(
        [f"experiment={name}", "seed=null", "privacy.randomness=os", "privacy.accountant=rdp"]
    )
    _, mechanism = private_mechanism(experiment)
    terms = Terms.of(
        experiment,
        mechanism,
        experiment_id="0" * 32,
        seed=0,
        model_sha256="0" * 64,
        label_names=["negative", "positive"],
    )
    check_terms(terms, device_settings(tmp_path / "device"))


def test_every_rule_and_optimizer_that_clients_can_use_is_allowed() -> None:
    modules = [
        import_module(f"fedlr.methods.client_rules.{m.name}") for m in iter_modules(fedlr.methods.client_rules.__path__)
    ]
    rules = {r for m in modules for r in vars(m).values() if isinstance(r, type) and issubclass(r, ClientRule)}
    assert rules - {Chain} == {resolve_name(place_of(name, "client_rule")) for name in ALLOWED_RULES}
    assert {resolve_name(name) for name in OPTIMIZERS} == {*ELEMENTWISE, torch.optim.AdamW}


def test_known_experiment_goes_on_when_no_other_may_begin(tmp_path: Path) -> None:
    settings = device_settings(tmp_path / "device", num_experiments=2, **BOUNDS)
    terms = Terms.read(json.dumps(terms_tree({"experiment_id": f"{1:032x}"})))
    check_terms(terms, settings)


def test_refusal_names_key_value_and_bound(tmp_path: Path) -> None:
    terms = Terms.read(json.dumps(terms_tree({"trainer.num_steps": 1_000_000})))
    with pytest.raises(PolicyRefusal, match=r"terms.trainer.num_steps .*\[1, 100\] \(policy.max_steps.*got 1000000"):
        check_terms(terms, device_settings(tmp_path / "device"))
