"""The process that holds the model: a plain loop that polls its socket between steps.

Started by the front as `python -m rolloutd.serve.engine_process`, with its options as JSON on standard input. It ends
with its parent.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from rolloutd.config import EngineConfig
from rolloutd.engine.garbage import relax_collector
from rolloutd.engine.sequence import Request
from rolloutd.errors import InternalError, ProtocolError, RolloutdError, UpdateConflict
from rolloutd.outputs import FinishedCompletion
from rolloutd.sampling_params import SamplingParams
from rolloutd.weights.cores import share_cores
from rolloutd.weights.delta import Delta
from rolloutd.weights.manifest import LoraSpec, TensorSpec, WeightManifest
from rolloutd.weights.shared_memory import Segment

from . import protocol as wire
from .arrays import join_finished, pack_finished, split_prompts
from .heartbeat import HeartbeatWriter
from .sockets import UNLIMITED_BYTES, configure

if TYPE_CHECKING:
    from rolloutd.engine.engine import Engine
    from rolloutd.weights.collective import Channel
    from rolloutd.weights.device_memory import DeviceHandle, DeviceSegment
    from rolloutd.weights.tensors import Bytes

log = logging.getLogger(__name__)

DEFAULT_FACTORY = "rolloutd.engine.engine:Engine.from_config"
_PR_SET_PDEATHSIG = 1
MAX_CHANNEL_BYTES = 64 << 20
"""Of one message's bytes by channel."""
MESSAGES_S = 0.01
"""For which messages may keep the next step waiting, the last of them aside."""


@dataclass(frozen=True, kw_only=True)
class EngineProcessOptions:
    """What the front passes on standard input."""

    engine: dict[str, Any]
    socket: str
    heartbeat: str
    parent_pid: int
    log_level: str
    factory: str = DEFAULT_FACTORY
    """module:callable that takes an `EngineConfig`; tests put an engine without a model here."""


class EngineLoop:
    """Takes the front's messages, steps the engine, sends what ends."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], heartbeat: HeartbeatWriter) -> None:
        self._engine = engine
        self._socket = socket
        self._heartbeat = heartbeat
        self._prompts: dict[str, list[int]] = {}
        """Prompt ids to send back with the last completion: those that were tokenised here."""
        self._in_flight: set[str] = set()
        self._committed = ("", 0)
        """The last update's id and version: a commit that comes again is answered as the first time."""
        self._draining: wire.WeightsCommit | None = None
        """A commit that waits until what has begun is finished."""
        self._segment: Segment | None = None
        self._device_segment: DeviceSegment | None = None
        self._base_segments: list[DeviceSegment] = []
        """A client's memory that the base lies in."""
        self._share_id = ""
        self._channel: Channel | None = None
        self._stopping = False

    def run(self) -> None:
        """Serve until told to stop. Blocks on the socket only when there is nothing to compute."""
        while not self._stopping:
            working = self._engine.can_step()
            if self._socket.poll(0 if working else 1_000):
                self._drain_socket()
            if self._draining is not None:
                self._end_drain(self._draining)
            if self._engine.can_step():
                self._step()

    def _drain_socket(self) -> None:
        """Take what has come, for `MESSAGES_S` at most where a step waits."""
        started = time.perf_counter()
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=True)
            except zmq.Again:
                return
            self._heartbeat.begin()  # a message that never ends is as bad as such a step
            self._handle(parts)
            self._heartbeat.end()
            is_late = time.perf_counter() - started > MESSAGES_S
            if self._stopping or (is_late and self._engine.can_step()):
                return

    def _step(self) -> None:
        self._heartbeat.begin()
        try:
            finished = self._engine.step()
        except Exception:  # one step fails, not the daemon: its requests are told, the next ones go on
            log.exception("step failed requests=%d", len(self._in_flight))
            self._fail_in_flight()
            finished = []
        self._heartbeat.end()
        for request_id, error in self._engine.take_failures().items():
            self._fail(request_id, error)
        self._send_finished(finished)

    def _end_drain(self, message: wire.WeightsCommit) -> None:
        """Do the commit that waits, if nothing that has begun is left."""
        if self._engine.drain(message.running):
            self._draining = None
            self._reply(message, [])

    def _fail_in_flight(self) -> None:
        error = InternalError("a step of the engine failed; the daemon's log holds the traceback. Report it.")
        for request_id in sorted(self._in_flight):
            self._engine.abort(request_id)
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: RolloutdError) -> None:
        self._in_flight.discard(request_id)
        self._prompts.pop(request_id, None)
        self._send(wire.Failed(code=error.code, message=error.message, request_id=request_id))

    def _send_finished(self, finished: list[FinishedCompletion]) -> None:
        if not finished:
            return
        packed = []
        for done in finished:
            packed.append(pack_finished(done, self._prompts.get(done.request_id, [])))
            if done.is_last:
                self._in_flight.discard(done.request_id)
                self._prompts.pop(done.request_id, None)
        items, frames = join_finished(packed)
        self._send(wire.Completions(items=items), frames)

    def _send(self, message: wire.Message, frames: list[bytes] | None = None) -> None:
        self._socket.send_multipart(wire.encode(message, frames or ()), copy=True)

    # ---------------------------------------------------------------- messages

    def _handle(self, parts: list[bytes]) -> None:
        self._reply(*wire.decode(parts))

    def _reply(self, message: wire.Message, frames: list[memoryview]) -> None:
        try:
            answer = self._answer(message, frames)
        except RolloutdError as error:
            answer = wire.Failed(call=message.call, code=error.code, message=error.message)
        except Exception:  # the front gets an answer whatever happens; the traceback stays here
            log.exception("message failed kind=%s", type(message).__name__)
            text = f"{type(message).__name__} failed; the daemon's log holds the traceback. Report it."
            answer = wire.Failed(call=message.call, code=InternalError.code, message=text)
        if answer is not None:
            self._send(answer)

    def _answer(self, message: wire.Message, frames: list[memoryview]) -> wire.Message | None:
        engine, done = self._engine, wire.Done(call=message.call)
        match message:
            case wire.Submit():
                self._submit(message, frames)
                return None
            case wire.Abort():
                for request_id in message.request_ids:
                    self._send_finished(engine.abort(request_id, message.samples))
                return done
            case wire.Stats():
                return wire.StatsReply(call=message.call, stats=asdict(engine.stats()))
            case wire.Sleep():
                engine.sleep(message.level)
                return done
            case wire.WakeUp():
                engine.wake_up()
                return done
            case wire.WeightsBegin():
                names = engine.begin_update(message.update_id, message.kind, message.base_digest)
                self._join(message)
                return done if message.base_digest is None else wire.WeightsBegun(call=message.call, names=names)
            case wire.WeightsStage():
                self._stage(message, frames)
                return done
            case wire.WeightsCommit():
                self._detach()
                if not engine.drain(message.running):
                    self._draining = message
                    return None
                try:
                    return wire.Done(call=message.call, value=self._commit(message))
                finally:
                    engine.end_drain()
            case wire.WeightsAbort():
                self._detach()
                self._drop_drain(message.update_id)
                engine.abort_update(message.update_id)
                return done
            case wire.BasePlan():
                plan, version = engine.plan_move(
                    [TensorSpec(p.name, p.dtype, tuple(p.shape)) for p in message.parameters]
                )
                return wire.BasePlanned(call=message.call, sizes=plan.sizes, places=plan.places, base_version=version)
            case wire.BaseToClient():
                self._base_to_client(message)
                return done
            case wire.BaseToDaemon():
                if message.share_id == self._share_id:
                    self._base_to_daemon()
                return done
            case wire.RemoveAdapter():
                engine.remove_adapter(message.adapter)
                return done
            case wire.Stop():
                self._stopping = True
                return None
            case _:
                raise ProtocolError(f"the engine takes no {type(message).__name__}.")

    def _drop_drain(self, update_id: str) -> None:
        waiting = self._draining
        if waiting is not None and waiting.update_id == update_id:
            self._draining = None
            self._engine.end_drain()
            text = f"update {update_id} was aborted while it waited for running requests. Push again."
            self._send(wire.Failed(call=waiting.call, code=UpdateConflict.code, message=text))

    def _submit(self, message: wire.Submit, frames: list[memoryview]) -> None:
        """Queue each request; one that is invalid fails alone."""
        params = [SamplingParams.from_dict(values) for values in message.params]
        for item, ids in zip(message.items, split_prompts(message.items, frames), strict=True):
            try:
                if ids is None:
                    ids = self._prompts[item.request_id] = self._engine.encode(item.text or "")
                how = item.min_version, item.adapter, item.on_update
                request = Request(item.request_id, tuple(ids), params[item.params], *how)
                self._engine.add_request(request)
                self._in_flight.add(item.request_id)
            except RolloutdError as error:
                self._prompts.pop(item.request_id, None)
                self._send(wire.Failed(code=error.code, message=error.message, request_id=item.request_id))

    def _join(self, message: wire.WeightsBegin) -> None:
        """Meet the trainer where it says, if its bytes come by a channel."""
        if message.channel is None:
            return
        from rolloutd.weights.collective import Channel, Meeting

        meeting = Meeting(**msgspec.structs.asdict(message.channel))
        if self._channel is not None and self._channel.meeting == meeting:
            return  # the begin came twice
        self._detach()
        try:
            self._channel = Channel.join(meeting, self._engine.info.device)
        except RolloutdError:
            self._engine.abort_update(message.update_id)
            raise

    def _receive(self, message: wire.WeightsStage) -> None:
        """Take what the channel brings next; it must be taken, also where it is then refused."""
        if self._channel is None:
            raise UpdateConflict(f"update {message.update_id} has no channel open. Push again.")
        if not 0 < message.channel_bytes <= MAX_CHANNEL_BYTES:
            raise ProtocolError(f"{message.channel_bytes} bytes by channel; 1 to {MAX_CHANNEL_BYTES} are allowed.")
        try:
            arrived = self._channel.receive(message.channel_bytes)
        except RolloutdError:
            self._detach()
            raise
        for item in message.items:
            self._stage_one(message.update_id, item, arrived[item.at : item.at + item.num_bytes])

    def _stage(self, message: wire.WeightsStage, frames: list[memoryview]) -> None:
        if message.channel_bytes:
            self._receive(message)
            return
        if message.device is not None:
            self._read_device(message, message.device)
            return
        if message.segment is None:
            if len(frames) != len(message.items):
                raise ProtocolError(f"{len(message.items)} tensors came with {len(frames)} frames.")
            for item, frame in zip(message.items, frames, strict=True):
                self._stage_one(message.update_id, item, frame)
            return
        segment = self._attached(message.segment, message.segment_bytes)
        for item in message.items:
            # Released also by an error: a segment with a view left on it cannot be closed.
            with segment.buffer[item.at : item.at + item.num_bytes] as data:
                self._stage_one(message.update_id, item, data)

    def _read_device(self, message: wire.WeightsStage, memory: wire.DeviceMemory) -> None:
        """Take what lies in a GPU's memory, which may be written to again when this returns."""
        handle = _handle(memory)
        if self._device_segment is None or self._device_segment.handle != handle:
            self._detach()
            self._device_segment = _mapped(handle, self._engine.info.device, peers=memory.peers)
        for item in message.items:
            data = self._device_segment.buffer[item.at : item.at + item.num_bytes]
            self._stage_one(message.update_id, item, data)
        self._device_segment.settle()

    def _base_to_client(self, message: wire.BaseToClient) -> None:
        """Let the base lie in a client's memory; where that fails it stays where it is."""
        segments: list[DeviceSegment] = []
        try:
            for memory in message.memory:
                segments.append(_mapped(_handle(memory), self._engine.info.device, peers=False))
            self._engine.move_into([segment.buffer for segment in segments], message.base_version)
        except BaseException:
            for segment in segments:
                segment.close()
            raise
        self._base_segments, self._share_id = segments, message.share_id
        segments[0].settle()  # the client moves its parameters there as soon as it has an answer

    def _base_to_daemon(self) -> None:
        """Let the base lie in the engine's memory again; the client may then do what it likes with its own."""
        self._engine.move_back()
        segments, self._base_segments, self._share_id = self._base_segments, [], ""
        for segment in segments:
            segment.settle()
            segment.close()

    def _attached(self, name: str, num_bytes: int) -> Segment:
        """Return a segment of shared memory, mapped from its first use on until the update ends."""
        if self._segment is None or (self._segment.name, self._segment.num_bytes) != (name, num_bytes):
            self._detach()
            self._segment = Segment.attach(name, num_bytes)
        return self._segment

    def _detach(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()
        device_segment, self._device_segment = self._device_segment, None
        if device_segment is not None:
            device_segment.close()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _stage_one(self, update_id: str, item: wire.StageItem, data: Bytes) -> None:
        if data.nbytes != item.num_bytes or min(item.shape, default=0) < 0 or item.at < 0:
            raise ProtocolError(f"{item.name}: {data.nbytes} bytes came, its header says {item.num_bytes}.")
        delta = None if item.encoding is None else Delta(item.encoding, item.covered)
        self._engine.stage(update_id, TensorSpec(item.name, item.dtype, tuple(item.shape)), item.offset, data, delta)

    def _commit(self, message: wire.WeightsCommit) -> int:
        if message.update_id == self._committed[0]:
            return self._committed[1]
        lora = None
        if message.scaling is not None:
            lora = LoraSpec(message.scaling, message.mode)
        started = time.perf_counter()
        manifest = WeightManifest(message.digests, message.num_bytes)
        version = self._engine.commit_update(
            message.update_id, manifest, lora, message.version, message.running, message.adapter
        )
        log.info(
            "weights version=%d kind=%s tensors=%d bytes=%d commit_s=%.3f digest=%s",
            version,
            "full" if lora is None else f"lora {message.adapter}" if message.adapter else "lora",
            len(message.digests),
            message.num_bytes,
            time.perf_counter() - started,
            manifest.digest,
        )
        self._committed = message.update_id, version
        return version


def _handle(memory: wire.DeviceMemory) -> DeviceHandle:
    from rolloutd.weights.device_memory import DeviceHandle

    return DeviceHandle(memory.gpu, memory.num_bytes, memory.allocation, memory.offset)


def _mapped(handle: DeviceHandle, device: str, *, peers: bool) -> DeviceSegment:
    from rolloutd.weights.device_memory import DeviceSegment

    return DeviceSegment.attach(handle, device, peers=peers)


def die_with_parent(parent_pid: int) -> None:
    """Ask Linux to kill this process when the thread that started it ends; end at once if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit(6)


def load_engine(options: EngineProcessOptions) -> Engine:
    """Return the engine that the factory makes."""
    module, _, name = options.factory.partition(":")
    factory: Any = importlib.import_module(module)
    for part in name.split("."):
        factory = getattr(factory, part)
    make: Callable[[EngineConfig], Engine] = factory
    return make(EngineConfig.from_dict(options.engine))


def main() -> None:
    """Load, report, serve."""
    options = EngineProcessOptions(**json.load(sys.stdin))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the front decides
    die_with_parent(options.parent_pid)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    heartbeat = HeartbeatWriter(Path(options.heartbeat))
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    configure(socket, UNLIMITED_BYTES)
    socket.connect(options.socket)
    started = time.perf_counter()
    try:
        engine = load_engine(options)
    except Exception as error:
        if not isinstance(error, RolloutdError):
            log.exception("loading failed")
            error = InternalError(f"loading the model failed with {type(error).__name__}; the log holds the traceback.")
        socket.setsockopt(zmq.LINGER, 2_000)
        socket.send_multipart(wire.encode(wire.EngineFailed(code=error.code, message=error.message)))
        socket.close()
        context.term()
        raise SystemExit(3) from None
    seconds = time.perf_counter() - started
    relax_collector()
    share_cores()
    socket.send_multipart(wire.encode(wire.EngineReady(info=asdict(engine.info), seconds=seconds)))
    EngineLoop(engine, socket, heartbeat).run()
    socket.close()
    context.term()


if __name__ == "__main__":
    main()
