"""Replies of devices that mean harm or are broken: a function a class, each with the reason by which it is refused.

Each takes what an honest device would answer and a seeded generator, and returns the record that is sent instead.
`CANARY` stands wherever a device may choose a text: no byte of it may reach a log of the server's.
"""

import io
import json
import math
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from fedlr.adapters.state import HEAD, LORA_A, Slot, in_block
from fedlr.flower.messages import ReplyFacts, Request
from fedlr.flower.records import ARRAYS, FACTS, LAYOUT, RecordDict, to_record

CANARY = "canary-5e1f"
MALFORMED, KEYS, SHAPE, DTYPE = "malformed", "wrong_keys", "wrong_shape", "wrong_dtype"
NOT_FINITE, TOO_LARGE = "not_finite", "too_large"


@dataclass(frozen=True)
class Honest:
    """What a device that means well answers to one request."""

    facts: Mapping[str, Any]
    tensors: Mapping[Slot, Tensor]

    @classmethod
    def to(cls, record: RecordDict) -> "Honest":
        """Answer a request with the broadcast, each value a little larger by client and round."""
        request = Request.read(record)
        task, step = request.task, 1 / (8 + request.client_id + request.task.round_index)
        facts = ReplyFacts(
            experiment_id=request.terms.experiment_id,
            client_id=request.client_id,
            round_index=task.round_index,
            task_sha256=task.fingerprint(),
            refused=None,
            epsilon=1.25,
            delta=1e-5,
            ledger_head=task.fingerprint(),  # another one each round, as a ledger that grows has
        )
        tensors = {slot: t + step for slot, t in task.broadcast.items() if in_block(slot, task.shared)}
        return cls(facts.model_dump(), tensors)

    def record(self, **facts: Any) -> RecordDict:
        """Return the reply, with other facts: they are written as they are, checked by nobody."""
        return to_record(self.tensors, {**self.facts, **facts})

    def with_tensors(self, change: Callable[[Slot, Tensor], Tensor]) -> RecordDict:
        """Return a well-formed reply with other tensors."""
        return to_record({slot: change(slot, tensor) for slot, tensor in self.tensors.items()}, self.facts)

    def with_value(self, rng: random.Random, value: float, dtype: torch.dtype = torch.float32) -> RecordDict:
        """Return the reply with one value of one tensor of the dtype set."""
        target = rng.choice([slot for slot, tensor in self.tensors.items() if tensor.dtype == dtype])
        return self.with_tensors(lambda slot, t: with_entry(t, rng, value) if slot == target else t)

    def with_layout(self, change: Callable[[list[dict[str, Any]]], Any], **arrays: Array) -> RecordDict:
        """Return the reply with another layout; a text is taken as it is."""
        record = self.record()
        layout = change(json.loads(record.config_records[LAYOUT][LAYOUT]))
        record[LAYOUT] = ConfigRecord({LAYOUT: layout if isinstance(layout, str) else json.dumps(layout)})
        return with_arrays(record, **arrays) if arrays else record

    def with_entry(self, **changes: Any) -> RecordDict:
        """Return the reply with another first entry of the layout."""
        return self.with_layout(lambda layout: [{**layout[0], **changes}, *layout[1:]])

    def with_array(self, array: Array) -> RecordDict:
        """Return the reply with other float32 numbers."""
        return with_arrays(self.record(), float32=array)

    def with_facts(self, text: str | bytes) -> RecordDict:
        """Return the reply with another text where the facts are."""
        record = self.record()
        record[FACTS] = ConfigRecord({FACTS: text})
        return record

    @property
    def floats(self) -> np.ndarray:
        """Its float32 numbers, in the order in which they are sent."""
        return self.record().array_records[ARRAYS]["float32"].numpy()


Hostile = Callable[[Honest, random.Random], RecordDict]
CLASSES: dict[str, tuple[str, Hostile]] = {}  # the reason, and how to make one
HEAVY: set[str] = set()  # classes that take long to make


def refused_as(reason: str, *, heavy: bool = False) -> Callable[[Hostile], Hostile]:
    """Register a class of hostile replies."""

    def register(make: Hostile) -> Hostile:
        name = make.__name__
        assert name not in CLASSES
        CLASSES[name] = reason, make
        HEAVY.update({name} if heavy else ())
        return make

    return register


def with_entry(tensor: Tensor, rng: random.Random, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[rng.randrange(tensor.numel())] = value
    return changed


def with_arrays(record: RecordDict, **arrays: Array) -> RecordDict:
    return with_records(record, **{ARRAYS: ArrayRecord({**record.array_records[ARRAYS], **arrays})})


def with_records(record: RecordDict, **records: Any) -> RecordDict:
    return RecordDict({**record, **records})  # a record that is set a second time is a warning of Flower's


def raw(data: bytes, like: np.ndarray, *, dtype: str = "float32", stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=tuple(like.shape), stype=stype, data=data)


def npy(like: np.ndarray, **changes: str) -> bytes:
    """Return numpy's bytes of an array with other texts in the header."""
    header = {"descr": "'<f4'", "fortran_order": "False", "shape": f"({like.size},)"} | changes
    text = "{" + ", ".join(f"'{key}': {value}" for key, value in header.items()) + ", }"
    return (
        b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.encode("latin1").ljust(117) + b"\n" + like.tobytes()
    )


# Values.


@refused_as(NOT_FINITE)
def nan(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_value(rng, math.nan)


@refused_as(NOT_FINITE)
def infinity(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_value(rng, rng.choice([math.inf, -math.inf]))


@refused_as(NOT_FINITE)
def bfloat16_nan_by_its_bits(honest: Honest, rng: random.Random) -> RecordDict:
    bits = rng.choice([0x7F81, 0x7FC0, 0x7FFF, -1])
    array = honest.record().array_records[ARRAYS]["bfloat16"].numpy().copy()
    array[rng.randrange(array.size)] = bits
    return with_arrays(honest.record(), bfloat16=Array(array))


@refused_as(TOO_LARGE)
def bfloat16_huge_by_its_bits(honest: Honest, rng: random.Random) -> RecordDict:
    array = honest.record().array_records[ARRAYS]["bfloat16"].numpy().copy()
    array[rng.randrange(array.size)] = 0x7F7F
    return with_arrays(honest.record(), bfloat16=Array(array))


@refused_as(TOO_LARGE)
def huge(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_value(rng, rng.choice([1e30, -1e30, 3.4e38]))


@refused_as(TOO_LARGE)
def just_past_the_bound(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_value(rng, rng.choice([1, -1]) * 1.0001e6)


# Dtypes.


@refused_as(MALFORMED)
def half_precision(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(Array(honest.floats.astype(np.float16)))


@refused_as(MALFORMED)
def half_precision_by_name(honest: Honest, rng: random.Random) -> RecordDict:
    def named(layout: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**e, "dtype": "float16"} if e["dtype"] == "float32" else e for e in layout]

    return honest.with_layout(named, float16=Array(honest.floats.astype(np.float16)))


@refused_as(MALFORMED)
def another_dtype(honest: Honest, rng: random.Random) -> RecordDict:
    kind = rng.choice(["int64", "int32", "uint8", "bool", "complex64", "float64", ">f4"])
    return honest.with_array(Array(honest.floats.astype(kind)))


@refused_as(MALFORMED)
def text_for_numbers(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(Array(np.array([CANARY] * honest.floats.size)))


@refused_as(MALFORMED)
def objects_for_numbers(honest: Honest, rng: random.Random) -> RecordDict:
    data = npy(honest.floats, descr="'|O'")[:128] + pickle.dumps([CANARY] * honest.floats.size)
    return honest.with_array(raw(data, honest.floats))


@refused_as(MALFORMED)
def records_for_numbers(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(raw(npy(honest.floats, descr="[('a', '<f2'), ('b', '<f2')]"), honest.floats))


@refused_as(MALFORMED)
def doubles(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor.double())


@refused_as(DTYPE)
def swapped_dtypes(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, t: t.float() if t.dtype == torch.bfloat16 else t.bfloat16())


@refused_as(DTYPE)
def all_bfloat16(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor.bfloat16())


# Shapes.


@refused_as(SHAPE)
def broadcastable(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor.reshape(-1)[:1])


@refused_as(SHAPE)
def broadcastable_along_one_axis(honest: Honest, rng: random.Random) -> RecordDict:
    axis = rng.randrange(2)
    return honest.with_tensors(lambda slot, tensor: tensor.narrow(axis, 0, 1))


@refused_as(SHAPE)
def scalar(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor.reshape(-1)[0])


@refused_as(SHAPE)
def transposed(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor.T)


@refused_as(SHAPE)
def smaller(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor[:-1])


@refused_as(MALFORMED)
def larger(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: torch.zeros(5 + rng.randrange(9), 5 + tensor.shape[1]))


@refused_as(SHAPE)
def another_axis(honest: Honest, rng: random.Random) -> RecordDict:
    axis = rng.randrange(3)
    return honest.with_tensors(lambda slot, tensor: tensor.unsqueeze(axis))


@refused_as(SHAPE)
def a_hundred_axes(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor.reshape([1] * 98 + list(tensor.shape)))


@refused_as(SHAPE)
def nothing_in_every_tensor(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_tensors(lambda slot, tensor: tensor[:0])


# Keys.


@refused_as(KEYS)
def no_tensors_and_no_reason(honest: Honest, rng: random.Random) -> RecordDict:
    return to_record({}, honest.facts)


@refused_as(KEYS)
def missing_tensor(honest: Honest, rng: random.Random) -> RecordDict:
    left_out = rng.choice(sorted(honest.tensors))
    return to_record({slot: t for slot, t in honest.tensors.items() if slot != left_out}, honest.facts)


@refused_as(MALFORMED)
def extra_tensor(honest: Honest, rng: random.Random) -> RecordDict:
    return to_record({**honest.tensors, Slot(CANARY, HEAD): torch.ones(99)}, honest.facts)


@refused_as(KEYS)
def extra_tensor_of_nothing(honest: Honest, rng: random.Random) -> RecordDict:
    return to_record(
        {**honest.tensors, Slot(CANARY, rng.choice([LORA_A, HEAD, "shipped"])): torch.ones(0)}, honest.facts
    )


@refused_as(KEYS)
def renamed_tensor(honest: Honest, rng: random.Random) -> RecordDict:
    def other(slot: Slot) -> Slot:
        odd = [slot.path.upper(), slot.path + " ", slot.path.replace("e", "\u0435"), CANARY, "../" + slot.path, ""]
        return Slot(rng.choice(odd), slot.role)

    return to_record({other(slot): tensor for slot, tensor in list(honest.tensors.items())[:1]}, honest.facts)


@refused_as(KEYS)
def another_role(honest: Honest, rng: random.Random) -> RecordDict:
    role = rng.choice([HEAD, "side_A", CANARY])
    return to_record({Slot(slot.path, role + slot.role): t for slot, t in honest.tensors.items()}, honest.facts)


# The layout.


@refused_as(MALFORMED)
def layout_names_a_slot_twice(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_layout(
        lambda layout: [{**layout[0], "role": e["role"], "path": layout[0]["path"]} for e in layout]
    )


@refused_as(MALFORMED)
def layout_goes_past_its_array(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_entry(shape=[rng.choice([10**3, 10**11, 2**63, 10**300]), 2])


@refused_as(MALFORMED)
def layout_overlaps(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_layout(lambda layout: [{**layout[0], "offset": 0}, *({**e, "offset": 0} for e in layout)])


@refused_as(MALFORMED)
def layout_leaves_values_over(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_layout(lambda layout: layout[: rng.randrange(len(layout))])


@refused_as(MALFORMED)
def negative_dimension(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_entry(shape=rng.choice([[-1, 2], [-2, -6], [-1], [0, -1]]))


@refused_as(MALFORMED)
def dimension_that_is_no_count(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_entry(shape=rng.choice([[2.0, 6.0], ["2", "6"], [True, 12], [None], 12, "12", [[2], [6]], {}]))


@refused_as(MALFORMED)
def dimensions_without_end(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_entry(shape=[10**9] * 400)


@refused_as(MALFORMED)
def entry_of_other_things(honest: Honest, rng: random.Random) -> RecordDict:
    value = rng.choice([None, 7, [CANARY], {CANARY: 1}])
    return honest.with_entry(**{rng.choice(["path", "role", "dtype"]): value})


@refused_as(MALFORMED)
def entry_with_a_dtype_of_its_own(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_entry(dtype=rng.choice(["load", "__class__", "Tensor", "int16", CANARY, "bfloat16", "float64"]))


@refused_as(MALFORMED)
def layout_is_no_layout(honest: Honest, rng: random.Random) -> RecordDict:
    texts = ["", "[{", "7", "null", '"' + CANARY + '"', "[null]", "[[]]", "{}", "[" * 500, "[NaN]", '{"a":' * 300, "\0"]
    return honest.with_layout(lambda layout: rng.choice(texts))


@refused_as(MALFORMED, heavy=True)
def layout_is_nested_without_end(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_layout(lambda layout: "[" * 10**6)


@refused_as(MALFORMED, heavy=True)
def layout_of_many_tensors_of_nothing(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_layout(
        lambda layout: layout + [{**layout[0], "path": str(i), "shape": [0]} for i in range(20_000)]
    )


@refused_as(MALFORMED)
def layout_is_another_thing(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    text = str(record.config_records[LAYOUT][LAYOUT])
    others: list[Any] = [
        ConfigRecord({LAYOUT: text.encode()}),
        ConfigRecord({LAYOUT: [text]}),
        ConfigRecord({LAYOUT: text, CANARY: 1}),
        ConfigRecord({CANARY: text}),
        ConfigRecord({}),
        MetricRecord({LAYOUT: 1.0}),
        ArrayRecord({LAYOUT: Array(honest.floats)}),
    ]
    return with_records(record, **{LAYOUT: rng.choice(others)})


# The bytes of an array.


@refused_as(MALFORMED)
def archive_for_an_array(honest: Honest, rng: random.Random) -> RecordDict:
    stream = io.BytesIO()
    np.savez(stream, honest.floats)
    return honest.with_array(raw(stream.getvalue(), honest.floats))


@refused_as(MALFORMED, heavy=True)
def archive_that_unpacks_to_much(honest: Honest, rng: random.Random) -> RecordDict:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("float32.npy", npy(honest.floats) + bytes(80 * 2**20))
    return honest.with_array(raw(stream.getvalue(), honest.floats))


@refused_as(MALFORMED)
def pickle_for_an_array(honest: Honest, rng: random.Random) -> RecordDict:
    code = b"cbuiltins\nexit\n(S'" + CANARY.encode() + b"'\ntR."
    return honest.with_array(
        raw(rng.choice([code, pickle.dumps(CANARY), npy(honest.floats)[:128] + code]), honest.floats)
    )


@refused_as(MALFORMED)
def truncated_array(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(raw(npy(honest.floats)[: rng.randrange(128 + honest.floats.nbytes)], honest.floats))


@refused_as(MALFORMED)
def array_with_more_behind_it(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(raw(npy(honest.floats) + bytes(rng.randrange(1, 100)), honest.floats))


@refused_as(MALFORMED)
def header_claims_other_sizes(honest: Honest, rng: random.Random) -> RecordDict:
    sizes = ["(100000000000,)", "(-1,)", "(9223372036854775808,)", "()", "(2, 3)", "(0,)", "(1e3,)", "None", "(5, 5)"]
    return honest.with_array(raw(npy(honest.floats, shape=rng.choice(sizes)), honest.floats))


@refused_as(MALFORMED)
def header_and_record_claim_other_sizes(honest: Honest, rng: random.Random) -> RecordDict:
    size = rng.choice([2**31 - 1, -1, 0, 7])
    data = npy(honest.floats, shape=f"({size},)")
    return honest.with_array(Array(dtype="float32", shape=(size,), stype="numpy.ndarray", data=data))


@refused_as(MALFORMED)
def fortran_order(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(raw(npy(honest.floats, fortran_order="True"), honest.floats))


@refused_as(MALFORMED)
def later_format(honest: Honest, rng: random.Random) -> RecordDict:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, honest.floats, version=rng.choice([(2, 0), (3, 0)]))
    return honest.with_array(raw(stream.getvalue(), honest.floats))


@refused_as(MALFORMED)
def header_that_is_a_program(honest: Honest, rng: random.Random) -> RecordDict:
    words = ["__import__('os')", "1" + "+1" * 20, "(" * 30, "'" + CANARY + "'", "9**9**9", "\\d", "(6L,)", "{}[0]"]
    return honest.with_array(raw(npy(honest.floats, descr=rng.choice(words)), honest.floats))


@refused_as(MALFORMED)
def header_without_end(honest: Honest, rng: random.Random) -> RecordDict:
    text = b"(" * rng.choice([300, 5000, 65000])
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + honest.floats.tobytes()
    return honest.with_array(raw(data, honest.floats))


@refused_as(MALFORMED)
def lies_about_its_array(honest: Honest, rng: random.Random) -> RecordDict:
    size = honest.floats.size
    shape, dtype = rng.choice([((2, 3), "float32"), ((size,), "float64"), ((size,), CANARY), ((size - 1,), "float32")])
    return honest.with_array(Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=npy(honest.floats)))


@refused_as(MALFORMED)
def another_serialisation(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(raw(npy(honest.floats), honest.floats, stype=rng.choice(["torch", "pickle", CANARY, ""])))


@refused_as(MALFORMED)
def any_bytes(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(raw(rng.choice([b"", b"\0" * 200, rng.randbytes(216), b"\x93NUMPY"]), honest.floats))


@refused_as(MALFORMED)
def rows_for_a_flat_array(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_array(Array(honest.floats.reshape(2, -1)))


# Records.


@refused_as(MALFORMED)
def an_array_too_many(honest: Honest, rng: random.Random) -> RecordDict:
    return with_arrays(honest.record(), **{rng.choice(["float64", "load", CANARY, ""]): Array(np.zeros(0))})


@refused_as(MALFORMED)
def an_array_too_few(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    return with_records(record, **{ARRAYS: ArrayRecord({"float32": Array(honest.floats)})})


@refused_as(MALFORMED)
def no_records(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    for key in rng.choice([[ARRAYS], [LAYOUT], [FACTS], [ARRAYS, LAYOUT, FACTS]]):
        del record[key]
    return record


@refused_as(MALFORMED)
def two_replies_in_one(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    return with_records(record, **{CANARY: record[rng.choice([ARRAYS, LAYOUT, FACTS])]})


@refused_as(MALFORMED)
def metrics_beside_it(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    return with_records(
        record,
        **{"metrics": MetricRecord({"num-examples": rng.choice([-1, 0, math.nan, math.inf, 10**18, [1, 2], 0.5])})},
    )


@refused_as(MALFORMED, heavy=True)
def metrics_without_end(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    return with_records(record, **{FACTS: MetricRecord({f"{CANARY}-{i}": [1.0] * 1000 for i in range(500)})})


@refused_as(MALFORMED)
def records_of_another_kind(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    key = rng.choice([ARRAYS, FACTS])
    return with_records(record, **{key: rng.choice([MetricRecord({key: 1}), ConfigRecord({}), ArrayRecord({})])})


@refused_as(MALFORMED, heavy=True)
def a_hundred_thousand_keys(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    record[FACTS] = ConfigRecord(
        {FACTS: record.config_records[FACTS][FACTS], **{f"{CANARY}-{i}": 0 for i in range(10**5)}}
    )
    return record


@refused_as(MALFORMED, heavy=True)
def thousands_of_arrays(honest: Honest, rng: random.Random) -> RecordDict:
    nothing = Array(np.zeros(0, dtype=np.float32))
    return with_arrays(honest.record(), **dict.fromkeys((f"{CANARY}-{i}" for i in range(5000)), nothing))


@refused_as(MALFORMED, heavy=True)
def a_key_of_a_megabyte(honest: Honest, rng: random.Random) -> RecordDict:
    record = honest.record()
    long = CANARY + "k" * 2**20
    if rng.random() < 0.5:
        record[long] = ConfigRecord({})
        return record
    return honest.with_entry(path=long)


# Facts.


@refused_as(MALFORMED)
def facts_are_no_facts(honest: Honest, rng: random.Random) -> RecordDict:
    texts = ["", "{", "7", "null", "[]", f'"{CANARY}"', "NaN", "{'a': 1}", "\0", '{"client_id": ' + "9" * 5000 + "}"]
    return honest.with_facts(
        rng.choice([*texts, b"\xff\xfe" + CANARY.encode(), json.dumps(dict(honest.facts)).encode()])
    )


@refused_as(MALFORMED)
def facts_nested_deep(honest: Honest, rng: random.Random) -> RecordDict:
    """Around the depth that Python's own stack allows: what can be read there cannot always be written."""
    depth = rng.choice([100, 250, 500, *range(940, 1000), 1500, 4000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
    depth = min(depth, 9000 // (len(opened) + len(closed)))
    inside = opened * depth + ("1" if opened != "[" else "") + closed * depth
    return honest.with_facts(json.dumps(dict(honest.facts))[:-1] + f', "{CANARY}": {inside}' + "}")


@refused_as(MALFORMED)
def facts_without_end(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_facts(json.dumps(dict(honest.facts)) + " " * rng.choice([10_000, 10**6]))


@refused_as(MALFORMED)
def a_fact_too_many(honest: Honest, rng: random.Random) -> RecordDict:
    value = rng.choice([-1, 0, math.nan, math.inf, 1e18, [1], True, CANARY])
    return honest.record(**{rng.choice(["num_examples", "num-examples", "weight", "loss", CANARY]): value})


@refused_as(MALFORMED)
def a_fact_too_few(honest: Honest, rng: random.Random) -> RecordDict:
    left_out = rng.choice(sorted(honest.facts.keys() - {"signature"}))  # devices of earlier versions do not sign
    return honest.with_facts(json.dumps({key: v for key, v in honest.facts.items() if key != left_out}))


@refused_as(MALFORMED)
def a_fact_of_another_type(honest: Honest, rng: random.Random) -> RecordDict:
    key = rng.choice(["experiment_id", "client_id", "round_index", "task_sha256"])
    value = honest.facts[key]
    return honest.record(
        **{key: rng.choice([None, [value], {CANARY: value}, True, float("nan"), 10**3000, -1, CANARY])}
    )


@refused_as(MALFORMED)
def identity_written_otherwise(honest: Honest, rng: random.Random) -> RecordDict:
    key = rng.choice(["experiment_id", "task_sha256"])
    text = honest.facts[key]
    others = [text + "\n", text.upper() + "G", " " + text[1:], text[:-1], "\ud800" * len(text), "\u0660" * len(text)]
    return honest.record(**{key: rng.choice(others)})


@refused_as(MALFORMED)
def the_last_of_two_facts_lies(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.with_facts(json.dumps(dict(honest.facts))[:-1] + f', "client_id": "{CANARY}"' + "}")


@refused_as(MALFORMED)
def impossible_epsilon(honest: Honest, rng: random.Random) -> RecordDict:
    """Infinite ones too: no ledger has an infinite budget, and a checkpoint could not hold it."""
    return honest.record(epsilon=rng.choice([math.nan, -1.0, "1.0", math.inf, True, [1.0], 1e308, 10**400, -math.inf]))


@refused_as(MALFORMED)
def impossible_ledger(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.record(ledger_head=rng.choice(["", "../../etc/passwd", CANARY, 7, "g" * 64, ["ab" * 32], "ab" * 33]))


@refused_as(MALFORMED)
def reason_of_its_own(honest: Honest, rng: random.Random) -> RecordDict:
    return to_record(
        {}, {**honest.facts, "refused": rng.choice([CANARY, "", "Policy", 7, ["policy"], True, "deadline"])}
    )


@refused_as(MALFORMED)
def refusal_with_tensors(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.record(refused=rng.choice(["policy", "budget_exhausted", "not_enrolled"]), epsilon=0.0)


# What was not asked.


@refused_as("wrong_round")
def answer_to_another_round(honest: Honest, rng: random.Random) -> RecordDict:
    asked = honest.facts["round_index"]
    return honest.record(
        round_index=rng.choice([n for n in (asked - 1, asked + 1, 2**32 - 1, 0) if n >= 0 and n != asked])
    )


@refused_as("other_task")
def answer_to_another_task(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.record(task_sha256=rng.randbytes(32).hex())


@refused_as("other_experiment")
def answer_in_another_experiment(honest: Honest, rng: random.Random) -> RecordDict:
    return honest.record(experiment_id=rng.randbytes(16).hex())


@refused_as("other_client")
def answer_of_another_client(honest: Honest, rng: random.Random) -> RecordDict:
    asked = honest.facts["client_id"]
    return honest.record(client_id=rng.choice([n for n in (asked + 1, 0, 1, 2**32 - 1) if n != asked]))


@refused_as("no_reply")
def failure_with_words(honest: Honest, rng: random.Random) -> RecordDict:
    raise RuntimeError(CANARY)
