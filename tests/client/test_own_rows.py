"""Whether a device's rows can be read or kept as a server asks is told to nobody: such a row counts as zero.

Devices are asked the same: all rows of one can be read, a row of another cannot, no row of the third can. A server and
the ledger see the same of all, for each template that terms may name, and where rows cannot be kept past the frozen
layers.

Mutants, which are found out: rows that are encoded as they come; rows that must be kept past the frozen layers.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlr.client.trainee
from fedlr.adapters.state import HEAD, LORA_B
from fedlr.client.device import Device
from fedlr.client.device_checks import round_text
from fedlr.client.own_rows import LateRows, encode_readable
from fedlr.client.settings import Settings
from fedlr.data.conversations import ASSISTANT, USER, Conversations, Turn
from fedlr.errors import InputError
from fedlr.flower.messages import Reply
from fedlr.flower.task_terms import reading_sha256
from fedlr.flower.terms import Terms
from fedlr.models.causal import pretrained_causal, tiny_random_causal
from fedlr.models.network import BaseModel
from fedlr.rounds.pools.rehearsal import Rehearsal
from fedlr.tasks.causal_lm import CausalLM
from fedlr.tasks.examples import Examples, Share
from tests.client.blind import answer
from tests.client.device_files import LANGUAGE, LANGUAGE_PATH, SMALL, device_settings, enrolled, language_terms
from tests.client.hostile_server import sane_request
from tests.client.test_head_rounds import asked as head_asked
from tests.client.test_head_rounds import model as bert
from tests.families import save_family

# Takes no turn of a system, and leaves out what stands before a mark, as templates of models that think do.
PICKY = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('(so)')[-1] + '<|im_end|>\n' }}{% endfor %}"
)
ROW = [{"role": "user", "content": "red green"}, {"role": "assistant", "content": "blue"}]
SYSTEM = [{"role": "system", "content": "red"}, *ROW]
THINKS = [ROW[0], {"role": "assistant", "content": "red(so)blue"}]
ROWS: Mapping[str, list[Any]] = {
    "all": [ROW] * 8,
    "but a system's": [*[ROW] * 3, SYSTEM, *[ROW] * 4],
    "but one that thinks": [*[ROW] * 7, THINKS],
    "none": [SYSTEM, THINKS] * 4,
}
TEMPLATES = (None, "chatml", "plain")


@pytest.fixture(scope="module")
def picky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("picky")
    base = tiny_random_causal(seed=0, **SMALL)
    base.network.save_pretrained(folder)
    base.tokenizer.chat_template = PICKY
    base.tokenizer.save_pretrained(folder)
    return folder


def language_device(folder: Path, base: BaseModel, path: Path, rows: Sequence[Any], said: list[str]) -> Any:
    """Return a device that holds these conversations, and its settings."""
    changes = {
        **LANGUAGE,
        "model": {"_target_": "pretrained_causal", "name_or_path": str(path)},
        "policy__allowed_models": [base.body_sha256],
        "privacy__epsilon": 1e4,
    }
    settings = device_settings(folder, **changes)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return Device(settings, say=said.append), settings


def terms_of(base: BaseModel, template: str | None) -> Mapping[str, Any]:
    task = {
        "name": "causal_lm",
        "reading_sha256": reading_sha256(base, template=template, has_turns=True),
        "has_turns": True,
        "template": template,
        "max_response": None,
    }
    return language_terms({"model_sha256": base.fingerprint, "task": task})


def seen_of_templates(picky: Path, folder: Path) -> dict[str, list[str]]:
    """Compare what is seen of devices with different rows; return their logs."""
    logs: dict[str, list[str]] = {}
    for template in TEMPLATES:
        base = pretrained_causal(name_or_path=str(picky))
        request = sane_request(enrolled(path=LANGUAGE_PATH), terms_of(base, template))
        seen = {}
        for name, rows in ROWS.items():
            if template is not None and name.startswith("but"):  # as "none"
                continue
            where = folder / f"{name} {template}"
            device, settings = language_device(where, base, picky, rows, logs.setdefault(f"{name} {template}", []))
            seen[name] = answer(device, request.record(), settings)
            device.close()
        assert all(other == seen["all"] for other in seen.values()), f"the answer tells of rows: {template}"
        assert seen["all"][0]["refused"] is None and seen["all"][3], "nothing is answered, or for nothing"
    return logs


def test_no_template_that_a_server_chooses_tells_what_rows_hold(picky: Path, tmp_path: Path) -> None:
    logs = seen_of_templates(picky, tmp_path)
    left_out = {name: line.split(" rows")[0] for name, log in logs.items() for line in log if "cannot be read" in line}
    assert left_out == {"but a system's None": "1 of 8", "but one that thinks None": "1 of 8", "none None": "8 of 8"}


def test_rows_that_are_encoded_as_they_come_are_found_out(
    picky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_they_come(task: Any, base: Any, data: Any, *, max_length: int, say: Any) -> Examples:
        with fedlr.client.trainee.unfit("data"):
            return task.encode(base, data, max_length=max_length)

    monkeypatch.setattr(fedlr.client.trainee, "encode_readable", as_they_come)
    with pytest.raises(AssertionError, match="the answer tells of rows: None"):
        seen_of_templates(picky, tmp_path)


def test_the_owner_is_told_before_a_device_connects(picky: Path, tmp_path: Path) -> None:
    base = pretrained_causal(name_or_path=str(picky))
    _, settings = language_device(tmp_path / "device", base, picky, ROWS["but a system's"], [])
    with pytest.raises(InputError, match="1 of 8 rows cannot be read .* row 4: the chat template refuses"):
        round_text(settings, Terms.model_validate(sane_request(terms=terms_of(base, None)).terms.section()))
    assert round_text(settings, sane_request(terms=terms_of(base, "chatml")).terms).startswith("8 rows are read")


class Panic(BaseException):
    """Stands for what a tokenizer in Rust raises, which is no Exception."""


@pytest.mark.parametrize("error", [MemoryError, Panic])
def test_the_rows_that_cannot_be_read_are_left_out_and_no_others(error: type[BaseException]) -> None:
    base, bad = tiny_random_causal(seed=0, **SMALL), {0, 5, 6, 12}

    class Fails(CausalLM):
        def encode(self, base: Any, table: Any, *, max_length: int) -> Any:
            if bad & set(table.numbers.tolist()):
                raise error
            return super().encode(base, table, max_length=max_length)

    texts = ["red " * (number + 1) for number in range(13)]
    rows = tuple((Turn(USER, "red"), Turn(ASSISTANT, text)) for text in texts)
    table, said = Conversations(rows, np.arange(13), None, "rows"), list[str]()
    found = encode_readable(Fails(), base, table, max_length=64, say=said.append)
    wanted = CausalLM().encode(base, table.subset([n for n in range(13) if n not in bad]), max_length=64)
    assert found is not None and np.array_equal(found.lengths, wanted.lengths)  # type: ignore[attr-defined]
    assert len(said) == 1 and said[0].startswith("4 of 13 rows") and error.__name__ in said[0]
    none = encode_readable(Fails(), base, table.subset([0, 5]), max_length=64, say=said.append)
    assert none is None and said[1].startswith("2 of 2 rows")


def test_rows_whose_layers_panic_count_as_zero() -> None:
    base, said = tiny_random_causal(seed=0, **SMALL), list[str]()
    turns = (Turn(USER, "red"), Turn(ASSISTANT, "blue"))
    rows = CausalLM().encode(base, Conversations((turns,), np.arange(1), None, "rows"), max_length=64)

    def past(few: Examples) -> Examples:
        raise Panic

    made = LateRows(rows, past, Rehearsal(Share.whole(rows), said.append)).batch([0])
    assert len(made.targets) == 1 and len(said) == 1 and "Panic" in said[0]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("bert", tmp_path_factory.mktemp("base") / "bert")


def cached_device(folder: Path, base: Path, said: list[str]) -> tuple[Device, Settings]:
    section = {"_target_": "pretrained", "name_or_path": str(base), "head_std": 0, "pooling": "mean"}
    changes: dict[str, Any] = {"model": section, "policy__allowed_models": [bert(base).body_sha256]}
    changes |= {"privacy__randomness": "seeded", "policy__allow_seeded_randomness": True, "privacy__epsilon": 1e4}
    settings = device_settings(folder, runtime__cache_prefix=True, **changes)
    return Device(settings, say=said.append), settings


def seen_of_full_disks(base: Path, folder: Path, patch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[str]]:
    """Compare what is seen of a device whose rows are kept, and of one on which they find no place; and its log."""
    original, most, said = fedlr.client.trainee.past_frozen, {"now": 1000}, list[str]()

    def past_frozen(model: Any, table: Examples, *given: Any, **named: Any) -> Examples:
        if len(table) > most["now"]:
            raise InputError("Expected runtime.cache_dir to be a folder on a disk with room")
        return original(model, table, *given, **named)

    patch.setattr(fedlr.client.trainee, "past_frozen", past_frozen)
    seen, updates = {}, {}
    for name, most["now"] in (("kept", 1000), ("no place", 5), ("nor for one", 0)):
        device, settings = cached_device(folder / name, base, said)
        for number, block in enumerate((frozenset({HEAD}), frozenset({HEAD, LORA_B}))):
            request = head_asked(base, number, block).record()
            seen[name, number] = answer(device, request, settings)
            updates[name, number] = Reply.read(device.answer(request)).tensors
        device.close()
    for number in range(2):
        for name in ("no place", "nor for one"):
            assert seen[name, number] == seen["kept", number], "the answer tells how long the rows are"
    return updates, said


def test_rows_that_cannot_be_kept_past_the_frozen_layers_train_all_the_same(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates, said = seen_of_full_disks(bert_folder, tmp_path, monkeypatch)
    for number in range(2):
        for slot, tensor in updates["kept", number].items():
            torch.testing.assert_close(updates["no place", number][slot], tensor, rtol=1e-4, atol=1e-5)
            assert torch.isfinite(updates["nor for one", number][slot]).all()  # noise alone
    assert sum("pass them in every step" in line for line in said) == 4
    assert sum("counts as zero" in line for line in said) == 2


def test_rows_that_must_be_kept_past_the_frozen_layers_are_found_out(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(runtime: Any, model: Any, rows: Examples, rehearsal: Any, *, features: bool) -> Examples:
        return fedlr.client.trainee.past_frozen(
            model, rows, features, num_threads=1, store=fedlr.client.trainee.state_store(runtime, say=print)
        )

    monkeypatch.setattr(fedlr.client.trainee, "past_prefix", kept)
    with pytest.raises(AssertionError, match="how long the rows are"):
        seen_of_full_disks(bert_folder, tmp_path, monkeypatch)
