"""Flower records: what is sent arrives bit for bit, and nothing malformed is let in or breaks the reader."""

import io
import json
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlr.adapters.state import LORA_A, LORA_B, Slot
from fedlr.errors import InputError
from fedlr.flower.records import ARRAYS, LAYOUT, from_record, num_bytes, to_record
from fedlr.models.peft_state import read_adapter
from tests.training.small_models import small_model

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def tensors(*dtypes: torch.dtype) -> dict[Slot, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 2), (2, 3), (5,), (), (0, 3)]
    return {
        Slot(f"layer.{dtype}.{i}", LORA_A if i % 2 else LORA_B): torch.randn(shape, generator=generator).to(dtype)
        for dtype in dtypes
        for i, shape in enumerate(shapes)
    }


def same(left: dict[Slot, torch.Tensor], right: dict[Slot, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        t.dtype == right[s].dtype and t.shape == right[s].shape and bits(t) == bits(right[s]) for s, t in left.items()
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [DTYPES], ids=str)
def test_tensors_arrive_bit_for_bit_in_one_array_a_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    sent = tensors(*dtypes)
    record = to_record(sent)
    assert same(from_record(record), sent)
    assert len(record.array_records[ARRAYS]) == len(dtypes)


def test_tensors_survive_flowers_own_bytes() -> None:
    serde = pytest.importorskip("flwr.common.serde")  # not public: skipped where Flower moved it
    sent = {**tensors(*DTYPES), Slot("nan", LORA_A): torch.tensor([math.nan, math.inf, -0.0])}
    message = serde.recorddict_to_proto(to_record(sent)).SerializeToString()
    received = serde.recorddict_from_proto(serde.ProtoRecordDict.FromString(message))
    assert same(from_record(received), sent)
    assert num_bytes(sent.values()) < len(message) < num_bytes(sent.values()) + 4000


def test_an_adapter_travels_in_one_array() -> None:
    sent = read_adapter(small_model("bert")).tensors
    record = to_record(sent)
    assert same(from_record(record), dict(sent))
    (array,) = record.array_records[ARRAYS].values()
    assert num_bytes(sent.values()) == array.numpy().nbytes


def test_what_arrives_is_a_copy_that_may_be_written() -> None:
    sent = {Slot("x", LORA_A): torch.ones(3).expand(2, 3), Slot("y", LORA_A): torch.ones(2, 2).T}
    received = from_record(to_record(sent))
    received[Slot("x", LORA_A)].zero_()
    assert float(sent[Slot("x", LORA_A)].sum()) == 6
    assert same(from_record(to_record({})), {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_not_sent(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=str(dtype).removeprefix("torch.")):
        to_record({Slot("x", LORA_A): torch.ones(2).to(dtype)})


def entry(**changes: object) -> dict[str, object]:
    return {"path": "x", "role": LORA_A, "dtype": "float32", "shape": [2, 3], **changes}


def record(layout: object, **arrays: np.ndarray | Array) -> RecordDict:
    text = layout if isinstance(layout, str) else json.dumps(layout)
    found = {name: a if isinstance(a, Array) else Array(a) for name, a in arrays.items()}
    return RecordDict({ARRAYS: ArrayRecord(found), LAYOUT: ConfigRecord({LAYOUT: text})})


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(6,), stype=stype, data=data)


def npy(shape: str, descr: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(6, dtype=np.float32))
    return buffer.getvalue().replace(b"(6,), ", shape.encode()).replace(b"<f4", descr.encode())


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(6, dtype=np.float32))
    return buffer.getvalue()


SIX = np.arange(6, dtype=np.float32)
MALFORMED = {
    "empty": RecordDict(),
    "no layout": RecordDict({ARRAYS: ArrayRecord({"float32": Array(SIX)})}),
    "no arrays": RecordDict({LAYOUT: ConfigRecord({LAYOUT: json.dumps([entry()])})}),
    "layout of another kind": RecordDict({ARRAYS: ArrayRecord({}), LAYOUT: MetricRecord({LAYOUT: 1.0})}),
    "layout is bytes": RecordDict({ARRAYS: ArrayRecord({}), LAYOUT: ConfigRecord({LAYOUT: b"[]"})}),
    "layout is no json": record("[{", float32=SIX),
    "layout is nested too deep": record("[" * 100_000, float32=SIX),
    "layout is a number": record(3, float32=SIX),
    "layout is a mapping": record(entry(), float32=SIX),
    "layout is empty": record([], float32=SIX),
    "entry is a list": record([["x", LORA_A, "float32", [6]]], float32=SIX),
    "entry without shape": record([{"path": "x", "role": LORA_A, "dtype": "float32"}], float32=SIX),
    "path is a number": record([entry(path=3)], float32=SIX),
    "role is null": record([entry(role=None)], float32=SIX),
    "dtype is a list": record([entry(dtype=["float32"])], float32=SIX),
    "dtype is not sent": record([entry(dtype="float64")], float32=SIX),
    "dtype is no dtype": record([entry(dtype="load")], load=SIX),
    "dtype is another": record([entry(dtype="bfloat16")], bfloat16=SIX),
    "dtype is of integers": record([entry()], float32=np.arange(6)),
    "byte order is another": record([entry()], float32=SIX.astype(">f4")),
    "shape is a number": record([entry(shape=6)], float32=SIX),
    "shape is text": record([entry(shape="6")], float32=SIX),
    "shape has a fraction": record([entry(shape=[2.0, 3.0])], float32=SIX),
    "shape has a truth value": record([entry(shape=[True, 6])], float32=SIX),
    "shape is negative": record([entry(shape=[-2, -3])], float32=SIX),
    "shape is inferred": record([entry(shape=[-1, 3])], float32=SIX),
    "shape is too large": record([entry(shape=[2, 4])], float32=SIX),
    "shape is too small": record([entry(shape=[5])], float32=SIX),
    "shape overflows": record([entry(shape=[2**62, 2**62])], float32=SIX),
    "slot comes twice": record([entry(shape=[3]), entry(shape=[3])], float32=SIX),
    "array without entries": record([entry()], float32=SIX, float64=np.zeros(2)),
    "array of rows": record([entry()], float32=SIX.reshape(2, 3)),
    "array of no axis": record([entry(shape=[])], float32=np.array(1, dtype=np.float32)),
    "array of text": record([entry()], float32=np.array(["abcdef"] * 6)),
    "array of bytes that are none": record([entry()], float32=raw(b"\x93NUMPY")),
    "array of nothing": record([entry()], float32=raw(b"")),
    "array of zeros": record([entry()], float32=raw(b"\0" * 1000)),
    "array is an archive": record([entry()], float32=raw(npz())),
    "array is half an archive": record([entry()], float32=raw(npz()[:60])),
    "array claims more than it holds": record([entry()], float32=raw(npy("(9999999999,),"))),
    "array claims objects": record([entry()], float32=raw(npy("(6,), ", "|O8"))),
    "array is of another stype": record([entry()], float32=raw(npy("(6,), "), "safetensors")),
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED)
def test_malformed_records_are_refused(bad: RecordDict) -> None:
    with pytest.raises(InputError, match="Expected a packed adapter record"):
        from_record(bad)


def test_a_well_formed_record_of_the_same_kind_is_read() -> None:
    read = from_record(record([entry(), entry(role=LORA_B, shape=[0])], float32=SIX))
    assert torch.equal(read[Slot("x", LORA_A)], torch.arange(6.0).reshape(2, 3))
    assert from_record(record([entry()], float32=raw(npy("(6,), "))))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "path": st.sampled_from(["x", "y"]) | JSON,
        "role": st.sampled_from([LORA_A, LORA_B]) | JSON,
        "dtype": st.sampled_from(["float32", "bfloat16"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(layout=st.lists(ENTRY | JSON, max_size=4) | JSON)
def test_any_layout_is_read_whole_or_refused(layout: object) -> None:
    sent = record(layout, float32=SIX, bfloat16=np.zeros(4, dtype=np.int16))
    try:
        received = from_record(sent)
    except InputError:
        return
    assert num_bytes(received.values()) == 6 * 4 + 4 * 2


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300) | st.binary(max_size=8).map(lambda cut: npy("(6,), ")[: 120 + len(cut)] + cut))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        received = from_record(record([entry()], float32=raw(data)))
    except InputError:
        return
    assert next(iter(received.values())).shape == (2, 3)
