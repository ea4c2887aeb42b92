"""The messages of one weight update, made one at a time: whoever drives them decides on threads and waiting."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Generator
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from rolloutd.errors import ConfigError, RolloutdError
from rolloutd.weights.digest import SHARED_CORES, Digest
from rolloutd.weights.manifest import TensorSpec
from rolloutd.weights.shared_memory import Segment, available

from . import protocol as wire

if TYPE_CHECKING:
    from rolloutd.weights.push import Push

log = logging.getLogger(__name__)

Transport = Literal["auto", "inline", "shared_memory"]


class Step(NamedTuple):
    """A message to send. Where the next one may be made before this one is answered, it `runs_ahead`: one at most."""

    message: wire.Message
    frames: list[wire.Frame]
    runs_ahead: bool = False


Steps: TypeAlias = "Generator[Step, RolloutdError | None, None]"
"""Is sent None, or the error of the step before or of one that ran ahead; then nothing but the abort follows."""

SEGMENT_BYTES = 64 << 20
"""Of shared memory in use at a time, whatever the model's size: one half is filled while the daemon reads the other."""
INLINE_BYTES = 16 << 20
"""Of one inline message."""


class PushSteps:
    """Cuts an update into buckets. `steps` ends after the commit; errors are raised from it, after an abort."""

    def __init__(
        self,
        push: Push,
        kind: Literal["full", "lora"],
        *,
        version: int | None,
        running: Literal["keep", "recompute", "drain", "abort"],
        transport: Transport,
        same_host: bool,
        max_message_bytes: int,
    ) -> None:
        mode = push.lora_spec.mode if push.lora_spec is not None else "exact"
        for name, value, allowed in (
            ("transport", transport, ("auto", "inline", "shared_memory")),
            ("running", running, ("keep", "recompute", "drain", "abort")),
            ("mode", mode, ("exact", "merged")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known. Use one of {', '.join(allowed)}.")
        if transport == "shared_memory" and not (same_host and available()):
            raise ConfigError(
                "transport='shared_memory' needs the daemon on this host and /dev/shm. Use auto or inline."
            )
        self._push = push
        self._kind = kind
        self._version = version
        self._running = running
        self._shared = transport != "inline" and same_host and available()
        self._must_share = transport == "shared_memory"
        self._inline_bytes = min(INLINE_BYTES, max_message_bytes // 4)
        self._update_id = secrets.token_hex(16)
        self._is_open = False
        """The daemon has taken a first piece."""

    def steps(self) -> Steps:
        """Yield begin, stages and commit; after any error, also one that is thrown in, the abort."""
        try:
            yield from self._expect(wire.WeightsBegin(update_id=self._update_id, kind=self._kind), [])
            with contextlib.ExitStack() as stack:  # what runs ahead is read until the commit waits for it
                yield from self._stages(stack.enter_context(self._segment()) if self._shared else None)
                yield from self._expect(self._commit(), [])
        except GeneratorExit:
            raise
        except BaseException:
            yield Step(wire.WeightsAbort(update_id=self._update_id), [])
            raise

    def _expect(self, message: wire.Message, frames: list[wire.Frame]) -> Steps:
        error = yield Step(message, frames)
        if error is not None:
            raise error

    def _commit(self) -> wire.WeightsCommit:
        manifest, lora = self._push.manifest(), self._push.lora_spec
        return wire.WeightsCommit(
            update_id=self._update_id,
            digests=dict(manifest.digests),
            num_bytes=manifest.num_bytes,
            scaling=dict(lora.scaling) if lora is not None else None,
            mode=lora.mode if lora is not None else "exact",
            version=self._version,
            running=self._running,
        )

    def _stages(self, segment: Segment | None) -> Steps:
        bucket = _Bucket(self._update_id, segment, self._inline_bytes)
        for spec, data in self._push.tensors():
            digest, offset = Digest(spec, SHARED_CORES), 0
            while offset < data.nbytes or data.nbytes == 0:
                offset += bucket.add(spec, offset, data[offset:], digest)
                if bucket.is_full:
                    yield from self._flush(bucket)
                if data.nbytes == 0:
                    break
            self._push.record(spec, digest.value())
        yield from self._flush(bucket)

    def _segment(self) -> contextlib.AbstractContextManager[Segment | None]:
        total = self._push.total_bytes
        size = SEGMENT_BYTES if total is None else max(2, min(SEGMENT_BYTES, 2 * total))
        try:
            return Segment.create(size)
        except OSError as error:
            if self._must_share:
                raise ConfigError(
                    f"no {size} bytes of shared memory ({error.strerror}). Use transport='inline'."
                ) from None
            log.warning("shared memory unavailable reason=%s: weights travel inline", error.strerror)
            return contextlib.nullcontext(None)

    def _flush(self, bucket: _Bucket) -> Steps:
        """Send what the bucket holds; where the daemon cannot open the segment, the same bytes go inline.

        Whether it can shows with the first message, which is waited for.
        """
        if not bucket.items:
            return
        error = yield Step(*bucket.message(), runs_ahead=self._is_open)
        self._is_open = True
        if error is not None and bucket.segment is not None and error.code == "MANIFEST_MISMATCH":
            if self._must_share or "segment" not in error.message:
                raise error
            log.warning("daemon cannot open shared memory: weights travel inline")
            for message in bucket.inline_messages():
                yield from self._expect(*message)
            bucket.segment = None
        elif error is not None:
            raise error
        bucket.clear()


class _Bucket:
    """Pieces of tensors, in a shared segment or as frames."""

    def __init__(self, update_id: str, segment: Segment | None, inline_bytes: int) -> None:
        self.segment = segment
        self.items: list[wire.StageItem] = []
        self._update_id = update_id
        self._inline_bytes = inline_bytes
        self._frames: list[bytes] = []
        self._begin = self._used = 0
        """Where the bucket begins in the segment, and its bytes."""

    @property
    def _capacity(self) -> int:
        return self.segment.num_bytes // 2 if self.segment is not None else self._inline_bytes

    @property
    def is_full(self) -> bool:
        return self._used >= self._capacity or (self.segment is None and len(self.items) >= wire.MAX_FRAMES)

    def add(self, spec: TensorSpec, offset: int, data: memoryview, digest: Digest) -> int:
        """Take the beginning of `data`, as much as fits, into the digest too, and return how many bytes that is."""
        part = data[: self._capacity - self._used]
        if self.segment is not None:
            at = self._begin + self._used
            digest.update(part, self.segment.buffer[at : at + part.nbytes])
        else:
            digest.update(part)
            self._frames.append(bytes(part))
        self.items.append(
            wire.StageItem(
                name=spec.name,
                dtype=spec.dtype,
                shape=list(spec.shape),
                offset=offset,
                num_bytes=part.nbytes,
                at=self._begin + self._used,
            )
        )
        self._used += part.nbytes
        return part.nbytes

    def message(self) -> tuple[wire.Message, list[wire.Frame]]:
        """Return what to send."""
        if self.segment is None:
            return wire.WeightsStage(update_id=self._update_id, items=self.items), list(self._frames)
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
        """Begin anew, in the other half."""
        if self.segment is not None:
            self._begin = self._capacity - self._begin
        self.items, self._frames, self._used = [], [], 0
