from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FP32: _ClassVar[Codec]
    FP16: _ClassVar[Codec]
    INT8: _ClassVar[Codec]
FP32: Codec
FP16: Codec
INT8: Codec

class Envelope(_message.Message):
    __slots__ = ("version", "run", "session", "sequence", "register", "welcome", "draw", "smashed", "gradient", "ask", "weights", "report", "finish", "refusal")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DRAW_FIELD_NUMBER: _ClassVar[int]
    SMASHED_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    session: str
    sequence: int
    register: Register
    welcome: Welcome
    draw: Draw
    smashed: Smashed
    gradient: Gradient
    ask: Ask
    weights: Weights
    report: Report
    finish: Finish
    refusal: Refusal
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., session: _Optional[str] = ..., sequence: _Optional[int] = ..., register: _Optional[_Union[Register, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., draw: _Optional[_Union[Draw, _Mapping]] = ..., smashed: _Optional[_Union[Smashed, _Mapping]] = ..., gradient: _Optional[_Union[Gradient, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., weights: _Optional[_Union[Weights, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("shape", "codec", "data", "scales")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: Codec
    data: bytes
    scales: bytes
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., codec: _Optional[_Union[Codec, str]] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...

class NamedTensor(_message.Message):
    __slots__ = ("name", "tensor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensor: Tensor
    def __init__(self, name: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ("device", "images", "program_digest", "resumes", "serial")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    device: str
    images: int
    program_digest: str
    resumes: str
    serial: int
    def __init__(self, device: _Optional[str] = ..., images: _Optional[int] = ..., program_digest: _Optional[str] = ..., resumes: _Optional[str] = ..., serial: _Optional[int] = ...) -> None: ...

class Smashed(_message.Message):
    __slots__ = ("request", "queries", "keys")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    request: int
    queries: Tensor
    keys: Tensor
    def __init__(self, request: _Optional[int] = ..., queries: _Optional[_Union[Tensor, _Mapping]] = ..., keys: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("cpu_seconds", "resident_bytes", "baseline_bytes", "peak_bytes", "cgroup_peak_bytes", "steps", "encode_seconds", "learn_seconds", "joules", "idle_watts", "energy_seconds", "energy_method")
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASELINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CGROUP_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEARN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    IDLE_WATTS_FIELD_NUMBER: _ClassVar[int]
    ENERGY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENERGY_METHOD_FIELD_NUMBER: _ClassVar[int]
    cpu_seconds: float
    resident_bytes: int
    baseline_bytes: int
    peak_bytes: int
    cgroup_peak_bytes: int
    steps: int
    encode_seconds: float
    learn_seconds: float
    joules: float
    idle_watts: float
    energy_seconds: float
    energy_method: str
    def __init__(self, cpu_seconds: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., baseline_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., cgroup_peak_bytes: _Optional[int] = ..., steps: _Optional[int] = ..., encode_seconds: _Optional[float] = ..., learn_seconds: _Optional[float] = ..., joules: _Optional[float] = ..., idle_watts: _Optional[float] = ..., energy_seconds: _Optional[float] = ..., energy_method: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run", "session", "client", "program_digest", "program", "activations", "gradients", "seed", "drop_partial", "heartbeat_seconds")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DROP_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    run: str
    session: str
    client: int
    program_digest: str
    program: bytes
    activations: Codec
    gradients: Codec
    seed: int
    drop_partial: bool
    heartbeat_seconds: float
    def __init__(self, run: _Optional[str] = ..., session: _Optional[str] = ..., client: _Optional[int] = ..., program_digest: _Optional[str] = ..., program: _Optional[bytes] = ..., activations: _Optional[_Union[Codec, str]] = ..., gradients: _Optional[_Union[Codec, str]] = ..., seed: _Optional[int] = ..., drop_partial: bool = ..., heartbeat_seconds: _Optional[float] = ...) -> None: ...

class Draw(_message.Message):
    __slots__ = ("request", "step", "offset", "count")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    request: int
    step: int
    offset: int
    count: int
    def __init__(self, request: _Optional[int] = ..., step: _Optional[int] = ..., offset: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Gradient(_message.Message):
    __slots__ = ("request", "rate", "gradient", "share")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    request: int
    rate: float
    gradient: Tensor
    share: float
    def __init__(self, request: _Optional[int] = ..., rate: _Optional[float] = ..., gradient: _Optional[_Union[Tensor, _Mapping]] = ..., share: _Optional[float] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("request", "momentum_model", "velocity")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_MODEL_FIELD_NUMBER: _ClassVar[int]
    VELOCITY_FIELD_NUMBER: _ClassVar[int]
    request: int
    momentum_model: bool
    velocity: bool
    def __init__(self, request: _Optional[int] = ..., momentum_model: bool = ..., velocity: bool = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class Weights(_message.Message):
    __slots__ = ("request", "serial", "steps_taken", "tensors")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    STEPS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    request: int
    serial: int
    steps_taken: int
    tensors: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    def __init__(self, request: _Optional[int] = ..., serial: _Optional[int] = ..., steps_taken: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: int
    detail: str
    def __init__(self, reason: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...
