"""`AsyncRolloutClient`: the one implementation of the client's side of the wire.

Every wait ends: with an answer, with the daemon's named error, or, when the daemon shows no progress for `timeout`
seconds or its connection is gone, with an error that says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket as sockets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from rolloutd.errors import (
    AuthRequired,
    DaemonUnreachable,
    DeadlineExceeded,
    EngineStalled,
    MessageTooLarge,
    NoListener,
    ProtocolError,
    RequestError,
    RolloutdError,
    error_from_wire,
)
from rolloutd.outputs import CompletionOutput, EngineStats, ModelInfo, RequestOutput, WeightUpdate
from rolloutd.prompts import Prompt, as_prompts, as_sampling_params, progress_bar, score_requests, scores_of
from rolloutd.sampling_params import SamplingParams
from rolloutd.version import __version__

from . import protocol as wire
from .arrays import Finished, join_prompts, split_finished
from .push_steps import PushSteps, Transport
from .rundir import boot_id, find_connection
from .sockets import configure, new_keys

if TYPE_CHECKING:
    from rolloutd.weights.push import NamedTensors, Push

log = logging.getLogger(__name__)

Running = Literal["keep", "recompute", "abort"]

GONE_S = 2.0
"""A connection that stays closed for this long is lost: daemons do not come back under the same address."""
TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class Health:
    """A daemon's answer to `health`."""

    state: str
    """loading, ready, paused, failed or stopping."""
    detail: str
    """The error behind `failed` and `stopping`."""
    pid: int
    engine_pid: int
    uptime_s: float
    weight_version: int
    info: ModelInfo | None
    """None while loading."""


@dataclass(slots=True)
class _Signs:
    """When something was last heard of the daemon, and when its engine last moved."""

    message: float = 0.0
    progress: float = 0.0
    steps: int = -1
    state: str = "loading"
    gone_since: float | None = None


class AsyncRolloutClient:
    """Talks to one daemon.

    `address` is an endpoint or a connection file; None finds this user's newest daemon. `timeout`: seconds without any
    sign of progress before a named error; a generation may take as long as it likes. `load_timeout`: seconds that a
    model may take to load.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        load_timeout: float = 600.0,
    ) -> None:
        self._connection = find_connection(str(address) if address is not None else None, token)
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._load_timeout = load_timeout
        self._client_id = secrets.token_hex(16)
        self._calls: dict[int, asyncio.Queue[tuple[wire.Message, list[memoryview]]]] = {}
        self._resend: dict[int, list[wire.Frame]] = {}
        self._next_call = 1
        self._signs = _Signs()
        self._tasks: list[asyncio.Task[None]] = []
        self._welcome: wire.Welcome | None = None
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._lock: asyncio.Lock | None = None
        self._refused = False

    @property
    def address(self) -> str:
        """The endpoint."""
        return self._connection.address

    # -------------------------------------------------------------- connection

    async def connect(self) -> None:
        """Reach the daemon; calls do it themselves. `NoListener` at once where nothing listens."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if self._welcome is not None:
                return
            await asyncio.get_running_loop().run_in_executor(None, self._probe)
            self._open_socket()
            try:
                answer, _ = await asyncio.wait_for(
                    self._exchange(wire.Hello(version=__version__)), self._connect_timeout
                )
            except asyncio.TimeoutError:
                await self.close()
                raise self._no_welcome() from None
            if not isinstance(answer, wire.Welcome):
                raise ProtocolError(f"the daemon answered Hello with {type(answer).__name__}.")
            self._welcome = answer
            self._tasks.append(asyncio.create_task(self._renew(answer.lease_s / 3)))

    def _probe(self) -> None:
        """Connect and hang up: libzmq would wait in silence for a listener that never comes."""
        parts = urlsplit(self.address)
        remedy = "Start a daemon with rolloutd --model DIR, or check the address."
        try:
            if parts.scheme == "ipc":
                with sockets.socket(sockets.AF_UNIX) as probe:
                    probe.settimeout(self._connect_timeout)
                    probe.connect(self.address.removeprefix("ipc://"))
            elif parts.scheme == "tcp" and parts.hostname and parts.port:
                sockets.create_connection((parts.hostname, parts.port), self._connect_timeout).close()
            else:
                raise NoListener(
                    f"address {self.address!r} is not understood. Use ipc://PATH, tcp://HOST:PORT or a file."
                )
        except (OSError, ValueError) as error:
            raise NoListener(f"nothing listens at {self.address} ({error}). {remedy}") from None

    def _open_socket(self) -> None:
        connection = self._connection
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        configure(self._socket, 1 << 40)
        if urlsplit(self.address).scheme == "tcp":
            public, secret = connection.client_key, connection.client_secret
            if connection.server_key is None or public is None or secret is None:
                public, secret = new_keys()
            self._socket.curve_serverkey = (connection.server_key or new_keys()[0]).encode()
            self._socket.curve_publickey, self._socket.curve_secretkey = public.encode(), secret.encode()
        monitor: zmq.asyncio.Socket = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        self._signs = _Signs(message=time.monotonic(), progress=time.monotonic())
        self._socket.connect(self.address)
        self._tasks += [asyncio.create_task(self._read()), asyncio.create_task(self._watch(monitor))]

    def _no_welcome(self) -> RolloutdError:
        if self._refused or urlsplit(self.address).scheme == "tcp":
            return AuthRequired(
                f"{self.address} does not let this client in. Pass the daemon's connection file, or its token."
            )
        return NoListener(
            f"{self.address} listens but did not answer within {self._connect_timeout:g} s. Is it stopped?"
        )

    async def _read(self) -> None:
        assert self._socket is not None, "the socket was opened"
        while True:
            parts: list[bytes] = await self._socket.recv_multipart()
            try:
                message, frames = wire.decode(parts)
            except ProtocolError as error:
                log.warning("unreadable message from the daemon: %s", error)
                continue
            signs, now = self._signs, time.monotonic()
            signs.message = now
            if isinstance(message, wire.Beat):
                if message.steps != signs.steps or message.state != "ready":
                    signs.progress = now
                signs.steps, signs.state = message.steps, message.state
                continue
            signs.progress = now
            queue = self._calls.get(message.call)
            if queue is not None:
                queue.put_nowait((message, frames))

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Notice a closed connection at once; after a reconnect send again what still waits, under the same ids."""
        while True:
            event = (await recv_monitor_message(monitor))["event"]
            if event == zmq.EVENT_DISCONNECTED:
                self._signs.gone_since = self._signs.gone_since or time.monotonic()
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._signs.gone_since is not None and self._socket is not None:
                    for parts in list(self._resend.values()):
                        await self._socket.send_multipart(parts)
                self._signs.gone_since = None
            else:
                self._refused = True

    async def _renew(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            if self._signs.gone_since is None:
                await self._send(wire.encode(wire.Ping(client=self._client_id)))

    async def _send(self, parts: list[wire.Frame]) -> None:
        assert self._socket is not None, "the socket was opened"
        await self._socket.send_multipart(parts)

    async def close(self) -> None:
        """Hang up; the daemon cancels what this client still waits for when its lease ends."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close()
            self._socket = None
        if self._context is not None:
            self._context.destroy(linger=0)  # also the monitor's socket, which would keep `term` waiting
            self._context = None
        self._welcome = None

    async def __aenter__(self) -> AsyncRolloutClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------- calls

    @contextlib.asynccontextmanager
    async def _open_call(
        self, message: Any, frames: Sequence[wire.Frame] = (), *, resend: bool = False
    ) -> AsyncIterator[asyncio.Queue[tuple[wire.Message, list[memoryview]]]]:
        """Send a message and give the queue of its answers."""
        import msgspec

        call, self._next_call = self._next_call, self._next_call + 1
        parts = wire.encode(msgspec.structs.replace(message, call=call, client=self._client_id), frames)
        self._check_size(parts)
        queue = self._calls[call] = asyncio.Queue()
        if resend:
            self._resend[call] = parts
        try:
            started = time.monotonic()
            while True:
                try:
                    await asyncio.wait_for(self._send(list(parts)), TICK_S)
                    break
                except asyncio.TimeoutError:
                    self._check_alive(started)
            yield queue
        finally:
            self._calls.pop(call, None)
            self._resend.pop(call, None)

    def _check_size(self, parts: Sequence[wire.Frame]) -> None:
        if self._welcome is None:
            return
        size = max(memoryview(part).nbytes for part in parts)
        if size > self._welcome.max_message_bytes:
            raise MessageTooLarge(
                f"a frame of {size} bytes > --max-message-bytes {self._welcome.max_message_bytes}. "
                "Send fewer prompts in one call, or raise it."
            )

    async def _next(
        self, queue: asyncio.Queue[tuple[wire.Message, list[memoryview]]], started: float
    ) -> tuple[wire.Message, list[memoryview]]:
        """Return the next answer, or raise once the daemon is known to be gone or stuck."""
        while True:
            try:
                return await asyncio.wait_for(queue.get(), TICK_S)
            except asyncio.TimeoutError:
                self._check_alive(started)

    def _check_alive(self, started: float) -> None:
        signs, now = self._signs, time.monotonic()
        log_hint = f" Its log: {self._welcome.log_path}." if self._welcome and self._welcome.log_path else ""
        who = f"the daemon at {self.address} (pid {self._welcome.pid if self._welcome else self._connection.pid})"
        if signs.gone_since is not None and now - signs.gone_since > GONE_S:
            raise DaemonUnreachable(f"{who} closed the connection and did not come back. Start it again.{log_hint}")
        silent_s = now - max(signs.message, started)
        if silent_s > self._timeout:
            raise DaemonUnreachable(
                f"{who} has been silent for {silent_s:.1f} s (timeout {self._timeout:g} s).{log_hint}"
            )
        stuck_s = now - max(signs.progress, started)
        limit = self._load_timeout if signs.state == "loading" else self._timeout
        if stuck_s > limit:
            raise EngineStalled(f"{who} answers, but its engine has not moved for {stuck_s:.1f} s.{log_hint}")
        if signs.state == "loading" and now - started > self._load_timeout:
            raise DeadlineExceeded(f"{who} has been loading for {now - started:.0f} s (load_timeout).{log_hint}")

    async def _exchange(
        self, message: wire.Message, frames: Sequence[wire.Frame] = ()
    ) -> tuple[wire.Message, list[memoryview]]:
        """Send one message and return its one answer; raise its error."""
        started = time.monotonic()
        async with self._open_call(message, frames) as queue:
            answer, answer_frames = await self._next(queue, started)
        if isinstance(answer, wire.Failed):
            raise error_from_wire(answer.code, answer.message)
        return answer, answer_frames

    async def _control(self, message: wire.Message, frames: Sequence[wire.Frame] = ()) -> wire.Message:
        await self.connect()
        return (await self._exchange(message, frames))[0]

    async def health(self) -> Health:
        """Return state and model. Answered by the front at once, also while the model loads."""
        answer = await self._control(wire.Health())
        assert isinstance(answer, wire.HealthReply), "the front answers by type"
        info = None
        if answer.info is not None:
            info = ModelInfo(**{**answer.info, "eos_token_ids": tuple(answer.info["eos_token_ids"])})
        return Health(
            answer.state,
            answer.detail,
            answer.pid,
            answer.engine_pid,
            answer.uptime_s,
            answer.weight_version,
            info,
        )

    async def wait_ready(self, timeout: float | None = None) -> ModelInfo:
        """Return the model once it is loaded; raise its error if it cannot be, `DeadlineExceeded` after `timeout`."""
        limit = self._load_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while True:
            health = await self.health()
            if health.info is not None and health.state in ("ready", "paused"):
                return health.info
            if health.state in ("failed", "stopping"):
                code, _, message = health.detail.partition(": ")
                raise error_from_wire(code, message)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the model is not ready after {limit:g} s. Wait longer, or read the log.")
            await asyncio.sleep(0.1)

    async def stats(self) -> EngineStats:
        """Return the engine's counters."""
        await self.wait_ready()
        answer = await self._control(wire.Stats())
        assert isinstance(answer, wire.StatsReply), "the engine answers by type"
        return EngineStats(**answer.stats)

    async def pause(self) -> None:
        """Hold new requests back; what runs goes on."""
        await self._control(wire.Pause())

    async def resume(self) -> None:
        """Let held requests go."""
        await self._control(wire.Resume())

    async def sleep(self) -> None:
        """Give the KV cache's memory back; only while nothing is unfinished."""
        await self._control(wire.Sleep())

    async def wake_up(self) -> None:
        """Bring the KV cache back, empty."""
        await self._control(wire.WakeUp())

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        """End this client's requests, or those named; return how many. Their completions come back as `abort`."""
        answer = await self._control(wire.Abort(request_ids=list(request_ids or ())))
        assert isinstance(answer, wire.Done), "the front answers by type"
        return answer.value

    # -------------------------------------------------------------- generation

    async def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> AsyncIterator[tuple[int, CompletionOutput]]:
        """Yield (prompt's number, completion) as completions finish. Leaving the loop early cancels the rest."""
        many = as_prompts(prompts)
        async for index, _, finished in self._run(many, as_sampling_params(sampling_params, len(many))):
            yield index, finished.output()

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Return one answer per prompt, in order. The first error of a request is raised and the rest cancelled."""
        many = as_prompts(prompts)
        params = as_sampling_params(sampling_params, len(many))
        with progress_bar(sum(p.n for p in params), enabled=use_tqdm) as bar:
            found: list[list[Finished]] = [[] for _ in many]
            ids = [""] * len(many)
            async for index, request_id, finished in self._run(many, params):
                ids[index] = request_id
                found[index].append(finished)
                bar.update(1)
        return [request_output(*parts) for parts in zip(ids, many, found, strict=True)]

    async def score(
        self, prompts: Prompt | Sequence[Prompt], completions: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Return log p of each completion token given its prompt (token ids), in nats, at a sampling temperature."""
        ids = []
        for prompt in as_prompts(prompts):
            if isinstance(prompt, str):
                raise RequestError("score takes token ids: text is tokenised by the daemon only for generation.")
            ids.append(prompt)
        joined, params = score_requests(ids, completions, temperature)
        return scores_of(await self.generate(joined, params), completions)

    async def _run(
        self, prompts: list[str | list[int]], params: list[SamplingParams]
    ) -> AsyncIterator[tuple[int, str, Finished]]:
        """Send all requests in one message and yield (number, request id, completion) as they come."""
        await self.connect()
        if not prompts:
            return
        distinct = list(dict.fromkeys(params))
        items = [
            wire.PromptItem(
                request_id=secrets.token_hex(16),
                text=prompt if isinstance(prompt, str) else None,
                num_ids=0 if isinstance(prompt, str) else len(prompt),
                params=distinct.index(one),
            )
            for prompt, one in zip(prompts, params, strict=True)
        ]
        number = {item.request_id: i for i, item in enumerate(items)}
        frame = join_prompts([] if isinstance(prompt, str) else prompt for prompt in prompts)
        message = wire.Generate(items=items, params=[one.to_dict() for one in distinct])
        seen: set[tuple[str, int]] = set()
        open_ids = set(number)
        started = time.monotonic()
        try:
            async with self._open_call(message, [frame], resend=True) as queue:
                while open_ids:
                    answer, frames = await self._next(queue, started)
                    for finished in self._completions(answer, frames):
                        key = finished.item.request_id, finished.item.index
                        if key in seen:
                            continue
                        seen.add(key)
                        if finished.item.is_last:
                            open_ids.discard(finished.item.request_id)
                        yield number[finished.item.request_id], finished.item.request_id, finished
        finally:
            if open_ids:
                await self._cancel(open_ids)

    @staticmethod
    def _completions(answer: wire.Message, frames: list[memoryview]) -> Iterator[Finished]:
        match answer:
            case wire.Completions():
                return split_finished(answer.items, frames)
            case wire.Failed():
                raise error_from_wire(answer.code, answer.message)
            case _:
                raise ProtocolError(f"the daemon answered Generate with {type(answer).__name__}.")

    async def _cancel(self, request_ids: Iterable[str]) -> None:
        """Tell the daemon, if it can be told, that nobody waits for these."""
        if self._socket is not None and self._signs.gone_since is None:
            message = wire.Abort(client=self._client_id, request_ids=sorted(request_ids))
            with contextlib.suppress(zmq.ZMQError, asyncio.TimeoutError):
                await asyncio.wait_for(self._send(wire.encode(message)), TICK_S)

    # ----------------------------------------------------------------- weights

    async def update_weights(
        self,
        named_tensors: NamedTensors,
        version: int | None = None,
        *,
        running: Running = "keep",
        transport: Transport = "auto",
    ) -> WeightUpdate:
        """Replace all parameters between two steps; see `LLM.update_weights`.

        `running`: what happens to sequences in flight: `keep` their KV, `recompute` it, or `abort` them. `transport`:
        shared memory where the daemon is on this host, else inline.
        """
        from rolloutd.weights.push import Push

        return await self._push(Push.full(named_tensors), "full", version, running, transport)

    async def update_lora(
        self,
        named_tensors: NamedTensors,
        peft_config: Any,
        version: int | None = None,
        *,
        scaling: Mapping[str, float] | None = None,
        mode: Literal["exact", "merged"] = "exact",
        running: Running = "keep",
        transport: Transport = "auto",
    ) -> WeightUpdate:
        """Serve the base weights with this adapter; see `LLM.update_lora`. Only its A and B matrices travel."""
        from rolloutd.weights.push import Push

        push = Push.lora(named_tensors, peft_config, scaling=scaling, mode=mode)
        return await self._push(push, "lora", version, running, transport)

    async def _push(
        self, push: Push, kind: Literal["full", "lora"], version: int | None, running: Running, transport: Transport
    ) -> WeightUpdate:
        started = time.perf_counter()
        await self.wait_ready()
        steps = self.push_steps(push, kind, version, running, transport).steps()
        answer: wire.Message = wire.Done()
        error: RolloutdError | None = None
        while True:
            try:
                message, frames = steps.send(error)
            except StopIteration:
                return weight_update(push, answer, started)
            answer, error = await self.try_control(message, frames)

    def push_steps(
        self, push: Push, kind: Literal["full", "lora"], version: int | None, running: Running, transport: Transport
    ) -> PushSteps:
        """Return the messages of an update; `try_control` sends them."""
        assert self._welcome is not None, "the client is connected"
        return PushSteps(
            push,
            kind,
            version=version,
            running=running,
            transport=transport,
            same_host=self._welcome.boot_id == boot_id(),
            max_message_bytes=self._welcome.max_message_bytes,
        )

    async def try_control(
        self, message: wire.Message, frames: Sequence[wire.Frame]
    ) -> tuple[wire.Message, RolloutdError | None]:
        """Send a control message; return its answer, and its error instead of raising it."""
        try:
            return await self._control(message, frames), None
        except RolloutdError as error:
            return wire.Done(), error


def request_output(request_id: str, prompt: str | list[int], finished: list[Finished]) -> RequestOutput:
    """Return a request's answer from its completions, in whatever order they came."""
    last = next(done for done in finished if done.item.is_last)
    return RequestOutput(
        request_id=request_id,
        prompt_token_ids=last.prompt_ids() if isinstance(prompt, str) else prompt,
        outputs=sorted((done.output() for done in finished), key=lambda completion: completion.index),
        prompt_logprobs=last.prompt_logprobs(),
    )


def weight_update(push: Push, answer: wire.Message, started: float) -> WeightUpdate:
    """Return what a committed push was; `started` is the caller's `perf_counter` before its first byte."""
    assert isinstance(answer, wire.Done), "a commit is answered by its version"
    manifest = push.manifest()
    seconds = time.perf_counter() - started
    return WeightUpdate(answer.value, manifest.digest, len(manifest.digests), manifest.num_bytes, seconds)
