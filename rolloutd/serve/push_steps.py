"""The messages of one weight update, made one at a time: whoever drives them decides on threads and waiting."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Collection, Generator, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, get_args

import torch

from rolloutd.engine.sequence import RunningPolicy
from rolloutd.errors import ConfigError, InternalError, ManifestMismatch, RolloutdError, check_choice, first_line
from rolloutd.weights.delta import encode, pieces
from rolloutd.weights.device_memory import DeviceSegment, is_shareable
from rolloutd.weights.manifest import TensorSpec
from rolloutd.weights.shared_memory import DIRECTORY, KeptSegment, available

from . import protocol as wire
from .buckets import (
    ALIGNMENT,
    Bucket,
    DeviceBucket,
    Digesting,
    InlineBucket,
    SentBucket,
    SentDeviceBucket,
    SharedBucket,
)
from .steps import PARTS, Answer, PushOptions, Step, Steps, Transport

if TYPE_CHECKING:
    from rolloutd.weights.collective import Channel
    from rolloutd.weights.delta import DeltaBase
    from rolloutd.weights.push import Push
    from rolloutd.weights.tensors import Bytes

log = logging.getLogger(__name__)

SEGMENT_BYTES = 32 << 20
"""Of shared memory in use, whatever the model's size: as much as stays in a processor's last cache."""
DEVICE_BYTES = 256 << 20
"""Of a GPU's memory in use: as much as keeps the copies longer than the messages about them."""
INLINE_BYTES = 16 << 20
"""Of one inline message."""
_REASONS_FOR_ANOTHER_WAY = {kind.code for kind in (ConfigError, ManifestMismatch, InternalError)}
"""What a way that cannot be gone fails with: no memory here, a daemon that cannot map it, or has not the means to."""


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
        device: str = "cpu",
        refused: set[Transport] | None = None,
        collective_address: str = "127.0.0.1",
    ) -> None:
        check_choice("transport", options.transport, get_args(Transport))
        check_choice("running", options.running, get_args(RunningPolicy))
        self._push = push
        self._options = options
        self._refused = set() if refused is None else refused
        """Transports that the daemon has refused, which are not tried again unless they are asked for."""
        self._ways = list(_ways(push, options, torch.device(device), self._refused, same_host=same_host))
        self._collective_address = collective_address
        self._inline_bytes = min(INLINE_BYTES, max_message_bytes // 4)
        self._update_id = secrets.token_hex(16)
        self._kept = segment
        self._delta_base = options.delta_base
        self._delta_names: frozenset[str] = frozenset()
        """Parameters that the daemon holds as they were sent."""

    @property
    def way(self) -> Transport:
        """How the bytes travel."""
        return self._ways[0][0]

    @property
    def reason(self) -> str:
        """Why so."""
        return self._ways[0][1]

    def steps(self) -> Steps:
        """Yield begin, stages and commit; after any error, also one that is thrown in, the abort."""
        try:
            with contextlib.ExitStack() as stack:  # what runs ahead is read until the commit waits for it
                channel = self._channel(stack)
                yield from self._begin(channel)
                bucket = yield from self._opened(stack, channel)
                yield from self._stages(bucket)
                yield from self._expect(self._commit(), [])
            if self._delta_base is not None:
                self._delta_base.digest = self._push.manifest().digest
        except GeneratorExit:
            raise
        except BaseException:
            yield Step(wire.WeightsAbort(update_id=self._update_id), [])
            raise

    def _channel(self, stack: contextlib.ExitStack) -> Channel | None:
        """Return the trainer's end of a channel for as long as the stack lasts, if that is how the bytes travel."""
        if self.way not in ("collective", "nccl"):
            return None
        from rolloutd.weights.collective import Channel

        device = self._push.device() if self.way == "nccl" else None
        return stack.enter_context(Channel.host(self._collective_address, device=device))

    def _begin(self, channel: Channel | None) -> Steps:
        """Open the update, and ask what deltas may refer to where there is something that they could."""
        base = self._delta_base
        digest = None if base is None or not base.digest else base.digest
        message = wire.WeightsBegin(update_id=self._update_id, kind=self._push.kind, base_digest=digest)
        answer = yield from self._expect(message, [])
        if channel is not None:  # the daemon comes while it is waited for
            where = wire.Channel(**asdict(channel.meeting))
            invitation = wire.WeightsBegin(update_id=self._update_id, kind=self._push.kind, channel=where)
            yield Step(invitation, [], runs_ahead=True)
            try:
                channel.connect()
            except RolloutdError:
                yield from self._expect(invitation, [])  # raises the daemon's reason, if it has given one
                raise
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

    def _opened(self, stack: contextlib.ExitStack, channel: Channel | None) -> Generator[Step, Answer, Bucket]:
        """Return a bucket of the first way that both sides can go."""
        if channel is not None and channel.device is not None:
            return SentDeviceBucket(self._update_id, DEVICE_BYTES // PARTS, channel)
        if channel is not None:
            return SentBucket(self._update_id, SEGMENT_BYTES // PARTS, channel)
        for (way, _), following in zip(self._ways, [*self._ways[1:], None], strict=True):
            failure: RolloutdError
            try:
                bucket = self._bucket(way, stack)
            except (OSError, RuntimeError) as error:
                failure = ConfigError(f"no memory for transport={way!r} ({first_line(error)}). Use another transport.")
            else:
                answer = (yield Step(*bucket.message())) if bucket.must_be_tried else None
                if not isinstance(answer, RolloutdError):
                    return bucket
                failure = answer
                self._refused.add(way)
            if following is None or failure.code not in _REASONS_FOR_ANOTHER_WAY:
                raise failure
            log.warning("weights cannot travel by=%s, they go by=%s reason=%s", way, following[0], failure.message)
        raise AssertionError("the last way returns or raises")

    def _bucket(self, way: Transport, stack: contextlib.ExitStack) -> Bucket:
        """Return a bucket whose memory lasts as long as the stack; `OSError` or `RuntimeError` where there is none."""
        total = self._push.total_bytes
        if way == "shared_memory":
            size = max(PARTS, SEGMENT_BYTES if total is None else min(SEGMENT_BYTES, total))
            return SharedBucket(self._update_id, stack.enter_context(self._kept.lend(size)))
        if way == "cuda_ipc":
            device = self._push.device()
            assert device is not None, "this way is chosen for tensors on a GPU"
            size = DEVICE_BYTES if total is None else min(DEVICE_BYTES, total)
            segment = stack.enter_context(DeviceSegment.create(size + -size % (PARTS * ALIGNMENT), device))
            return DeviceBucket(self._update_id, segment, peers=self._options.transport == "cuda_ipc")
        return InlineBucket(self._update_id, self._inline_bytes)

    def _stages(self, bucket: Bucket) -> Steps:
        for spec, tensor in self._push.tensors():
            (data, digest), before = bucket.opened(spec, tensor), bucket.num_bytes
            if self._delta_base is None:
                yield from self._dense(bucket, spec, 0, data, digest)
            else:
                yield from self._changed(bucket, spec, data, digest, self._delta_base)
            self._push.record(spec, digest.value, bucket.num_bytes - before)
        yield from self._flush(bucket)

    def _dense(self, bucket: Bucket, spec: TensorSpec, offset: int, data: Bytes, digest: Digesting) -> Steps:
        """Send bytes of a tensor from byte `offset` of it on."""
        num_taken = 0
        while num_taken < data.nbytes or data.nbytes == 0:
            num_taken += bucket.add(spec, offset + num_taken, data[num_taken:], digest)
            if bucket.is_full:
                yield from self._flush(bucket)
            if data.nbytes == 0:
                break

    def _changed(self, bucket: Bucket, spec: TensorSpec, data: Bytes, digest: Digesting, base: DeltaBase) -> Steps:
        """Send what changed of a tensor since it was sent last, and keep it as it is now."""
        assert isinstance(data, memoryview), "deltas are made in host memory"
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

    def _flush(self, bucket: Bucket) -> Steps:
        """Send what the bucket holds, if it is anything."""
        if not bucket.items:
            return
        answer = yield Step(*bucket.message(), runs_ahead=True)
        if isinstance(answer, RolloutdError):
            raise answer
        bucket.sent()
        bucket.clear()

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


def _ways(
    push: Push, options: PushOptions, daemon: torch.device, refused: Collection[Transport], *, same_host: bool
) -> Iterator[tuple[Transport, str]]:
    """Yield transports to try, the best first, each with its reason; `ConfigError` where one asked for cannot be."""
    transport = options.transport
    if transport == "shared_memory" and not (same_host and available()):
        raise ConfigError("transport='shared_memory' needs the daemon on this host and /dev/shm. Use auto or inline.")
    if transport == "cuda_ipc" and not (same_host and _are_on_gpus(push, options, daemon)):
        raise ConfigError(
            "transport='cuda_ipc' needs tensors on a GPU, the daemon on a GPU of this host, and no delta. Use auto."
        )
    if transport == "nccl" and not _are_on_gpus(push, options, daemon):
        raise ConfigError("transport='nccl' needs tensors on a GPU, the daemon on another one, and no delta. Use auto.")
    if transport != "auto":
        yield transport, "asked for"
        return
    tries_gpu = same_host and push.kind == "full" and "cuda_ipc" not in refused
    if tries_gpu and _are_on_gpus(push, options, daemon):
        yield "cuda_ipc", "trainer and daemon are on GPUs of this host"
    if same_host and available() and "shared_memory" not in refused:
        yield "shared_memory", "the daemon is on this host"
    reason = "the daemon cannot read shared memory" if available() else f"{DIRECTORY} cannot be written to"
    yield "inline", reason if same_host else "the daemon is on another host"


def _are_on_gpus(push: Push, options: PushOptions, daemon: torch.device) -> bool:
    if options.delta_base is not None or not is_shareable(daemon):
        return False
    device = push.device()
    return device is not None and is_shareable(device)
