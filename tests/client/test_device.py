"""A device against what a server may ask twice: nothing is released that its ledger does not hold, and nothing lingers.

Mutants these tests reject: a check on private rows that a server can make fail; a reply from disk with an old ledger's
epsilon; side products that stay in the base of the next pool; a list of ranks as long as the client's number.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlr.client.cli
import fedlr.client.node
from fedlr.adapters.state import LORA_A, LORA_B, AdapterState, ClientUpdate, LoraFactors
from fedlr.client.device import Device
from fedlr.client.trainee import Trainee
from fedlr.errors import InputError
from fedlr.flower.messages import Reply, Request
from fedlr.flower.terms import Terms
from fedlr.models.network import BaseModel
from fedlr.models.peft_state import read_adapter
from fedlr.models.tuners.attach import attach
from fedlr.rounds.round import RoundRequest
from fedlr.tasks.batch import Batch
from fedlr.training.fused import FusedGradients
from tests.client.device_files import device_settings, terms_tree, tiny


def given(terms: Terms) -> AdapterState:
    return read_adapter(attach(fresh(), terms.adapter, seed=terms.seed))


def fresh() -> BaseModel:
    return tiny.__wrapped__()


def request(client_id: int = 0, round_index: int = 0, **changes: Any) -> Request:
    """Ask for lora_B under the sane terms, with changes by dotted key with __ for a dot."""
    tree = terms_tree({key.replace("__", "."): value for key, value in changes.items()})
    terms = Terms.read(json.dumps(tree))
    adapter = given(terms)
    block = frozenset({LORA_B})
    task = RoundRequest(round_index, adapter.select(block), block)
    return Request(terms, client_id, task, adapter.fingerprint(), adapter.scale, adapter)


def answer(device: Device, asked: Request) -> Reply:
    return Reply.read(device.answer(asked.record()))


def test_an_update_from_disk_comes_with_what_the_ledger_says_now(tmp_path: Path) -> None:
    device = Device(device_settings(tmp_path / "device", privacy__epsilon=50.0), say=lambda line: None)
    first, elsewhere = request(), request(experiment_id="f" * 32)
    sent, later, again = (answer(device, asked) for asked in (first, elsewhere, first))
    assert all(torch.equal(sent.tensors[slot], tensor) for slot, tensor in again.tensors.items())
    assert (again.facts.epsilon, again.facts.ledger_head) == (later.facts.epsilon, later.facts.ledger_head)
    assert (sent.facts.epsilon or 0.0) < (later.facts.epsilon or 0.0)


def test_a_server_cannot_learn_from_a_check_whether_a_row_was_drawn(tmp_path: Path) -> None:
    settings = device_settings(tmp_path / "device", privacy__epsilon=50.0, policy__max_sample_rate=1.0)
    both: dict[str, Any] = {"trainer__sample_rate": 1.0, "mechanism__sample_rate": 1.0, "trainer__check_parity": True}
    asked, generator = request(**both), torch.Generator().manual_seed(1)
    assert asked.enrolled is not None
    huge = {s: 30 * torch.randn(t.shape, generator=generator) for s, t in asked.enrolled.tensors.items()}
    task = replace(asked.task, broadcast=huge, block=frozenset({LORA_A, LORA_B}))  # float32 rounds here as it likes
    reply = answer(Device(settings, say=lambda line: None), replace(asked, task=task))
    assert reply.facts.refused is None


def test_under_a_mechanism_every_row_is_computed_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = FusedGradients.clipped_sums

    def counted(self: FusedGradients, batch: Batch, **given: Any) -> Any:
        sizes.append(batch.num_examples)
        return original(self, batch, **given)

    monkeypatch.setattr(FusedGradients, "clipped_sums", counted)
    device = Device(device_settings(tmp_path / "device"), say=lambda line: None)
    assert answer(device, request()).facts.refused is None
    assert len(sizes) > 2 and set(sizes) == {1}  # two steps of some eight rows


@pytest.mark.parametrize("rows", ["", "text,label\nfine,positive\nfine,unknown\n"])
def test_data_that_cannot_be_used_are_found_before_a_device_connects(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device_settings(tmp_path / "device")
    (tmp_path / "device" / "letters.csv").write_text(rows)
    monkeypatch.setattr(fedlr.client.node, "serve", lambda *_, **__: pytest.fail("it connected"))
    assert fedlr.client.cli.run([str(tmp_path / "device" / "client.yaml")]) == 2
    assert "letters.csv" in capsys.readouterr().err


def test_a_refusal_says_whether_model_or_data_do_not_fit_and_charges_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    settings = device_settings(tmp_path / "device")
    ledger, rows = settings.ledger_path.read_bytes(), tmp_path / "device" / "letters.csv"
    device = Device(settings, say=said.append)
    whole = rows.read_text()
    rows.write_text("text,label\nfine,unknown\n")
    assert answer(device, request()).facts.refused == "data"
    rows.unlink()
    assert answer(device, request()).facts.refused == "data"
    rows.write_text(whole)
    assert answer(device, request(max_length=600)).facts.refused == "policy"
    assert answer(device, request(max_length=500)).facts.refused == "model"  # longer than this one reads
    assert settings.ledger_path.read_bytes() == ledger and len(said) == 4
    assert answer(device, request()).tensors


def test_a_side_product_is_gone_from_the_base_when_another_pool_takes_over(tmp_path: Path) -> None:
    settings, asked = device_settings(tmp_path / "device"), request()
    trainee = Trainee.prepare(settings, asked.terms, say=lambda line: None)
    assert asked.enrolled is not None
    plain = {name: tensor.clone() for name, tensor in trainee.working.state_dict().items()}
    layers = asked.enrolled.factors()
    side = {path: LoraFactors(layer.lora_A, torch.ones_like(layer.lora_B)) for path, layer in layers.items()}
    for client_id, folded in ((0, side), (1, {})):
        pool = trainee.pool(client_id, asked.enrolled, Free())
        list(pool.train(replace(asked.task, side=folded), [client_id]))
        pool.close()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in trainee.working.state_dict().items())


def test_a_client_number_costs_no_memory(tmp_path: Path) -> None:
    asked = request()
    trainee = Trainee.prepare(device_settings(tmp_path / "device"), asked.terms, say=lambda line: None)
    assert asked.enrolled is not None
    pool = trainee.pool(2**32 - 1, asked.enrolled, Free())
    (update,) = pool.train(replace(asked.task, ranks={2**32 - 1: 1}), [2**32 - 1])
    pool.close()
    assert isinstance(update, ClientUpdate)
    assert {tensor.shape[1] for tensor in update.tensors.values()} == {1}


def test_an_enrolled_adapter_is_whole_and_of_its_types(tmp_path: Path) -> None:
    asked = request()
    trainee = Trainee.prepare(device_settings(tmp_path / "device"), asked.terms, say=lambda line: None)
    assert asked.enrolled is not None
    tensors = asked.enrolled.tensors
    part = {slot: tensor for slot, tensor in tensors.items() if slot.role != LORA_A}
    for wrong in (part, {slot: tensor.double() for slot, tensor in tensors.items()}):
        with pytest.raises(InputError, match="tensors of the adapter, of its types"):
            trainee.pool(0, replace(asked.enrolled, tensors=wrong), Free())


class Free:
    """Charges nothing: these tests are of the model."""

    def reserve(self, round_index: int, mechanism: Any, num_steps: int, client_ids: Any, task: Any = None) -> Any:
        return dict.fromkeys(client_ids)

    def settle_all(self, round_index: int, steps_taken: Any) -> None:
        pass
