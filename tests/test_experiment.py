"""Every file of configs/ composes and builds, and says the truth about the commands in its header.

Mutants this file kills: an experiment that sets the budget in its body, so that privacy=none trains with privacy (or
an override that is dropped); an initialiser that changes the base model let through.
"""

import re
import shlex
import typing
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from pydantic import ValidationError

from fedlr.config.auto_rates import provisional
from fedlr.config.build import build, build_method, build_optimizer, check_sections
from fedlr.config.schema import CONFIGS, check_experiment, compose_experiment
from fedlr.errors import InputError
from fedlr.models.adapter_config import FROM_WEIGHTS, INFORMED, INITIALISERS, MADE_BY_THE_SERVER, AdapterConfig
from fedlr.models.network import BaseModel, attach_lora, tiny_random
from fedlr.runs.prepare import private_mechanism
from fedlr.simulations import cli

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
FILES = sorted(CONFIGS.rglob("*.yaml"))
OWN_DATA = {  # by experiment
    "text": ["data.path=reviews.csv"],
    "chat": ["data.path=chats.jsonl", "model.name_or_path=./model"],
    "lora_fair_domainnet": ["data.path=domainnet"],
    "lora_fair_nico": ["data.path=nico"],
}
NEEDED = {
    "runtime=superlink": ["deployment.rehearsal=true"],
    "data=table": ["data.path=reviews.csv"],
    "data=multilabel_table": ["data.path=mails.csv", "data.labels=[billing,delivery]"],
    "data=scored_table": ["data.path=reviews.csv", "data.score_range=[0,5]"],
    "data=chat": ["data.path=chats.jsonl", "data.max_length=64"],
    "data=dictionaries": ["data.max_length=64"],
    "data=images": ["data.path=photos"],
    "data=own": ["data._target_=synthetic", "data.num_examples=60", "data.max_length=64"],
    "model=causal": ["model.name_or_path=./model"],
    "model=pretrained_images": ["model.name_or_path=./model"],
    "model=pretrained": ["model.name_or_path=./encoder"],
    "adapter=tuner": ["adapter.system=randlora"],
}


OF_LANGUAGE_MODELS = {
    *("data=chat", "data=dictionaries", "data=synthetic_chat", "task=causal_lm"),
    *("model=causal", "model=smollm2", "model=tiny_causal"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_builds_all_that_needs_no_data(name: str) -> None:
    experiment = compose_experiment([f"experiment={name}", "privacy.accountant=rdp", *OWN_DATA.get(name, [])])
    assert experiment.name == name
    check_sections(experiment)
    experiment = provisional(experiment)  # a rate that is found later
    assert build_method(experiment).name == experiment.method["name"]
    optimizer = build_optimizer(experiment.trainer)([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["lr"] == experiment.trainer.optimizer.section()["lr"]
    budget, mechanism = private_mechanism(experiment)
    if experiment.privacy.epsilon is None:
        assert budget is None and mechanism is None
    else:
        assert budget is not None and mechanism is not None and mechanism.noise_multiplier > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_privacy_none_means_none_in_every_experiment(name: str) -> None:
    experiment = compose_experiment([f"experiment={name}", "privacy=none", *OWN_DATA.get(name, [])])
    assert experiment.privacy.epsilon is None
    assert private_mechanism(experiment) == (None, None)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_resolved_configuration_is_the_same_experiment(name: str) -> None:
    experiment = compose_experiment([f"experiment={name}", *OWN_DATA.get(name, [])])
    assert check_experiment(experiment.resolved()) == experiment


def test_overrides_beat_the_experiment_and_the_experiment_beats_the_groups() -> None:
    experiment = compose_experiment(["experiment=tiny", "trainer.optimizer.lr=0.5", "privacy.epsilon=3"])
    assert experiment.trainer.optimizer.section()["lr"] == 0.5
    assert experiment.trainer.num_steps == 2, "trainer/sgd.yaml says 3, tiny.yaml 2"
    assert experiment.privacy.epsilon == 3
    assert compose_experiment(["privacy.epsilon=3", "experiment=tiny"]).privacy.epsilon == 3, "whatever the order"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_option_composes_and_the_commands_in_its_header_do(path: Path) -> None:
    group = path.parent.name
    if path.parent != CONFIGS and group != "experiment":
        choice = f"{group}={path.stem}"
        tiny = "tiny_lm" if choice in OF_LANGUAGE_MODELS else "tiny"
        check_sections(compose_experiment([f"experiment={tiny}", choice, *NEEDED.get(choice, [])]))
    commands = re.findall(r"^# (?:Run: )?fedlr (?:simulate|plan) (.*)$", path.read_text(encoding="utf-8"), re.M)
    for command in commands:
        for overrides in cli.expand(shlex.split(command)):
            compose_experiment(overrides)
    assert commands or group not in ("experiment", "method", "configs")


def test_the_published_set_up_is_the_papers() -> None:
    e = compose_experiment(["experiment=fedsvd_paper"])
    assert (e.num_rounds, e.num_clients, e.cohort_size, e.trainer.num_steps) == (100, 6, 3, 10)
    assert (e.adapter.rank, e.adapter.lora_alpha, e.adapter.target_modules) == (8, 8, ["query", "value"])
    assert e.adapter.layers is None and not e.adapter.train_head and e.data.max_length == 128
    assert (e.privacy.epsilon, e.privacy.delta, e.privacy.max_grad_norm) == (6, 1e-5, 2)
    assert e.max_participations == e.num_rounds and e.method["name"] == "fedsvd"
    assert e.trainer.optimizer.section() == {"_target_": "torch.optim.SGD", "lr": 0.5}
    expected_size = (67_349 - e.data.num_test) / e.num_clients
    assert e.trainer.sample_rate * expected_size == pytest.approx(128, rel=1e-3) and e.trainer.divisor == 128


def test_the_published_set_up_offline_is_one_clear_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert cli.simulate(["experiment=fedsvd_paper"]) == 2
    told = capsys.readouterr().err
    assert "'stanfordnlp/sst2'" in told and "runtime.offline=false" in told and told.count("\n") == 1
    with pytest.raises(InputError, match=r"FacebookAI/roberta-large.*runtime\.offline=false"):
        experiment = compose_experiment(["experiment=fedsvd_paper"])
        build(experiment.model.section(), "model", label_names=("negative", "positive"), seed=0)
    assert list(tmp_path.iterdir()) == []


def tiny() -> BaseModel:
    return tiny_random(label_names=("negative", "positive"), seed=0)


def adapter_config(initialiser: bool | str) -> AdapterConfig:
    return AdapterConfig(rank=4, lora_alpha=4, target_modules=["query"], init_lora_weights=initialiser)


def all_initialisers() -> list[bool | str]:
    """Every value that this PEFT documents, and lora_ga, which it knows."""
    declared = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    names = [name for one in declared for name in typing.get_args(one)]
    assert {"pissa", "eva", "gaussian"} <= set(names)
    return [True, False, "lora_ga", *(name.replace("[number of iters]", "4") for name in names)]


@pytest.mark.parametrize("initialiser", [*all_initialisers(), *INFORMED], ids=str)
def test_an_initialiser_leaves_the_base_as_it_was_or_is_refused(initialiser: bool | str) -> None:
    base = tiny()
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    if initialiser not in (*INITIALISERS, *INFORMED, *MADE_BY_THE_SERVER):
        with pytest.raises(ValidationError, match="true, false, gaussian or orthogonal"):
            adapter_config(initialiser)
        return
    model = attach_lora(base, adapter_config(initialiser), seed=0)
    after = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in base.network.state_dict().items()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # Ours are no names that PEFT would know when it opens the adapter.
    assert model.peft_config["default"].init_lora_weights == (initialiser if initialiser in INITIALISERS else True)


@pytest.mark.parametrize("initialiser", FROM_WEIGHTS)
def test_pefts_own_change_the_base_and_so_are_not_what_is_used(initialiser: str) -> None:
    base = tiny()
    before = base.network.bert.encoder.layer[0].attention.self.query.weight.clone()
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, lora_alpha=4, target_modules=["query"], init_lora_weights=initialiser
    )
    get_peft_model(base.network, config)
    assert not torch.equal(before, base.network.bert.encoder.layer[0].attention.self.query.base_layer.weight)


def made_up(*, label_names: tuple[str, ...], width: tuple[int, int] = (1, 2), **more: int) -> BaseModel:
    """Return what is no model, whatever it says; a callable of a user's own, with keys of its own."""
    return f"{label_names} {width} {more}"  # type: ignore[return-value]


def test_a_callable_of_ones_own_must_return_what_belongs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlr.models.network.made_up", made_up, raising=False)
    section = {"_target_": "fedlr.models.network.made_up", "width": [3, 4], "depth": 2}
    with pytest.raises(InputError, match="model._target_ to return a BaseModel, got str"):
        build(section, "model", label_names=("a", "b"), seed=0)
    with pytest.raises(InputError, match="model.width.1 to be a valid integer, got null"):
        build({**section, "width": [3, None]}, "model", label_names=("a", "b"), seed=0)
