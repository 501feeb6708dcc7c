"""Nothing that a client sends, or leaves out, ends a run of a strategy or is used unseen.

Mutants this file kills: those of `MUTANTS`, compiled from the source with one text changed.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from tests.flower.in_process_grid import inside_a_run
from tests.flower.strategy_clients import (
    BAD,
    CLASSIFIER,
    METHODS,
    NODES,
    REFUSED,
    A,
    B,
    Check,
    bad_one,
    catches_mutant,
    draw,
    failed,
    honest,
    quick,
    reply_to,
    run,
    same,
    start_tensors,
    trained,
)


@pytest.fixture(autouse=True)
def _inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inside_a_run(monkeypatch)


def test_weights_are_equal_or_what_clients_say_up_to_the_cap() -> None:
    said = dict(zip(NODES, (1, 3, 10**400, 8.0), strict=True))

    def client(message: Message) -> Message:
        return reply_to(message, trained(message), {"num-examples": said[message.metadata.dst_node_id]})

    def weighted(weights: Sequence[float]) -> Tensor:
        total = sum(
            w * (start_tensors()[B] + 0.3 * draw(n, 1, B, shape=(5, 3))) for n, w in zip(NODES, weights, strict=True)
        )
        assert isinstance(total, Tensor)
        return total / sum(weights)

    for cap, weights in ((None, (1, 1, 1, 1)), (8, (1, 3, 8, 8)), (2, (1, 2, 2, 2))):
        arrays = run(quick(weight_cap=cap), client).arrays.to_torch_state_dict()
        assert torch.allclose(arrays[B], weighted(weights), atol=1e-6), cap


def npy(array: np.ndarray, **lies: Any) -> Array:
    whole = Array(array)
    return Array(**{"dtype": whole.dtype, "shape": whole.shape, "stype": whole.stype, "data": whole.data, **lies})


def with_array(key: str, make: Callable[[Tensor], Array | Tensor]) -> Callable[[Message], Message]:
    def client(message: Message) -> Message:
        reply = reply_to(message, trained(message), {"num-examples": 5})
        made = make(trained(message)[key])
        reply.content["arrays"][key] = made if isinstance(made, Array) else Array(made.numpy())
        return reply

    return client


def with_arrays(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[Message], Message]:
    return lambda message: reply_to(message, change(trained(message)), {"num-examples": 5})


def with_metrics(metrics: Mapping[str, Any]) -> Callable[[Message], Message]:
    return lambda message: reply_to(message, trained(message), metrics)


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor(1), value).reshape(tensor.shape)


def npz(tensor: Tensor) -> Array:
    file = io.BytesIO()
    np.savez(file, x=tensor.numpy())
    return npy(tensor.numpy(), data=file.getvalue())


def header(shape: str, descr: str = "'<f4'") -> Callable[[Tensor], Array]:
    def make(tensor: Tensor) -> Array:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + tensor.numpy().tobytes()
        return npy(tensor.numpy(), data=data)

    return make


def two_records(message: Message) -> Message:
    reply = honest(message)
    reply.content["more"] = ArrayRecord(trained(message))
    return reply


def from_another_round(message: Message) -> Message:
    message.metadata.__dict__["_group_id"] = "0"
    return honest(message)


def in_a_strangers_name(message: Message) -> Message:
    message.metadata.__dict__["_dst_node_id"] = 12345
    return honest(message)


def told_gone_by_the_superlink(message: Message) -> Message:
    reply = Message(Error(5, "node unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply


UNUSABLE: dict[str, tuple[str, Callable[[Message], Any]]] = {
    "nan": ("not_finite", with_array(B, poisoned(math.nan))),
    "infinity": ("not_finite", with_array(CLASSIFIER, poisoned(-math.inf))),
    "1e30": ("too_large", with_array(B, poisoned(1e30))),
    "one row, which would broadcast": ("wrong_shape", with_array(B, lambda t: t[:1])),
    "one number": ("wrong_shape", with_array(B, lambda t: t[0, 0])),
    "transposed": ("wrong_shape", with_array(B, lambda t: t.T.contiguous())),
    "another rank": ("wrong_shape", with_array(B, lambda t: t[:, :2].contiguous())),
    "nothing": ("wrong_shape", with_array(B, lambda t: t[:0])),
    "float64": ("wrong_dtype", with_array(B, lambda t: t.double())),
    "float16": ("wrong_dtype", with_array(B, lambda t: t.half())),
    "integers": ("wrong_dtype", with_array(B, lambda t: t.int())),
    "complex": ("wrong_dtype", with_array(B, lambda t: t.to(torch.complex64))),
    "big-endian": ("malformed", with_array(B, lambda t: npy(t.numpy().astype(">f4")))),
    "text": ("malformed", with_array(B, lambda t: npy(np.full(t.shape, "x")))),
    "npz": ("malformed", with_array(B, npz)),
    "truncated": ("malformed", with_array(B, lambda t: npy(t.numpy(), data=Array(t.numpy()).data[:-3]))),
    "bytes left over": ("malformed", with_array(B, lambda t: npy(t.numpy(), data=Array(t.numpy()).data + b"1234"))),
    "no bytes": ("malformed", with_array(B, lambda t: npy(t.numpy(), data=b""))),
    "pickled": ("malformed", with_array(B, lambda t: npy(t.numpy(), data=b"\x80\x04K*."))),
    "objects": ("malformed", with_array(B, header("(5, 3)", "'|O'"))),
    "other serialisation": ("malformed", with_array(B, lambda t: npy(t.numpy(), stype="pickle"))),
    "1e11 numbers by its header": ("malformed", with_array(B, header("(100000000000,)"))),
    "negative shape": ("wrong_shape", with_array(B, header("(-1,)"))),
    "header that is no dictionary": ("malformed", with_array(B, header("(5, 3)", "__import__('os')"))),
    "key missing": ("wrong_keys", with_arrays(lambda t: {k: t[k] for k in t if k != B})),
    "key too many": ("wrong_keys", with_arrays(lambda t: {**t, "x": torch.zeros(1)})),
    "key renamed": ("wrong_keys", with_arrays(lambda t: {k.replace("first", "f"): t[k] for k in t})),
    "no arrays": ("wrong_keys", with_arrays(lambda t: {})),
    "two array records": ("wrong_keys", two_records),
    "an empty reply": ("wrong_keys", lambda message: Message(RecordDict(), reply_to=message)),
    "another round": ("wrong_round", from_another_round),
    "a stranger": ("unknown_client", in_a_strangers_name),
    "an error": ("client_error", failed),
    "an error of the SuperLink": ("client_error", told_gone_by_the_superlink),
    "silence": ("no_answer", lambda message: None),
}


BAD_WEIGHTS: dict[str, Callable[[Message], Any]] = {
    "negative": with_metrics({"num-examples": -29}),
    "hugely negative": with_metrics({"num-examples": -(10**400)}),
    "zero": with_metrics({"num-examples": 0}),
    "nan": with_metrics({"num-examples": math.nan}),
    "a list": with_metrics({"num-examples": [3, 4]}),
    "untold": with_metrics({"loss": 1.0}),
    "no metrics": lambda message: reply_to(message, trained(message)),
}


def check_that_it_changes_nothing(reason: str, bad: Callable[[Message], Any], **options: Any) -> None:
    without = run(quick(**options), bad_one(lambda message: None), num_rounds=2)
    used = quick(**options)
    result = run(used, bad_one(bad), num_rounds=2)
    assert same(result.arrays, without.arrays)
    assert not same(result.arrays, run(quick(**options), num_rounds=2).arrays), "an honest one does change something"
    for number, round_ in enumerate(used.rounds, start=1):
        assert round_.used == tuple(sorted(set(NODES) - {BAD}))
        reasons = {dropout.reason for dropout in round_.dropouts if dropout.client_id in (BAD, 12345)}
        assert reason in reasons and reasons <= {reason, "no_answer"}
        metrics = result.train_metrics_clientapp[number]
        assert metrics["num-results"] == 3 and metrics[f"dropped-{reason.replace('_', '-')}"] == 1
        assert metrics["loss"] == 1.0


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_reply_that_cannot_be_used_changes_nothing_and_is_counted(case: str) -> None:
    check_that_it_changes_nothing(*UNUSABLE[case])


def test_what_a_client_says_of_its_error_is_not_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="flwr"):
        run(quick(), bad_one(failed))
    assert f"node {BAD} dropped: client_error" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_weight_that_cannot_be_used_drops_its_client(case: str) -> None:
    check_that_it_changes_nothing("bad_weight", BAD_WEIGHTS[case], weight_cap=100)


def test_a_factor_that_moved_though_frozen_drops_its_client() -> None:
    def everything(message: Message, **moved: Tensor) -> Message:
        arrays = {**message.content["arrays"].to_torch_state_dict(), **trained(message)}
        return reply_to(message, {**arrays, **moved}, {"num-examples": 5, "loss": 1.0})

    whole = run(quick("ffa_lora"), everything, num_rounds=2)
    assert same(whole.arrays, run(quick("ffa_lora"), num_rounds=2).arrays), (
        "all arrays may come back, or the trained ones"
    )
    moved = bad_one(lambda message: everything(message, **{A: start_tensors()[A] + 1e-6}))
    used = quick("ffa_lora")
    without = run(quick("ffa_lora"), bad_one(lambda message: None))
    assert same(run(used, moved).arrays, without.arrays)
    assert [(d.client_id, d.reason) for d in used.rounds[0].dropouts] == [(BAD, "trained_what_is_frozen")]


def test_a_second_reply_of_a_client_is_not_used() -> None:
    def twice(message: Message) -> list[Message]:
        more = {key: tensor + 1 for key, tensor in trained(message).items()}
        return [honest(message), reply_to(message, more, {"num-examples": 5, "loss": 9.0})]

    used = quick()
    result = run(used, bad_one(twice))
    assert same(result.arrays, run(quick()).arrays)
    assert [(d.client_id, d.reason) for d in used.rounds[0].dropouts] == [(BAD, "duplicate")]
    assert result.train_metrics_clientapp[1]["loss"] == 1.0


@pytest.mark.parametrize("case", UNUSABLE)
def test_rounds_without_a_usable_reply_keep_the_arrays_and_the_run_goes_on(case: str) -> None:
    result = run(quick("ffa_lora"), UNUSABLE[case][1], num_rounds=3)
    assert same(result.arrays, ArrayRecord(start_tensors())) and sorted(result.train_metrics_clientapp) == [1, 2, 3]


@pytest.mark.parametrize("name", sorted(set(METHODS) - REFUSED))
@pytest.mark.parametrize(
    "make", [torch.zeros_like, lambda t: 1e6 * torch.sign(t), torch.ones_like], ids=["0", "1e6", "1"]
)
def test_no_finite_reply_ends_a_run(name: str, make: Callable[[Tensor], Tensor]) -> None:
    def client(message: Message) -> Message:
        return reply_to(message, {key: make(tensor) for key, tensor in trained(message).items()})

    result = run(quick(name), client, num_rounds=3)
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())


def test_metrics_are_means_of_what_most_clients_tell() -> None:
    told = dict(zip(NODES, ({"a": 1, "b": 2.0}, {"a": 2, "b": math.nan}, {"a": 3, "c": 5}, {"a": 1e300}), strict=True))

    def client(message: Message) -> Message:
        metrics = MetricRecord({"num-examples": 4, **told[message.metadata.dst_node_id]})  # type: ignore[dict-item]
        content = RecordDict({"metrics": metrics})
        if message.metadata.message_type == "train":
            content["arrays"] = ArrayRecord(trained(message))
        return Message(content, reply_to=message)

    result = run(quick(fraction_evaluate=1.0), client)
    assert result.evaluate_metrics_clientapp == {1: MetricRecord({"a": 2.0})}
    assert {"a": 2.0, "num-results": 4, "num-dropped": 0}.items() <= dict(result.train_metrics_clientapp[1]).items()
    assert "b" not in result.train_metrics_clientapp[1] and "num-examples" not in result.train_metrics_clientapp[1]


@pytest.mark.parametrize("broken", [failed, two_records, lambda message: None], ids=["error", "no metrics", "silence"])
def test_an_evaluation_survives_its_clients(broken: Callable[[Message], Any]) -> None:
    def client(message: Message) -> Any:
        is_bad = message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == BAD
        return (failed if is_bad and broken is two_records else broken if is_bad else honest)(message)

    assert run(quick(fraction_evaluate=1.0), client).evaluate_metrics_clientapp[1]["accuracy"] == 0.5


def fails_on(case: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: check_that_it_changes_nothing(*UNUSABLE[case])


MUTANTS: dict[str, tuple[str, str, Check]] = {
    "a weight at its word": (
        "float(min(said, self.cap))",
        "float(said)",
        lambda _: test_weights_are_equal_or_what_clients_say_up_to_the_cap(),
    ),
    "a metric at its word": (
        "abs(value) <= LARGEST_METRIC",
        "True",
        lambda _: test_metrics_are_means_of_what_most_clients_tell(),
    ),
    "a metric of one client": (
        "if 2 * len(pairs) > len(contents)",
        "",
        lambda _: test_metrics_are_means_of_what_most_clients_tell(),
    ),
    "a frozen factor that moved": (
        "if not all(torch.equal(",
        "if False and not all(torch.equal(",
        lambda _: test_a_factor_that_moved_though_frozen_drops_its_client(),
    ),
    "keys not looked at": (
        "len(records) != 1 or set(records[0]) not in (trained, set(self.names.slots))",
        "len(records) != 1",
        fails_on("key too many"),
    ),
    "records not counted": ("len(records) != 1 or set", "set", fails_on("two array records")),
    "another round": ("reply.metadata.group_id != nodes[node]", "False", fails_on("another round")),
    "a stranger": ("elif node not in nodes", "elif False", fails_on("a stranger")),
    "a second reply": ("elif node in contents", "elif False", lambda _: test_a_second_reply_of_a_client_is_not_used()),
    "an error put down to the SuperLink": (
        "by_message.get(reply.metadata.reply_to_message_id, node)",
        "node",
        fails_on("an error of the SuperLink"),
    ),
    "no arrays from an unusable round": (
        "return run.names.record(state.adapter), MetricRecord",
        "return (run.names.record(state.adapter) if outcome.used else None), MetricRecord",
        lambda _: test_rounds_without_a_usable_reply_keep_the_arrays_and_the_run_goes_on("nan"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catches_mutant(*MUTANTS[name], monkeypatch)
