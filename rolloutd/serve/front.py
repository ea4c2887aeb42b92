"""The process that clients talk to: sockets, leases, limits, answers kept for a retry. No torch: up in well under 1 s.

It answers what is invalid at once, hands the rest to the engine process, and tells every waiting client each second
that it lives and how far the engine is. When the engine dies or stalls, every request in flight gets a named error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from rolloutd.config import ServerConfig
from rolloutd.engine.admission import check_request
from rolloutd.engine.sequence import Request
from rolloutd.errors import (
    EngineDied,
    EngineLoading,
    EngineStalled,
    InternalError,
    ProtocolError,
    QueueFull,
    RequestError,
    RolloutdError,
    ShuttingDown,
    error_from_wire,
)
from rolloutd.outputs import ModelInfo
from rolloutd.sampling_params import SamplingParams
from rolloutd.version import __version__
from rolloutd.weights.shared_memory import available, reclaim_stale

from . import protocol as wire
from .arrays import Finished, join_finished, join_prompts, split_finished, split_prompts
from .clients import Clients, ClientState, Requests, RequestState, fingerprint
from .engine_host import EngineHost
from .rundir import boot_id

log = logging.getLogger(__name__)

BEAT_S = 1.0
SEND_TIMEOUT_MS = 1_000
FAILED_LINGER_S = 3.0
"""After a model could not be loaded: time for clients that are about to ask to learn why."""
EXIT_LOAD_FAILED, EXIT_ENGINE_DIED, EXIT_GRACE_EXCEEDED = 3, 6, 7
MAX_REQUEST_ID = 64
"""Characters; clients send 32 hex digits."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the daemon says of itself."""

    pid: int
    incarnation: str
    log_path: str | None


@dataclass(slots=True)
class _Held:
    """A request that waits for the model to load or for a pause to end."""

    item: wire.PromptItem
    ids: list[int] | None
    params: SamplingParams
    state: RequestState


class Front:
    """One daemon's front. `run` serves until asked to stop or until the engine is gone, and returns the exit code."""

    def __init__(
        self, socket: zmq.asyncio.Socket, engine: EngineHost, config: ServerConfig, identity: Identity
    ) -> None:
        self._socket = socket
        self._socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
        self._engine = engine
        self._config = config
        self._identity = identity
        self._clients = Clients(max_clients=config.max_clients, lease_s=config.lease_s)
        self._requests = Requests()
        self._held: list[_Held] = []
        self._calls: dict[int, tuple[str, int]] = {}
        self._policy_commits: set[int] = set()
        """Calls of those that give the policy a new version, and not an adapter beside it."""
        self._next_call = 1
        self._info: ModelInfo | None = None
        self._error: RolloutdError | None = None
        self._weight_version = 0
        self._started = time.monotonic()
        self._exit: asyncio.Future[int] | None = None
        self._idle = asyncio.Event()
        """Set when the last request in flight is answered, or cut off, once `stop` waits for it."""
        self._late_beats = 0
        self.ready = asyncio.Event()
        self.load_seconds = 0.0

    @property
    def state(self) -> str:
        """loading, ready, paused, failed or stopping."""
        if self._error is not None:
            return "stopping" if isinstance(self._error, ShuttingDown) else "failed"
        if self._info is None:
            return "loading"
        return "paused" if self._clients.is_paused() else "ready"

    @property
    def error(self) -> RolloutdError | None:
        """Why the daemon stops or has failed."""
        return self._error

    @property
    def info(self) -> ModelInfo | None:
        """The model, once it is loaded."""
        return self._info

    async def run(self) -> int:
        """Serve, and return the exit code."""
        self._exit = asyncio.get_running_loop().create_future()
        loops = (self._serve_clients, self._serve_engine, self._watch_engine, self._beat)
        tasks = [asyncio.create_task(self._guard(loop())) for loop in loops]
        try:
            return await self._exit
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self, grace_s: float) -> None:
        """Take no new work, let what runs finish for `grace_s`, cancel the rest by name, end."""
        if isinstance(self._error, ShuttingDown):
            return
        self._error = ShuttingDown("the daemon is stopping and takes no new work. Start it again, or use another one.")
        await self._fail_held()
        if len(self._requests):
            self._idle.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        if not isinstance(self.error, ShuttingDown):
            return  # the engine died meanwhile, and everybody knows
        left = len(self._requests)
        await self._fail_all(ShuttingDown(f"the daemon stopped; --grace {grace_s:g} s was too short for this request."))
        self._end(EXIT_GRACE_EXCEEDED if left else 0)

    def stop_waiting(self) -> None:
        """Cut short the grace of `stop`: the second Ctrl-C. What runs is still told."""
        self._idle.set()

    def _end(self, code: int) -> None:
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(code)

    async def _guard(self, loop: Any) -> None:
        """A loop of ours that fails is a defect: say so and end, rather than hang half alive."""
        try:
            await loop
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("front loop failed")
            self._end(70)

    # ----------------------------------------------------------------- clients

    async def _serve_clients(self) -> None:
        while True:
            parts: list[bytes] = await self._socket.recv_multipart()
            routing_id, payload = parts[0], parts[1:]
            call = 0
            try:
                message, frames = wire.decode(payload)
                call = message.call
                state = self._clients.heard(message.client, routing_id)
                await self._handle(state, message, frames)
            except RolloutdError as error:
                await self._send(routing_id, wire.Failed(call=call, code=error.code, message=error.message))
            except Exception:  # one message fails, not the daemon
                log.exception("message failed")
                text = "the front failed on this message; the daemon's log holds the traceback. Report it."
                await self._send(routing_id, wire.Failed(call=call, code=InternalError.code, message=text))

    async def _handle(self, state: ClientState, message: wire.Message, frames: list[memoryview]) -> None:
        match message:
            case wire.Hello():
                await self._reply(state, self._welcome(message))
            case wire.Ping():
                return
            case wire.Bye():
                await self._client_gone(state.client, "closed")
            case wire.Health():
                await self._reply(state, self._health(message))
            case wire.Generate():
                await self._generate(state, message, frames)
            case wire.Abort():
                await self._abort(state, message)
            case wire.Pause():
                state.holds_pause = True
                await self._reply(state, wire.Done(call=message.call))
            case wire.Resume():
                self._clients.end_pause()
                await self._release_held()
                await self._reply(state, wire.Done(call=message.call))
            case (
                wire.Stats()
                | wire.Sleep()
                | wire.WakeUp()
                | wire.WeightsBegin()
                | wire.WeightsStage()
                | wire.WeightsCommit()
                | wire.WeightsAbort()
                | wire.RemoveAdapter()
                | wire.BasePlan()
                | wire.BaseToClient()
                | wire.BaseToDaemon()
            ):
                await self._forward(state, message, frames)
            case _:
                raise ProtocolError(f"a client does not send {type(message).__name__}.")

    def _welcome(self, message: wire.Hello) -> wire.Welcome:
        return wire.Welcome(
            call=message.call,
            version=__version__,
            pid=self._identity.pid,
            incarnation=self._identity.incarnation,
            boot_id=boot_id(),
            max_message_bytes=self._config.max_message_bytes,
            lease_s=self._config.lease_s,
            log_path=self._identity.log_path,
        )

    def _health(self, message: wire.Health) -> wire.HealthReply:
        return wire.HealthReply(
            call=message.call,
            state=self.state,
            detail=str(self._error) if self._error is not None else "",
            pid=self._identity.pid,
            engine_pid=self._engine.pid,
            uptime_s=time.monotonic() - self._started,
            weight_version=self._weight_version,
            info=msgspec.to_builtins(self._info) if self._info is not None else None,
        )

    async def _forward(self, state: ClientState, message: wire.Message, frames: list[memoryview]) -> None:
        """Hand a control message to the engine under a call number of ours."""
        if self._error is not None:
            raise self._error
        if self._info is None:
            raise EngineLoading("the model is still loading. Wait until health() says ready.")
        if isinstance(message, wire.WeightsBegin):
            state.update_id = message.update_id
        if isinstance(message, wire.BaseToClient):
            state.share_id = message.share_id
        if isinstance(message, wire.BaseToDaemon):
            state.share_id = None
        number, self._next_call = self._next_call, self._next_call + 1
        self._calls[number] = (state.client, message.call)
        state.calls += 1
        if isinstance(message, wire.WeightsCommit) and message.adapter is None:
            self._policy_commits.add(number)
        await self._engine.send(msgspec.structs.replace(message, call=number, client=""), list(frames))

    async def _generate(self, state: ClientState, message: wire.Generate, frames: list[memoryview]) -> None:
        """Check each request; the invalid ones fail alone."""
        prompts = split_prompts(message.items, frames)
        accepted = []
        parsed: dict[int, SamplingParams] = {}
        for item, ids in zip(message.items, prompts, strict=True):
            try:
                held = self._accept(state, message, item, ids, parsed)
            except RolloutdError as error:
                await self._fail_item(state, message.call, item.request_id, error)
                continue
            if held is not None:
                accepted.append(held)
                continue
            known = self._requests.find(item.request_id, _mark(item, ids, message.params[item.params]))
            if known is not None:
                await self._attach(state, message.call, known)
        self._held += accepted
        await self._release_held()

    def _accept(
        self,
        state: ClientState,
        message: wire.Generate,
        item: wire.PromptItem,
        ids: list[int] | None,
        parsed: dict[int, SamplingParams],
    ) -> _Held | None:
        """Return a new request, None for one that is known already; raise for one that cannot run.

        `parsed` keeps the message's parameters by number: they may be long, and many prompts share them.
        """
        if self._error is not None:
            raise self._error
        if not 0 < len(item.request_id) <= MAX_REQUEST_ID:
            raise ProtocolError(
                f"a request id of {len(item.request_id)} characters; 1 to {MAX_REQUEST_ID} are allowed."
            )
        if not 0 <= item.params < len(message.params):
            raise ProtocolError(f"request {item.request_id} names params {item.params} of {len(message.params)}.")
        values = message.params[item.params]
        params = parsed.get(item.params) or SamplingParams.from_dict(values)
        parsed[item.params] = params
        if item.text is not None and not item.text:
            raise RequestError("the prompt is empty. Send at least one character or token.")
        if ids is not None and self._info is not None:
            check_request(Request(item.request_id, tuple(ids), params), self._info)
        mark = _mark(item, ids, values)
        if self._requests.find(item.request_id, mark) is not None:
            return None
        if len(self._requests) >= self._config.max_queued_requests:
            raise QueueFull(
                f"{len(self._requests)} requests are queued, --max-queued-requests is "
                f"{self._config.max_queued_requests}. Send again later, or raise it."
            )
        request = RequestState(item.request_id, state.client, message.call, mark)
        self._requests.add(request)
        state.request_ids.add(item.request_id)
        return _Held(item, ids, params, request)

    async def _attach(self, state: ClientState, call: int, request: RequestState) -> None:
        """Answer a retry: what is finished now, the rest as it comes."""
        request.client, request.call = state.client, call
        if not request.is_complete:
            state.request_ids.add(request.request_id)
        if request.finished:
            items, frames = join_finished(request.finished)
            await self._reply(state, wire.Completions(call=call, items=items), frames)

    async def _release_held(self) -> None:
        """Send held requests to the engine, if it is ready and not paused."""
        if self._info is None or not self._held or self._clients.is_paused():
            return
        held, self._held = self._held, []
        items: list[wire.PromptItem] = []
        numbers: dict[SamplingParams, int] = {}
        prompts: list[list[int]] = []
        for one in held:
            if self._requests.get(one.item.request_id) is not one.state:
                continue  # aborted meanwhile
            try:
                if one.ids is not None:
                    check_request(Request(one.item.request_id, tuple(one.ids), one.params), self._info)
            except RolloutdError as error:
                await self._fail_request(one.state, error)
                continue
            number = numbers.setdefault(one.params, len(numbers))
            items.append(msgspec.structs.replace(one.item, params=number))
            prompts.append(one.ids or [])
        if items:
            params = [one.to_dict() for one in numbers]
            await self._engine.send(wire.Submit(items=items, params=params), [join_prompts(prompts)])

    async def _abort(self, state: ClientState, message: wire.Abort) -> None:
        mine = state.request_ids
        wanted = [i for i in message.request_ids if i in mine] if message.request_ids else list(mine)
        if message.samples is None:
            await self._abort_requests(wanted, tell=True)
        elif any(one.item.request_id in wanted for one in self._held):
            raise RequestError("samples of a request that has not begun cannot be aborted. Abort it as a whole.")
        elif wanted and self._info is not None:
            await self._engine.send(wire.Abort(request_ids=wanted, samples=message.samples))
        await self._reply(state, wire.Done(call=message.call, value=len(wanted)))

    async def _abort_requests(self, request_ids: Sequence[str], *, tell: bool) -> None:
        """End requests: those still held here by a failure, the engine's by `abort` completions."""
        held = {one.item.request_id: one for one in self._held}
        self._held = [one for one in self._held if one.item.request_id not in set(request_ids)]
        for request_id in request_ids:
            if request_id in held and tell:
                await self._fail_request(held[request_id].state, RequestError("aborted before it began."))
            elif not tell:
                self._forget(request_id)
        if self._info is not None and request_ids:
            await self._engine.send(wire.Abort(request_ids=[i for i in request_ids if i not in held]))

    async def _client_gone(self, client: str, reason: str) -> None:
        """Cancel what a dead client asked for and close its update."""
        state = self._clients.remove(client)
        if state is None:
            return
        level = logging.DEBUG if reason == "closed" else logging.INFO
        log.log(level, "client lost reason=%s requests=%d", reason, len(state.request_ids))
        if reason != "closed" and available():
            reclaim_stale()  # of one that was killed
        await self._abort_requests(sorted(state.request_ids), tell=False)
        if state.update_id is not None and self._info is not None and self._error is None:
            log.info("update closed reason=client_lost update=%s", state.update_id)
            await self._engine.send(wire.WeightsAbort(update_id=state.update_id))
        if state.share_id is not None and self._info is not None and self._error is None:
            log.info("base moves back reason=client_lost")
            await self._engine.send(wire.BaseToDaemon(share_id=state.share_id))
        if state.holds_pause and not self._clients.is_paused():
            log.info("resumed reason=pausing_client_lost")
            await self._release_held()

    # ------------------------------------------------------------------ engine

    async def _serve_engine(self) -> None:
        while True:
            message, frames = await self._engine.receive()
            match message:
                case wire.EngineReady():
                    info = {**message.info, "eos_token_ids": tuple(message.info["eos_token_ids"])}
                    self._info = ModelInfo(**info)
                    self.load_seconds = message.seconds
                    self.ready.set()
                    await self._release_held()
                case wire.EngineFailed():
                    self._error = error_from_wire(message.code, message.message)
                    await self._fail_all(self._error)
                    asyncio.get_running_loop().call_later(FAILED_LINGER_S, self._end, EXIT_LOAD_FAILED)
                case wire.Completions():
                    await self._deliver(list(split_finished(message.items, frames)))
                case wire.Failed() if message.request_id is not None:
                    request = self._requests.get(message.request_id)
                    if request is not None:
                        await self._fail_request(request, error_from_wire(message.code, message.message))
                case _:
                    await self._answer_call(message)

    async def _deliver(self, finished: list[Finished]) -> None:
        """Send completions to who waits for them, one message per call, and keep them for a retry."""
        by_call: dict[tuple[str, int], list[Finished]] = defaultdict(list)
        for done in finished:
            # A copy: the frames belong to the message they came in.
            done = Finished(done.item, tuple(bytes(column) for column in done.columns))
            request = self._requests.get(done.item.request_id)
            if request is None:
                continue
            request.finished.append(done)
            by_call[request.client, request.call].append(done)
            if done.item.is_last:
                self._requests.finish(request)
                state = self._clients.get(request.client)
                if state is not None:
                    state.request_ids.discard(request.request_id)
        if not len(self._requests):
            self._idle.set()
        for (client, call), parts in by_call.items():
            state = self._clients.get(client)
            if state is not None:
                items, frames = join_finished(parts)
                await self._reply(state, wire.Completions(call=call, items=items), frames)

    async def _answer_call(self, message: wire.Message) -> None:
        """Pass the engine's answer on to the client that asked."""
        waiting = self._calls.pop(message.call, None)
        if waiting is None:
            return
        client, call = waiting
        is_policy = message.call in self._policy_commits
        self._policy_commits.discard(message.call)
        if isinstance(message, wire.Done) and is_policy:
            self._weight_version = max(self._weight_version, message.value)
        state = self._clients.get(client)
        if state is None:
            return
        state.calls -= 1
        if isinstance(message, wire.Done) and message.value:  # only a commit's answer has one
            state.update_id = None
        await self._reply(state, msgspec.structs.replace(message, call=call))

    async def _watch_engine(self) -> None:
        """Wait for the engine's end, which none of ours asks for while the front runs."""
        code = await self._engine.wait()
        await asyncio.sleep(0.2)  # its last words may still be on the way
        if self._error is None or isinstance(self._error, ShuttingDown):
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            self._error = EngineDied(
                f"the engine process {how}. Read the daemon's log"
                f"{' ' + self._identity.log_path if self._identity.log_path else ''}, then start it again."
            )
            log.error("engine died exit_code=%d requests=%d", code, len(self._requests))
            await self._fail_all(self._error)
            self._end(EXIT_LOAD_FAILED if self._info is None else EXIT_ENGINE_DIED)

    async def _beat(self) -> None:
        """Each second: tell who waits that all is well, forget who is gone, and notice an engine that hangs."""
        while True:
            await asyncio.sleep(BEAT_S)
            beat = wire.Beat(steps=self._engine.pulse().steps, state=self.state)
            for state in self._clients.waiting():
                await self._reply(state, beat)
            for state in self._clients.expired():
                await self._client_gone(state.client, "lease expired")
            quiet_s = self._engine.quiet_s()
            # Twice in a row: the page is read while it is written, and one torn reading must not end an engine.
            self._late_beats = self._late_beats + 1 if quiet_s > self._config.stall_s else 0
            if self._info is not None and self._error is None and self._late_beats > 1:
                self._error = EngineStalled(
                    f"the engine has been at one step or message for {quiet_s:.0f} s, --stall-s is "
                    f"{self._config.stall_s:g}. It was killed; raise --stall-s if that is expected."
                )
                log.error("engine stalled quiet_s=%.1f requests=%d", quiet_s, len(self._requests))
                await self._fail_all(self._error)
                self._engine.kill()
                self._end(EXIT_ENGINE_DIED)

    # ----------------------------------------------------------------- answers

    async def _fail_all(self, error: RolloutdError) -> None:
        """Give every request and call in flight its named error."""
        self._held.clear()
        for request in self._requests.all_in_flight():
            await self._fail_request(request, error)
        calls, self._calls = self._calls, {}
        for client, call in calls.values():
            state = self._clients.get(client)
            if state is not None:
                state.calls -= 1
                await self._reply(state, wire.Failed(call=call, code=error.code, message=error.message))

    async def _fail_held(self) -> None:
        held, self._held = self._held, []
        assert self._error is not None, "held requests fail only when the daemon stops"
        for one in held:
            await self._fail_request(one.state, self._error)

    async def _fail_request(self, request: RequestState, error: RolloutdError) -> None:
        self._forget(request.request_id)
        state = self._clients.get(request.client)
        if state is not None:
            state.request_ids.discard(request.request_id)
            await self._fail_item(state, request.call, request.request_id, error)

    def _forget(self, request_id: str) -> None:
        self._requests.drop(request_id)
        if not len(self._requests):
            self._idle.set()

    async def _fail_item(self, state: ClientState, call: int, request_id: str, error: RolloutdError) -> None:
        failed = wire.Failed(call=call, code=error.code, message=error.message, request_id=request_id)
        await self._reply(state, failed)

    async def _reply(self, state: ClientState, message: wire.Message, frames: Sequence[wire.Frame] = ()) -> None:
        if not await self._send(state.routing_id, message, frames):
            await self._client_gone(state.client, "unreachable")

    async def _send(self, routing_id: bytes, message: wire.Message, frames: Sequence[wire.Frame] = ()) -> bool:
        """Return False if the peer is gone or does not read."""
        try:
            await self._socket.send_multipart([routing_id, *wire.encode(message, frames)])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True


def _mark(item: wire.PromptItem, ids: list[int] | None, params: dict[str, Any]) -> bytes:
    content = item.text if item.text is not None else ids or []
    return fingerprint(content, params if item.adapter is None else {**params, "adapter": item.adapter})
