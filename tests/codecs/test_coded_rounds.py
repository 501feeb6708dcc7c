"""Codecs in a round: the same bits in a simulation and from a device through the gate, told in every round's line.

Mutants these tests reject: a device that sends values without the codec, or encodes before the noise; a gate that takes
a coded reply of another form, or integers that nobody asked for; bytes of updates as if there were no codec.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlr.adapters.state import LORA_B, AdapterState, ClientUpdate, Slot, num_bytes
from fedlr.client.device import Device
from fedlr.client.settings import Settings
from fedlr.config.schema import Target, compose_experiment
from fedlr.errors import InputError
from fedlr.flower.messages import Request
from fedlr.flower.records import Limits, RecordDict, facts_of, from_record, to_record
from fedlr.flower.terms import Terms
from fedlr.methods.codecs.codec import Codec, Place, decoded, encoded
from fedlr.methods.codecs.rounding import Bfloat16, Int8
from fedlr.methods.codecs.top_k import TopK
from fedlr.models.network import tiny_random
from fedlr.models.peft_state import read_adapter
from fedlr.models.tuners.attach import attach
from fedlr.rounds.pools.coded import CodedPool
from fedlr.rounds.round import Dropout, RoundRequest
from fedlr.runs.recorder import metrics_row
from fedlr.server.gate import Asked, answer_of
from fedlr.simulations.federation import Federation, assemble
from fedlr.simulations.ledgers import create_ledger
from fedlr.simulations.rounds import rounds_of
from fedlr.simulations.runtime import make_pool
from tests.client.device_files import LABELS, device_settings, terms_tree

INTEGERS = Limits(coded=True)


def trained(federation: Federation, path: Path) -> tuple[AdapterState, list[dict[str, object]]]:
    """Run all rounds; return the last adapter and the lines of its rounds."""
    ledger = create_ledger(federation, path) if federation.mechanism else None
    rows = []
    with closing(make_pool(federation, ledger)) as pool:
        for state, diagnostics in rounds_of(federation, federation.start, pool):
            rows.append(metrics_row(state, None, spent=(), diagnostics=diagnostics, evaluate_s=0.0))
    return state.adapter, rows


def test_a_run_tells_bytes_and_added_error_and_is_the_run_without_where_the_codec_is_exact(tmp_path: Path) -> None:
    federation = assemble(compose_experiment(["experiment=tiny", "num_rounds=1", "trainer.check_parity=false"]), seed=3)
    plain, exact = trained(federation, tmp_path / "plain.jsonl")
    assert not any("codec_error" in row for row in exact)
    found = {}
    for name, more in (("int8", {}), ("bf16", {}), ("projection", {"keep": 1.0})):
        experiment = federation.experiment.model_copy(update={"codec": Target(_target_=name, **more)})
        adapter, (first,) = trained(replace(federation, experiment=experiment), tmp_path / f"{name}.jsonl")
        found[name] = adapter
        assert 0 < float(str(first["codec_error_of_mean"])) <= 1.01 * float(str(first["codec_error"])) < 0.03
        ratio = float(str(first["bytes_up"])) / float(str(exact[0]["bytes_up"]))
        assert {"int8": 0.25 < ratio < 0.26, "bf16": ratio == 0.5, "projection": 1 <= ratio < 1.01}[name]
        assert first["bytes_down"] == exact[0]["bytes_down"]
    for slot, tensor in plain.tensors.items():
        torch.testing.assert_close(found["projection"].tensors[slot], tensor, atol=1e-4, rtol=1e-3)
    assert any(not torch.equal(found["int8"].tensors[slot], tensor) for slot, tensor in plain.tensors.items())


def asked_of(codec: object) -> tuple[Request, Asked]:
    """Return a request of lora_B under terms with this codec, and what the server will compare a reply with."""
    terms = Terms.read(json.dumps(terms_tree({"randomness": "seeded"} | ({} if codec is None else {"codec": codec}))))
    model = tiny_random(label_names=LABELS, seed=0, hidden_size=16, num_layers=1)
    adapter = read_adapter(attach(model, terms.adapter, seed=terms.seed))
    task = RoundRequest(0, adapter.select(frozenset({LORA_B})), frozenset({LORA_B}))
    request = Request(terms, 0, task, adapter.fingerprint(), adapter.scale, adapter)
    place = Place(terms.seed, 0, 0)
    expected = adapter.select(task.shared)
    return request, Asked(terms.experiment_id, 0, 0, task.fingerprint(), expected, terms.built_codec(), place)


def seeded(folder: Path) -> Settings:
    """Return a device's settings under which its noise can be drawn again."""
    return device_settings(folder, privacy__randomness="seeded", policy__allow_seeded_randomness=True)


def reply_of(tmp_path: Path, codec: object) -> tuple[RecordDict, Asked]:
    request, asked = asked_of(codec)
    said: list[str] = []
    record = Device(seeded(tmp_path / ("plain" if codec is None else "coded")), say=said.append).answer(
        request.record()
    )
    assert facts_of(record)["refused"] is None, said
    return record, asked


@pytest.mark.parametrize(
    "codec", [{"_target_": "int8"}, {"_target_": "bf16"}, {"_target_": "projection", "keep": 0.25}]
)
def test_a_device_sends_what_a_simulation_makes_of_the_same_update(tmp_path: Path, codec: dict[str, object]) -> None:
    record, asked = reply_of(tmp_path, None)
    plain = answer_of(record, asked, weight=1.0).outcome
    record, asked = reply_of(tmp_path, codec)
    arrived = answer_of(record, asked, weight=1.0).outcome
    assert isinstance(plain, ClientUpdate) and isinstance(arrived, ClientUpdate)
    assert asked.codec is not None and asked.place is not None
    message = encoded(asked.codec, plain.tensors, asked.expected, asked.place)
    as_simulated = decoded(asked.codec, message, asked.expected, asked.place)
    assert as_simulated.keys() == arrived.tensors.keys()
    assert all(torch.equal(as_simulated[slot], tensor) for slot, tensor in arrived.tensors.items())
    assert num_bytes(from_record(record, INTEGERS).values()) < num_bytes(plain.tensors.values())


def test_a_hostile_reply_is_dropped_by_a_word_and_integers_are_taken_from_codecs_alone(tmp_path: Path) -> None:
    record, asked = reply_of(tmp_path, {"_target_": "int8"})
    tensors, facts = from_record(record, INTEGERS), facts_of(record)
    scale = next(slot for slot in tensors if slot.role.endswith(".scale"))
    levels = Slot(scale.path, LORA_B)
    for changed in (
        {scale: torch.full((1,), torch.inf)},
        {scale: torch.zeros(2)},
        {levels: tensors[levels].reshape(-1)},
        {levels: tensors[levels].to(torch.int32)},
        {levels: tensors[levels].to(torch.float32)},
    ):
        outcome = answer_of(to_record({**tensors, **changed}, facts), asked, weight=1.0).outcome
        assert isinstance(outcome, Dropout) and outcome.reason in ("bad_code", "malformed"), changed
    outcome = answer_of(record, replace(asked, codec=None), weight=1.0).outcome
    assert isinstance(outcome, Dropout) and outcome.reason == "malformed"
    with pytest.raises(InputError):
        from_record(record)


def test_the_largest_changes_are_for_runs_without_privacy(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"Expected codec=int8, bf16 or projection with privacy, got top_k: under noise"
    ):
        assemble(compose_experiment(["experiment=tiny", "codec=top_k"]), seed=3)
    adapter, rows = trained(
        assemble(compose_experiment(["experiment=tiny", "num_rounds=1", "privacy=none", "codec=top_k"]), seed=3),
        tmp_path / "ledger.jsonl",
    )
    assert 0 < float(str(rows[0]["codec_error"])) < 1 and adapter.tensors
    request, _ = asked_of({"_target_": "top_k", "keep": 0.1})
    device = Device(seeded(tmp_path / "device"), say=lambda line: None)
    before = (ledger := tmp_path / "device" / "state" / "ledger.jsonl").read_bytes()
    assert facts_of(device.answer(request.record()))["refused"] == "policy"
    assert ledger.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["method=scaffold"], r"must remember the same exact numbers"),
        (["codec.keep=0.5"], r"codec.keep"),
    ],
)
def test_what_a_codec_does_not_go_with_is_refused_before_any_work(words: list[str], why: str) -> None:
    with pytest.raises(InputError, match=why):
        assemble(compose_experiment(["experiment=tiny", "codec=int8", *words]), seed=3)


@pytest.mark.parametrize("keep", [0, -1, 2, "many"])
def test_a_share_that_is_none_is_named(keep: object) -> None:
    with pytest.raises(InputError, match=r"codec\.keep"):
        assemble(compose_experiment(["experiment=tiny", "codec=projection", f"codec.keep={keep}"]), seed=3)


@pytest.mark.parametrize("codec", [{"_target_": "os.system"}, {"_target_": "projection", "keep": 9}, {"_target_": "x"}])
def test_a_codec_that_no_release_has_is_no_terms_or_is_refused(codec: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"codec"):
        Terms.read(json.dumps(terms_tree({"codec": codec}))).built_codec()


def test_clients_of_several_ranks_send_what_they_have(tmp_path: Path) -> None:
    words = ["experiment=tiny", "num_rounds=1", "trainer.check_parity=false", "method=flexlora", "privacy=none"]
    ranks = "adapter.client_ranks=[1,2,4,1,2,4]"
    federation = assemble(compose_experiment([*words, ranks, "codec=int8"]), seed=3)
    _, (row,) = trained(federation, tmp_path / "ledger.jsonl")
    assert row["num_trained"] == len(federation.clients) or row["num_trained"] == federation.experiment.cohort_size
    assert 0 < float(str(row["codec_error"])) < 0.03 and row["codec_error_of_mean"] is None


@pytest.mark.parametrize("codec", [Int8(), Bfloat16(), TopK(0.5)])
@pytest.mark.parametrize("worst", [torch.nan, torch.inf])
def test_a_client_whose_numbers_are_none_is_dropped_and_ends_no_round(codec: Codec, worst: float) -> None:
    slot = Slot("layer", LORA_B)
    enrolled = AdapterState({slot: torch.zeros(2, 3)}, scale=1.0)

    class Pool:
        def train(self, task: RoundRequest, cohort: Sequence[int]) -> Iterator[ClientUpdate | Dropout]:
            for client in cohort:
                yield ClientUpdate(client, {slot: torch.full((2, 3), worst if client == 1 else 0.5)}, 1.0, 0)

    pool = CodedPool(Pool(), codec, enrolled=enrolled, seed=0)
    outcomes = list(pool.train(RoundRequest(0, enrolled.tensors, frozenset({LORA_B})), (0, 1, 2)))
    assert outcomes[1] == Dropout(1, "rejected", "bad_code"), "as a server's gate says"
    assert all(isinstance(outcome, ClientUpdate) for outcome in (outcomes[0], outcomes[2]))
    error = pool.error()
    assert error is not None and error.update < 1, "of those that arrived alone"
