from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNKNOWN: _ClassVar[Layout]
    LAYOUT_RELEASED: _ClassVar[Layout]
    LAYOUT_PEFT: _ClassVar[Layout]
    LAYOUT_CHECKPOINT: _ClassVar[Layout]
LAYOUT_UNKNOWN: Layout
LAYOUT_RELEASED: Layout
LAYOUT_PEFT: Layout
LAYOUT_CHECKPOINT: Layout

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("name", "method", "rounds_completed", "num_rounds", "epsilon_max", "last_line_unix_s", "ended")
    NAME_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_MAX_FIELD_NUMBER: _ClassVar[int]
    LAST_LINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    name: str
    method: str
    rounds_completed: int
    num_rounds: int
    epsilon_max: float
    last_line_unix_s: float
    ended: bool
    def __init__(self, name: _Optional[str] = ..., method: _Optional[str] = ..., rounds_completed: _Optional[int] = ..., num_rounds: _Optional[int] = ..., epsilon_max: _Optional[float] = ..., last_line_unix_s: _Optional[float] = ..., ended: _Optional[bool] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("from_round",)
    FROM_ROUND_FIELD_NUMBER: _ClassVar[int]
    from_round: int
    def __init__(self, from_round: _Optional[int] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("rounds_completed", "accuracy", "loss", "epsilon_max", "epsilon_median", "num_trained", "num_refused", "num_rejected", "cohort")
    ROUNDS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EPSILON_MAX_FIELD_NUMBER: _ClassVar[int]
    EPSILON_MEDIAN_FIELD_NUMBER: _ClassVar[int]
    NUM_TRAINED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    rounds_completed: int
    accuracy: float
    loss: float
    epsilon_max: float
    epsilon_median: float
    num_trained: int
    num_refused: int
    num_rejected: int
    cohort: _containers.RepeatedCompositeFieldContainer[AskedClient]
    def __init__(self, rounds_completed: _Optional[int] = ..., accuracy: _Optional[float] = ..., loss: _Optional[float] = ..., epsilon_max: _Optional[float] = ..., epsilon_median: _Optional[float] = ..., num_trained: _Optional[int] = ..., num_refused: _Optional[int] = ..., num_rejected: _Optional[int] = ..., cohort: _Optional[_Iterable[_Union[AskedClient, _Mapping]]] = ...) -> None: ...

class AskedClient(_message.Message):
    __slots__ = ("client_id", "status", "reason", "epsilon")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    client_id: int
    status: str
    reason: str
    epsilon: float
    def __init__(self, client_id: _Optional[int] = ..., status: _Optional[str] = ..., reason: _Optional[str] = ..., epsilon: _Optional[float] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("rounds_completed",)
    ROUNDS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    rounds_completed: int
    def __init__(self, rounds_completed: _Optional[int] = ...) -> None: ...

class AdapterPart(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: AdapterHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[AdapterHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class AdapterHeader(_message.Message):
    __slots__ = ("rounds_completed", "size_bytes", "sha256", "layout")
    ROUNDS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    rounds_completed: int
    size_bytes: int
    sha256: str
    layout: Layout
    def __init__(self, rounds_completed: _Optional[int] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., layout: _Optional[_Union[Layout, str]] = ...) -> None: ...
