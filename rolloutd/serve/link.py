"""One client's connection: opened, leased, watched, closed; many calls run side by side over it.

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
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import msgspec
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
    ProtocolMismatch,
    RolloutdError,
    error_from_wire,
)
from rolloutd.version import __version__

from . import protocol as wire
from .rundir import Connection
from .sockets import UNLIMITED_BYTES, configure, new_keys

log = logging.getLogger(__name__)

Answers: TypeAlias = "asyncio.Queue[tuple[wire.Message, list[memoryview]]]"
"""What the daemon sent for one call."""

GONE_S = 2.0
"""A connection that stays closed for this long is lost: daemons do not come back under the same address."""
TICK_S = 0.2
FAREWELL_MS = 200
"""How long `close` waits for the last message to leave; a daemon that hangs does not hold it up for longer."""


T = TypeVar("T")


async def within(awaitable: Awaitable[T], timeout_s: float) -> T:
    """Return what `awaitable` gives, or raise `asyncio.TimeoutError`.

    Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes together with the result, and a
    call that its user has given up would run on.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
    finally:
        task.cancel()  # nothing, if it is done
    if not task.done():
        await asyncio.wait({task})
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


@dataclass(slots=True)
class _Signs:
    """When something was last heard of the daemon, and when its engine last moved."""

    message: float = 0.0
    progress: float = 0.0
    steps: int = -1
    state: str = "loading"
    gone_since: float | None = None


class Link:
    """The connection of one client id. Times are in seconds; see `AsyncRolloutClient` for their meaning."""

    def __init__(self, connection: Connection, *, timeout: float, connect_timeout: float, load_timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._load_timeout = load_timeout
        self._client_id = secrets.token_hex(16)
        self._calls: dict[int, Answers] = {}
        self._resend: dict[int, list[wire.Frame]] = {}
        self._next_call = 1
        self._signs = _Signs()
        self._tasks: list[asyncio.Task[None]] = []
        self._welcome: wire.Welcome | None = None
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._lock: asyncio.Lock | None = None
        self._refused = False
        self._fatal: RolloutdError | None = None
        """Why no call can succeed on this connection."""

    @property
    def address(self) -> str:
        """The endpoint."""
        return self._connection.address

    @property
    def welcome(self) -> wire.Welcome:
        """What the daemon said of itself and its limits."""
        assert self._welcome is not None, "the client is connected"
        return self._welcome

    # ---------------------------------------------------------- open and close

    async def connect(self) -> None:
        """Reach the daemon, once. `NoListener` at once where nothing listens; any error leaves the link closed."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            if self._welcome is not None:
                return
            await asyncio.get_running_loop().run_in_executor(None, self._probe)
            self._open_socket()
            try:
                self._welcome = await self._greet()
            except BaseException:
                await self.close()
                raise
            self._tasks.append(asyncio.create_task(self._renew(self._welcome.lease_s / 3)))

    async def _greet(self) -> wire.Welcome:
        try:
            answer, _ = await within(self.exchange(wire.Hello(version=__version__)), self._connect_timeout)
        except asyncio.TimeoutError:
            raise self._no_welcome() from None
        if not isinstance(answer, wire.Welcome):
            raise ProtocolError(f"the daemon answered Hello with {type(answer).__name__}.")
        return answer

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
        self._refused, self._fatal = False, None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        configure(self._socket, UNLIMITED_BYTES)
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

    async def close(self) -> None:
        """Hang up; the daemon cancels what this client still waits for."""
        if self._welcome is not None and self._socket is not None:
            await self.tell(wire.Bye())
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=FAREWELL_MS if self._welcome is not None else 0)
            self._socket = None
        if self._context is not None:
            self._context.destroy(linger=0)  # also the monitor's socket, which would keep `term` waiting
            self._context = None
        self._welcome = None

    # ------------------------------------------------------------------- loops

    async def _read(self) -> None:
        assert self._socket is not None, "the socket was opened"
        while True:
            parts: list[bytes] = await self._socket.recv_multipart()
            try:
                message, frames = wire.decode(parts)
            except ProtocolMismatch as error:
                self._fatal = error
                continue
            except ProtocolError as error:
                log.warning("unreadable message from the daemon: %s", error)
                continue
            self._sort(message, frames)

    def _sort(self, message: wire.Message, frames: list[memoryview]) -> None:
        """Hand a message to the call that it answers."""
        signs, now = self._signs, time.monotonic()
        signs.message = now
        if isinstance(message, wire.Beat):
            if message.steps != signs.steps or message.state != "ready":
                signs.progress = now
            signs.steps, signs.state = message.steps, message.state
            return
        signs.progress = now
        if isinstance(message, wire.Failed) and not message.call:
            # The daemon could not read a message, and so cannot say which.
            for queue in self._calls.values():
                queue.put_nowait((message, frames))
        elif message.call in self._calls:
            self._calls[message.call].put_nowait((message, frames))

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
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    self._fatal = self._no_welcome()

    async def _renew(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            if self._signs.gone_since is None:
                await self._send(wire.encode(wire.Ping(client=self._client_id)))

    # ------------------------------------------------------------------- calls

    async def _send(self, parts: list[wire.Frame]) -> None:
        assert self._socket is not None, "the socket was opened"
        await self._socket.send_multipart(parts)

    async def tell(self, message: Any) -> None:
        """Send a message that has no answer, if the daemon can be told anything."""
        if self._socket is not None and self._signs.gone_since is None:
            parts = wire.encode(msgspec.structs.replace(message, client=self._client_id))
            with contextlib.suppress(zmq.ZMQError, asyncio.TimeoutError):
                await within(self._send(parts), TICK_S)

    @contextlib.asynccontextmanager
    async def open_call(
        self, message: Any, frames: Sequence[wire.Frame] = (), *, resend: bool = False
    ) -> AsyncIterator[Answers]:
        """Send a message and give the queue of its answers. `resend`: once more after a lost connection."""
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
                    await within(self._send(list(parts)), TICK_S)
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

    async def next_answer(self, queue: Answers, started: float) -> tuple[wire.Message, list[memoryview]]:
        """Return the next answer, or raise once the daemon is known to be gone or stuck."""
        while True:
            try:
                return await within(queue.get(), TICK_S)
            except asyncio.TimeoutError:
                self._check_alive(started)

    async def exchange(
        self, message: wire.Message, frames: Sequence[wire.Frame] = ()
    ) -> tuple[wire.Message, list[memoryview]]:
        """Send one message and return its one answer; raise its error."""
        started = time.monotonic()
        async with self.open_call(message, frames) as queue:
            answer, answer_frames = await self.next_answer(queue, started)
        if isinstance(answer, wire.Failed):
            raise error_from_wire(answer.code, answer.message)
        return answer, answer_frames

    def _check_alive(self, started: float) -> None:
        if self._fatal is not None:
            raise self._fatal
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
