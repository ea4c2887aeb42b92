"""One daemon, from options to exit code: run directory, listener, engine, front, start-up summary, signals."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from rolloutd.config import EngineConfig, ServerConfig
from rolloutd.errors import ConfigError
from rolloutd.version import __version__
from rolloutd.weights.shared_memory import available, reclaim_stale

from . import rundir
from .engine_host import EngineHost
from .front import EXIT_GRACE_EXCEEDED, Front, Identity
from .sockets import (
    LAST_WORDS_MS,
    AllowList,
    bind_ipc,
    bind_tcp,
    check_listen,
    configure,
    new_keys,
    raise_descriptor_limit,
)

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
Report = Callable[[str], None]


def serve(engine: EngineConfig, server: ServerConfig, *, report: Report, factory: str | None = None) -> int:
    """Run a daemon until it is asked to stop, and return its exit code. Call it in the main thread.

    `report` gets the lines of the start-up summary.
    """
    is_tcp = check_listen(server.listen, allow_remote=server.allow_remote)
    if server.die_with_parent:
        _die_with_parent()
    raise_descriptor_limit()
    directory = rundir.run_dir()
    rundir.reclaim_stale(directory)
    if available():
        reclaim_stale()
    lease = rundir.Lease(directory)
    try:
        daemon = _Daemon(engine, server, lease, report, is_tcp=is_tcp)
        return asyncio.run(daemon.run(factory))
    finally:
        lease.release()


def _die_with_parent() -> None:
    """SIGTERM when the thread that started this process ends, so that a daemon does not outlive its trainer."""
    parent = os.getppid()  # may well be 1: a trainer is the first process of its container
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(0)


class _Daemon:
    def __init__(
        self, engine: EngineConfig, server: ServerConfig, lease: rundir.Lease, report: Report, *, is_tcp: bool
    ) -> None:
        self._engine = engine
        self._server = server
        self._lease = lease
        self._report = report
        self._is_tcp = is_tcp
        self._started = time.monotonic()
        self._stopping: asyncio.Task[None] | None = None

    async def run(self, factory: str | None) -> int:
        """Bind, publish the address, start the engine, serve. Whatever happens, nothing of it is left."""
        context = zmq.asyncio.Context()
        context.setsockopt(zmq.MAX_SOCKETS, 16_384)
        socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
        configure(socket, self._server.max_message_bytes)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(context.destroy, linger=0)  # last: a socket left open would keep it waiting
            stack.callback(socket.close, linger=LAST_WORDS_MS)
            keys: dict[str, str] = {}
            if self._is_tcp:
                authenticator, keys = _require_keys(context, socket)
                stack.callback(authenticator.stop)
                address = bind_tcp(socket, self._server.listen)
            else:
                address = bind_ipc(socket, self._lease.client_socket)
            identity = Identity(os.getpid(), self._lease.incarnation, _log_path())
            path = self._publish(stack, address, identity, keys)
            host = EngineHost(self._engine, self._server, self._lease, factory=factory)
            stack.push_async_callback(host.stop, timeout_s=5.0)
            await host.start(context)
            front = Front(socket, host, self._server, identity)
            self._handle_signals(front)
            self._report(f"rolloutd {__version__}  {self._engine.model}")
            self._report(f"address     {address}")
            self._report(f"connection  {path}")
            self._announce(path, front)
            summary = asyncio.create_task(self._summarise(front, path))
            code = await front.run()
            summary.cancel()
            if code not in (0, EXIT_GRACE_EXCEEDED) and front.error is not None:
                self._report(f"error: {front.error}")
            return code

    def _publish(
        self, stack: contextlib.AsyncExitStack, address: str, identity: Identity, keys: dict[str, str]
    ) -> Path:
        """Write the connection file, also where --connection-file asks for it, and return the path to show."""
        connection = rundir.Connection(
            address=address,
            pid=identity.pid,
            incarnation=identity.incarnation,
            model=self._engine.model,
            log_path=identity.log_path,
            **keys,
        )
        path = rundir.claim(Path(p).absolute() if (p := self._server.connection_file) else None, self._lease)
        try:
            connection.write(path)
        except OSError as error:
            raise ConfigError(
                f"the connection file {path} cannot be written ({error.strerror}). Choose another --connection-file."
            ) from None
        if path != self._lease.connection_file:
            stack.callback(path.unlink, missing_ok=True)
            connection.write(self._lease.connection_file)
        return path

    def _handle_signals(self, front: Front) -> None:
        """SIGTERM and the first Ctrl-C drain; a second one stops at once."""
        loop = asyncio.get_running_loop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, front)

    def _stop(self, front: Front) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(front.stop(self._server.grace))
        else:
            front.stop_waiting()

    def _announce(self, path: Path, front: Front) -> None:
        """Tell the starter the address. One that is gone already ends a daemon that should not outlive it."""
        if self._server.ready_fd is None:
            return
        try:
            with os.fdopen(self._server.ready_fd, "w") as pipe:
                pipe.write(f"{path}\n")
        except BrokenPipeError:
            if self._server.die_with_parent:
                self._stop(front)
        except OSError as error:
            raise ConfigError(
                f"ready_fd={self._server.ready_fd} cannot be written ({error.strerror}). Pass an open descriptor."
            ) from None

    async def _summarise(self, front: Front, path: Path) -> None:
        """Report, once the model is loaded, what a user would otherwise ask for."""
        await front.ready.wait()
        info = front.info
        assert info is not None, "ready means loaded"
        tokens = info.num_blocks * info.block_size
        self._report(
            f"model       {info.architecture}  {info.num_parameters / 1e6:,.1f}M parameters  {info.dtype}  "
            f"numerics {info.numerics}  on {info.device}"
        )
        self._report(f"weights     {info.weight_bytes / 2**20:,.1f} MiB")
        self._report(
            f"kv cache    {info.kv_cache_bytes / 2**20:,.1f} MiB = {tokens:,} tokens in {info.num_blocks:,} blocks of "
            f"{info.block_size}"
        )
        self._report(
            f"room        {tokens // info.max_model_len:,} sequences of {info.max_model_len:,} tokens  "
            f"(at most {self._engine.max_num_seqs} at once)"
        )
        self._report(
            f"ready       after {time.monotonic() - self._started:.1f} s  (model loaded in {front.load_seconds:.1f} s)"
        )
        self._report(
            f'trainer     GRPOTrainer(..., args=GRPOConfig(use_rollout_server=True, rollout_server_address="{path}"))'
        )


def _require_keys(
    context: zmq.asyncio.Context, socket: zmq.asyncio.Socket
) -> tuple[AsyncioAuthenticator, dict[str, str]]:
    """Let only holders of the connection file's keys in; every local user can reach a loopback port."""
    server_key, server_secret = new_keys()
    client_key, client_secret = new_keys()
    authenticator = AsyncioAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(domain="*", credentials_provider=AllowList(client_key))
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = server_key.encode(), server_secret.encode()
    return authenticator, {"server_key": server_key, "client_key": client_key, "client_secret": client_secret}


def _log_path() -> str | None:
    """Return the file that standard error goes to, if it is one."""
    try:
        target = Path(f"/proc/self/fd/{sys.stderr.fileno()}").resolve()
    except (OSError, ValueError):
        return None
    return str(target) if target.is_file() else None
