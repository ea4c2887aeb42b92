"""The wire: one typed header and raw frames.

A message is `b"RLD1" | u16 major | u16 minor | msgpack header`, then raw little-endian frames. The header is one of the
structs below, decoded by its tag; bulk data (token ids, log-probabilities, weights) lies in the frames. Anything that
cannot be read is a `ProtocolError`; nothing is ever unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from rolloutd.engine.sequence import RunningPolicy
from rolloutd.errors import ProtocolError, ProtocolMismatch
from rolloutd.outputs import FinishReason

MAGIC = b"RLD1"
MAJOR, MINOR = 1, 6
_PREFIX = struct.Struct("<4sHH")
MAX_FRAMES = 64
"""Frames after the header."""

Frame: TypeAlias = "bytes | bytearray | memoryview"


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all headers. `call` pairs a question with its answers; 0 where there is none."""

    call: int = 0
    client: str = ""
    """The sender's random id; the front fills in nothing for its own messages."""


class Hello(_Message, frozen=True):
    """First message of a client."""

    version: str


class Welcome(_Message, frozen=True):
    """Limits and identity of the daemon."""

    version: str
    pid: int
    incarnation: str
    boot_id: str
    max_message_bytes: int
    lease_s: float
    log_path: str | None


class Ping(_Message, frozen=True):
    """Renews the lease."""


class Bye(_Message, frozen=True):
    """Last message of a client: what it still waits for is cancelled, its place is free."""


class Health(_Message, frozen=True):
    """Asks for state and model."""


class HealthReply(_Message, frozen=True):
    """`state` is loading, ready, paused, failed or stopping; `info` the fields of `ModelInfo` once loaded."""

    state: str
    detail: str
    pid: int
    engine_pid: int
    uptime_s: float
    weight_version: int
    info: dict[str, Any] | None


class PromptItem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request: its text, or how many ids of the frame are its own. Defaults stay off the wire."""

    request_id: str
    text: str | None = None
    num_ids: int = 0
    params: int = 0
    """Index into the message's `params`."""
    min_version: int = 0
    """Of the weights that may compute its tokens; since version 1.3."""
    adapter: str | None = None
    """None is the policy; since version 1.4."""
    on_update: RunningPolicy | None = None
    """What an update does to it while it is in flight; since version 1.4."""


class Generate(_Message, frozen=True):
    """Requests. Frame 0: the prompts' token ids, int32, one after the other."""

    items: list[PromptItem]
    params: list[dict[str, Any]]


class CompletionItem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One completion; its tokens are the next `num_tokens` entries of each frame.

    Defaults stay off the wire: a peer of version 1.0 reads an answer that holds nothing that it did not ask for.
    """

    request_id: str
    index: int
    num_tokens: int
    finish_reason: FinishReason
    stop_reason: int | str | None
    text: str
    is_last: bool
    num_prompt_ids: int = 0
    """Ids of the prompt, sent where the daemon tokenised it; with the last completion."""
    num_prompt_logprobs: int = 0
    num_top: int = 0
    """Most likely tokens that travel with each token."""
    num_prompt_top: int = 0
    """Most likely tokens that travel with each prompt log-probability."""
    beam_score: float | None = None


class Completions(_Message, frozen=True):
    """Frames: token ids int32, logprobs f32, sampling logprobs f32, weight versions int64, prompt ids int32, prompt
    logprobs f32. Where an item has most likely tokens, four more: their ids int32 and log-probabilities f32, [tokens,
    num_top], then the same of the prompts, [prompt log-probabilities, num_prompt_top]; since version 1.1."""

    items: list[CompletionItem]


class Abort(_Message, frozen=True):
    """Ends requests of the sender; empty means all of them. With `samples`, only these of each, since version 1.1."""

    request_ids: list[str]
    samples: list[int] | None = None


class Stats(_Message, frozen=True):
    """Asks for the engine's counters."""


class StatsReply(_Message, frozen=True):
    """Fields of `EngineStats`."""

    stats: dict[str, Any]


class Pause(_Message, frozen=True):
    """New requests wait from now on, until `Resume` or until the sender is gone; what runs goes on."""


class Resume(_Message, frozen=True):
    """Ends every pause."""


class Sleep(_Message, frozen=True):
    """Gives the KV cache's memory back; with level 2 the weights' too."""

    level: int = 1


class WakeUp(_Message, frozen=True):
    """Brings the KV cache back."""


class Channel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A meeting of two processes by torch.distributed."""

    host: str
    port: int
    name: str
    backend: Literal["gloo", "nccl"] = "gloo"
    """Since version 1.6."""


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Memory of a GPU that the client shares; see `weights.device_memory.DeviceHandle`."""

    gpu: str
    num_bytes: int
    allocation: bytes
    offset: int
    peers: bool = False
    """It may be another GPU than the one that the daemon computes on."""


class WeightsBegin(_Message, frozen=True, omit_defaults=True):
    """Opens an update."""

    update_id: str
    kind: Literal["full", "lora"]
    base_digest: str | None = None
    """Of the base that deltas would refer to; `WeightsBegun` is then the answer. Since version 1.4."""
    channel: Channel | None = None
    """Where bytes will come from, if neither as frames nor in shared memory; since version 1.4."""


class WeightsBegun(_Message, frozen=True):
    """An update is open. Parameters named here are held as they were sent: deltas may refer to them."""

    names: list[str]


class StageItem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`num_bytes` of one tensor, from byte `offset` of it; in memory that is shared they begin at `at`.

    With an `encoding` they are a delta, which covers `covered` bytes of the tensor; since version 1.4.
    """

    name: str
    dtype: str
    shape: list[int]
    offset: int
    num_bytes: int
    at: int = 0
    encoding: Literal["positions", "bitmap"] | None = None
    covered: int = 0


class WeightsStage(_Message, frozen=True, omit_defaults=True):
    """Bytes of tensors: frame i belongs to item i, or all lie in the shared segment that is named, in the GPU's memory,
    or in what the channel brings next. Without items it asks whether the daemon can read that memory."""

    update_id: str
    items: list[StageItem]
    segment: str | None = None
    segment_bytes: int = 0
    channel_bytes: int = 0
    """Since version 1.4."""
    device: DeviceMemory | None = None
    """Since version 1.5."""


class WeightsCommit(_Message, frozen=True, omit_defaults=True):
    """Verify against these digests, then serve."""

    update_id: str
    digests: dict[str, int]
    num_bytes: int
    scaling: dict[str, float] | None
    mode: Literal["exact", "merged"]
    version: int | None
    running: RunningPolicy
    """`drain`: answered when what has begun is finished; since version 1.3."""
    adapter: str | None = None
    """Keep it under this name, beside the policy; since version 1.4."""


class WeightsAbort(_Message, frozen=True):
    """Drop an update."""

    update_id: str


class Parameter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One parameter under its Hugging Face name."""

    name: str
    dtype: str
    shape: list[int]


class BasePlan(_Message, frozen=True):
    """Asks how the base would lie in memory of the client, and where these parameters; since version 1.6."""

    parameters: list[Parameter]


class BasePlanned(_Message, frozen=True):
    """Answers: bytes of each piece of memory; of each parameter the piece and its first element there."""

    sizes: list[int]
    places: list[tuple[int, int]]
    base_version: int


class BaseToClient(_Message, frozen=True):
    """Reads the base from memory of the client's from now on; since version 1.6."""

    share_id: str
    memory: list[DeviceMemory]
    base_version: int


class BaseToDaemon(_Message, frozen=True):
    """Reads the base from the daemon's own memory again, if this is where it lies; since version 1.6."""

    share_id: str


class RemoveAdapter(_Message, frozen=True):
    """Forget an adapter that is kept beside the policy; since version 1.4."""

    adapter: str


class Done(_Message, frozen=True):
    """A call succeeded; `value` is its number, such as the new weight version."""

    value: int = 0


class Failed(_Message, frozen=True):
    """A call, or one request of it, failed."""

    code: str
    message: str
    request_id: str | None = None


class Beat(_Message, frozen=True):
    """The front lives, and so does the engine: `steps` is its step counter."""

    steps: int
    state: str


class EngineReady(_Message, frozen=True):
    """Engine to front: the model is loaded."""

    info: dict[str, Any]
    seconds: float


class EngineFailed(_Message, frozen=True):
    """Engine to front: the model cannot be loaded."""

    code: str
    message: str


class Submit(_Message, frozen=True):
    """Front to engine: checked requests, as in `Generate`."""

    items: list[PromptItem]
    params: list[dict[str, Any]]


class Stop(_Message, frozen=True):
    """Front to engine: end."""


Message: TypeAlias = (
    Hello
    | Welcome
    | Ping
    | Bye
    | Health
    | HealthReply
    | Generate
    | Completions
    | Abort
    | Stats
    | StatsReply
    | Pause
    | Resume
    | Sleep
    | WakeUp
    | WeightsBegin
    | WeightsBegun
    | WeightsStage
    | WeightsCommit
    | WeightsAbort
    | RemoveAdapter
    | BasePlan
    | BasePlanned
    | BaseToClient
    | BaseToDaemon
    | Done
    | Failed
    | Beat
    | EngineReady
    | EngineFailed
    | Submit
    | Stop
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message, frames: Sequence[Frame] = ()) -> list[Frame]:
    """Return the parts to send."""
    return [_PREFIX.pack(MAGIC, MAJOR, MINOR) + _encoder.encode(message), *frames]


def decode(parts: Sequence[Frame]) -> tuple[Message, list[memoryview]]:
    """Return header and frames; `ProtocolMismatch` for another protocol, `ProtocolError` for anything unreadable."""
    if not parts or len(parts) > MAX_FRAMES + 1:
        raise ProtocolError(f"a message of {len(parts)} parts; 1 to {MAX_FRAMES + 1} are allowed.")
    head = bytes(parts[0])
    if len(head) < _PREFIX.size or head[:4] != MAGIC:
        raise ProtocolError("a message that does not begin with RLD1. Is this a rolloutd client?")
    _, major, minor = _PREFIX.unpack_from(head)
    if major != MAJOR:
        raise ProtocolMismatch(
            f"peer speaks protocol {major}.{minor}, this side {MAJOR}.{MINOR}. "
            "Install the same rolloutd on both: pip install -U rolloutd."
        )
    try:
        message = _decoder.decode(head[_PREFIX.size :])
    except Exception as error:  # bad input raises DecodeError, ValidationError, UnicodeDecodeError or RecursionError
        raise ProtocolError(f"a header that cannot be read ({type(error).__name__}).") from None
    return message, [memoryview(part).cast("B") for part in parts[1:]]
