"""The messages of one weight update, made one at a time: whoever drives them decides on threads and waiting."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from rolloutd.engine.sequence import RunningPolicy
from rolloutd.errors import ConfigError, RolloutdError, check_choice
from rolloutd.weights.delta import Encoding, encode, pieces
from rolloutd.weights.digest import SHARED_CORES, Digest
from rolloutd.weights.manifest import TensorSpec
from rolloutd.weights.shared_memory import DIRECTORY, KeptSegment, Segment, available

from . import protocol as wire

if TYPE_CHECKING:
    from rolloutd.weights.delta import DeltaBase
    from rolloutd.weights.push import Push

log = logging.getLogger(__name__)

Transport = Literal["auto", "inline", "shared_memory", "collective"]


class Step(NamedTuple):
    """A message to send. Where the next one may be made before this one is answered, it `runs_ahead`.

    All others are sent once all before them are answered without an error; the abort in any case.
    """

    message: wire.Message
    frames: list[wire.Frame]
    runs_ahead: bool = False


Answer: TypeAlias = "wire.Message | RolloutdError | None"
"""To the step before, or to one that ran ahead; None where there is none to wait for."""
Steps: TypeAlias = "Generator[Step, Answer, None]"
"""Is sent answers; after an error nothing but the abort follows."""

SEGMENT_BYTES = 32 << 20
"""Of shared memory in use, whatever the model's size: as much as stays in a processor's last cache."""
SEGMENT_PARTS = 4
"""One part is filled while the daemon reads others, and while messages about others are on their way."""
RUN_AHEAD = SEGMENT_PARTS - 1
"""Messages that may wait for an answer while the next one is made."""
INLINE_BYTES = 16 << 20
"""Of one inline message."""


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a caller may say of an update; see `RolloutClient.update_weights`."""

    version: int | None
    running: RunningPolicy
    transport: Transport
    adapter: str | None = None
    """Keep it under this name, beside the policy."""
    delta_base: DeltaBase | None = None
    """What deltas refer to, if any are to be sent."""


class PushSteps:
    """Cuts an update into buckets. `steps` ends after the commit; errors are raised from it, after an abort."""

    def __init__(
        self,
        push: Push,
        options: PushOptions,
        *,
        same_host: bool,
        max_message_bytes: int,
        segment: KeptSegment,
        collective_address: str = "127.0.0.1",
    ) -> None:
        transport = options.transport
        check_choice("transport", transport, get_args(Transport))
        check_choice("running", options.running, get_args(RunningPolicy))
        if transport == "shared_memory" and not (same_host and available()):
            raise ConfigError(
                "transport='shared_memory' needs the daemon on this host and /dev/shm. Use auto or inline."
            )
        self._push = push
        self._options = options
        self.way, self.reason = _chosen(transport, same_host=same_host)
        """How the bytes travel, and why so."""
        self._shared = self.way == "shared_memory"
        self._collective_address = collective_address if transport == "collective" else None
        self._must_share = transport == "shared_memory"
        self._inline_bytes = min(INLINE_BYTES, max_message_bytes // 4)
        self._update_id = secrets.token_hex(16)
        self._kept = segment
        self._delta_base = options.delta_base
        self._delta_names: frozenset[str] = frozenset()
        """Parameters that the daemon holds as they were sent."""
        self._is_open = False
        """The daemon has taken a first piece."""

    def steps(self) -> Steps:
        """Yield begin, stages and commit; after any error, also one that is thrown in, the abort."""
        try:
            with contextlib.ExitStack() as stack:  # what runs ahead is read until the commit waits for it
                by = None if self._collective_address is None else _Sending(stack, self._collective_address)
                yield from self._begin(by)
                memory = by if by is not None else self._segment(stack) if self._shared else None
                yield from self._stages(memory)
                yield from self._expect(self._commit(), [])
            if self._delta_base is not None:
                self._delta_base.digest = self._push.manifest().digest
        except GeneratorExit:
            raise
        except BaseException:
            yield Step(wire.WeightsAbort(update_id=self._update_id), [])
            raise

    def _begin(self, by: _Sending | None) -> Steps:
        """Open the update, and ask what deltas may refer to where there is something that they could."""
        base = self._delta_base
        digest = None if base is None or not base.digest else base.digest
        message = wire.WeightsBegin(update_id=self._update_id, kind=self._push.kind, base_digest=digest)
        answer = yield from self._expect(message, [])
        if by is not None:  # the daemon comes while it is waited for
            invitation = wire.WeightsBegin(update_id=self._update_id, kind=self._push.kind, channel=by.invitation())
            yield Step(invitation, [], runs_ahead=True)
            by.connect()
        if base is not None:
            base.digest = ""  # until the commit nobody knows what the daemon holds
        if isinstance(answer, wire.WeightsBegun):
            self._delta_names = frozenset(answer.names)
        if digest is not None and not self._delta_names:
            log.warning(
                "no delta reason=daemon holds other weights than were sent last, or holds them in another dtype: "
                "everything is sent"
            )

    def _expect(self, message: wire.Message, frames: list[wire.Frame]) -> Generator[Step, Answer, Answer]:
        answer = yield Step(message, frames)
        if isinstance(answer, RolloutdError):
            raise answer
        return answer

    def _commit(self) -> wire.WeightsCommit:
        manifest, lora = self._push.manifest(), self._push.lora_spec
        return wire.WeightsCommit(
            update_id=self._update_id,
            digests=dict(manifest.digests),
            num_bytes=manifest.num_bytes,
            scaling=dict(lora.scaling) if lora is not None else None,
            mode=lora.mode if lora is not None else "exact",
            version=self._options.version,
            running=self._options.running,
            adapter=self._options.adapter,
        )

    def _stages(self, memory: Segment | _Sending | None) -> Steps:
        bucket = _Bucket(self._update_id, memory, self._inline_bytes)
        for spec, data in self._push.tensors():
            digest, before = Digest(spec, SHARED_CORES), bucket.num_bytes
            if self._delta_base is None:
                yield from self._dense(bucket, spec, 0, data, digest)
            else:
                yield from self._changed(bucket, spec, data, digest, self._delta_base)
            self._push.record(spec, digest.value(), bucket.num_bytes - before)
        yield from self._flush(bucket)

    def _dense(self, bucket: _Bucket, spec: TensorSpec, offset: int, data: memoryview, digest: Digest) -> Steps:
        """Send bytes of a tensor from byte `offset` of it on."""
        num_taken = 0
        while num_taken < data.nbytes or data.nbytes == 0:
            num_taken += bucket.add(spec, offset + num_taken, data[num_taken:], digest)
            if bucket.is_full:
                yield from self._flush(bucket)
            if data.nbytes == 0:
                break

    def _changed(self, bucket: _Bucket, spec: TensorSpec, data: memoryview, digest: Digest, base: DeltaBase) -> Steps:
        """Send what changed of a tensor since it was sent last, and keep it as it is now."""
        kept, is_known = base.tensor(spec)
        is_known = is_known and spec.name in self._delta_names
        if data.nbytes == 0:
            yield from self._dense(bucket, spec, 0, data, digest)
        for start, stop in pieces(spec):
            piece, old = data[start:stop], kept[start:stop]
            delta = encode(piece, old, spec.dtype) if is_known else None
            if delta is None or len(delta[1]) > bucket.capacity:
                yield from self._dense(bucket, spec, start, piece, digest)
                old[:] = piece
                continue
            digest.update(piece, old)
            if len(delta[1]) > bucket.num_free:
                yield from self._flush(bucket)
            bucket.add_delta(spec, start, piece.nbytes, *delta)
            if bucket.is_full:
                yield from self._flush(bucket)

    def _segment(self, stack: contextlib.ExitStack) -> Segment | None:
        """Return shared memory for as long as the stack lasts; None where there is none and the bytes may go inline."""
        total = self._push.total_bytes
        size = max(SEGMENT_PARTS, SEGMENT_BYTES if total is None else min(SEGMENT_BYTES, total))
        try:
            return stack.enter_context(self._kept.lend(size))
        except OSError as error:
            if self._must_share:
                raise ConfigError(
                    f"no {size} bytes of shared memory ({error.strerror}). Use transport='inline'."
                ) from None
            log.warning("shared memory unavailable reason=%s: weights travel inline", error.strerror)
            return None

    def _flush(self, bucket: _Bucket) -> Steps:
        """Send what the bucket holds; where the daemon cannot open the segment, the same bytes go inline.

        Whether it can shows with the first message, which is waited for.
        """
        if not bucket.items:
            return
        by = bucket.segment if isinstance(bucket.segment, _Sending) else None
        answer = yield Step(*bucket.message(), runs_ahead=self._is_open or by is not None)
        self._is_open = True
        if by is not None and not isinstance(answer, RolloutdError):
            by.send(bucket.filled())
        is_segment = bucket.segment is not None and by is None
        if isinstance(answer, RolloutdError) and is_segment and answer.code == "MANIFEST_MISMATCH":
            if self._must_share or "segment" not in answer.message:
                raise answer
            log.warning("daemon cannot open shared memory: weights travel inline")
            for message in bucket.inline_messages():
                yield from self._expect(*message)
            bucket.segment = None
        elif isinstance(answer, RolloutdError):
            raise answer
        bucket.clear()


def _chosen(transport: Transport, *, same_host: bool) -> tuple[Transport, str]:
    """Return the transport to take, and the reason."""
    if transport != "auto":
        return transport, "asked for"
    if not same_host:
        return "inline", "the daemon is on another host"
    if not available():
        return "inline", f"{DIRECTORY} cannot be written to"
    return "shared_memory", "the daemon is on this host"


class _Sending:
    """Memory that is sent to the daemon part by part, over a channel that lasts as long as the stack."""

    def __init__(self, stack: contextlib.ExitStack, address: str) -> None:
        from rolloutd.weights.collective import Channel

        self._channel = stack.enter_context(Channel.host(address))
        self.num_bytes = SEGMENT_BYTES
        self.buffer = memoryview(bytearray(self.num_bytes))

    def invitation(self) -> wire.Channel:
        """Return where the daemon is to come."""
        meeting = self._channel.meeting
        return wire.Channel(host=meeting.host, port=meeting.port, name=meeting.name)

    def connect(self) -> None:
        """Wait for the daemon; `TransportFailed` where it does not come."""
        self._channel.connect()

    def send(self, filled: memoryview) -> None:
        """Send what was filled, if it is anything."""
        if filled.nbytes:
            self._channel.send(filled)


class _Bucket:
    """Pieces of tensors, in a shared segment, in memory that is sent, or as frames."""

    def __init__(self, update_id: str, segment: Segment | _Sending | None, inline_bytes: int) -> None:
        self.segment = segment
        self.items: list[wire.StageItem] = []
        self._update_id = update_id
        self._inline_bytes = inline_bytes
        self._frames: list[wire.Frame] = []
        self._begin = self._used = 0
        """Where the bucket begins in the segment, and its bytes."""
        self.num_bytes = 0
        """Taken since the beginning of the update."""

    @property
    def capacity(self) -> int:
        """Bytes that an empty bucket takes."""
        return self.segment.num_bytes // SEGMENT_PARTS if self.segment is not None else self._inline_bytes

    @property
    def num_free(self) -> int:
        """Bytes that it still takes."""
        return self.capacity - self._used

    @property
    def is_full(self) -> bool:
        return self._used >= self.capacity or (self.segment is None and len(self.items) >= wire.MAX_FRAMES)

    def add(self, spec: TensorSpec, offset: int, data: memoryview, digest: Digest) -> int:
        """Take the beginning of `data`, as much as fits, into the digest too, and return how many bytes that is."""
        part = data[: self.num_free]
        if self.segment is not None:
            digest.update(part, self._room(part.nbytes))
        else:
            digest.update(part)
            self._frames.append(bytes(part))
        self._note(spec, offset, part.nbytes)
        return part.nbytes

    def add_delta(self, spec: TensorSpec, offset: int, covered: int, encoding: Encoding, data: bytearray) -> None:
        """Take a delta for `covered` bytes of a tensor; it fits into what is free."""
        if self.segment is not None:
            self._room(len(data))[:] = data
        else:
            self._frames.append(data)
        self._note(spec, offset, len(data), encoding, covered)

    def _room(self, num_bytes: int) -> memoryview:
        assert self.segment is not None, "frames have no room that is given"
        at = self._begin + self._used
        return self.segment.buffer[at : at + num_bytes]

    def filled(self) -> memoryview:
        """Return the memory that it has filled."""
        assert self.segment is not None, "frames fill no memory"
        return self.segment.buffer[self._begin : self._begin + self._used]

    def _note(
        self, spec: TensorSpec, offset: int, num_bytes: int, encoding: Encoding | None = None, covered: int = 0
    ) -> None:
        self.items.append(
            wire.StageItem(
                name=spec.name,
                dtype=spec.dtype,
                shape=list(spec.shape),
                offset=offset,
                num_bytes=num_bytes,
                at=self._used if isinstance(self.segment, _Sending) else self._begin + self._used,
                encoding=encoding,
                covered=covered,
            )
        )
        self._used += num_bytes
        self.num_bytes += num_bytes

    def message(self) -> tuple[wire.Message, list[wire.Frame]]:
        """Return what to send."""
        if self.segment is None:
            return wire.WeightsStage(update_id=self._update_id, items=self.items), list(self._frames)
        if isinstance(self.segment, _Sending):
            frames: list[wire.Frame] = [] if self._used else [b""] * len(self.items)
            return wire.WeightsStage(update_id=self._update_id, items=self.items, channel_bytes=self._used), frames
        message = wire.WeightsStage(
            update_id=self._update_id,
            items=self.items,
            segment=self.segment.name,
            segment_bytes=self.segment.num_bytes,
        )
        return message, []

    def inline_messages(self) -> list[tuple[wire.Message, list[wire.Frame]]]:
        """Return the segment's content as inline messages, one per piece."""
        assert self.segment is not None, "only a segment's content is sent again"
        return [
            (
                wire.WeightsStage(update_id=self._update_id, items=[item]),
                [bytes(self.segment.buffer[item.at : item.at + item.num_bytes])],
            )
            for item in self.items
        ]

    def clear(self) -> None:
        """Begin anew, in the next part."""
        self._begin = (self._begin + self.capacity) % (SEGMENT_PARTS * self.capacity)
        self.items, self._frames, self._used = [], [], 0
