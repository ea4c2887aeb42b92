"""The front's handle on the engine process: start, watch, stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import asdict

import zmq
import zmq.asyncio

from rolloutd.config import EngineConfig, ServerConfig

from . import protocol as wire
from .engine_process import DEFAULT_FACTORY, EngineProcessOptions
from .heartbeat import HeartbeatReader, Pulse
from .rundir import Lease
from .sockets import UNLIMITED_BYTES, bind_ipc, configure


class EngineHost:
    """One engine process, its socket and its heartbeat page. `start` must run in the main thread."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, lease: Lease, *, factory: str | None = None) -> None:
        self._engine = engine
        self._server = server
        self._lease = lease
        self._factory = factory or DEFAULT_FACTORY
        self._process: asyncio.subprocess.Process | None = None
        self._heartbeat = HeartbeatReader(lease.heartbeat)
        self._socket: zmq.asyncio.Socket | None = None

    async def start(self, context: zmq.asyncio.Context) -> None:
        """Start the process; it connects when it is up."""
        self._socket = context.socket(zmq.DEALER)
        configure(self._socket, UNLIMITED_BYTES)
        options = EngineProcessOptions(
            engine=self._engine.to_dict(),
            socket=bind_ipc(self._socket, self._lease.engine_socket),
            heartbeat=str(self._lease.heartbeat),
            parent_pid=os.getpid(),
            log_level=self._server.log_level,
            factory=self._factory,
        )
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "rolloutd.serve.engine_process", stdin=asyncio.subprocess.PIPE
        )
        assert self._process.stdin is not None, "the process was started with a pipe"
        self._process.stdin.write(json.dumps(asdict(options)).encode())
        self._process.stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def send(self, message: wire.Message, frames: list[wire.Frame] | None = None) -> None:
        """Queue a message for the engine."""
        assert self._socket is not None, "the engine was started"
        await self._socket.send_multipart(wire.encode(message, frames or ()))

    async def receive(self) -> tuple[wire.Message, list[memoryview]]:
        """Return the engine's next message."""
        assert self._socket is not None, "the engine was started"
        parts: list[bytes] = await self._socket.recv_multipart()
        return wire.decode(parts)

    def pulse(self) -> Pulse:
        """Return the engine's latest sign of life."""
        return self._heartbeat.read()

    def quiet_s(self) -> float:
        """Return for how long the engine has been in one step, or not running at all; 0 while it moves or idles."""
        pulse = self.pulse()
        if pulse.tick == 0.0:
            return 0.0  # still importing
        now = time.monotonic()
        return max(now - pulse.since if pulse.busy else 0.0, now - pulse.tick - 2.0)

    async def wait(self) -> int:
        """Return the exit code once the process ended; -9 for SIGKILL."""
        assert self._process is not None, "the engine was started"
        return await self._process.wait()

    def kill(self) -> None:
        """End the process now, also a stopped one."""
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, signal.SIGKILL)

    async def stop(self, timeout_s: float) -> None:
        """Ask the process to end; kill it if it has not after `timeout_s`."""
        if self._process is not None and self._process.returncode is None:
            # Beside the wait, not before it: nobody takes a message once the engine is dead and not yet reaped.
            asking = asyncio.ensure_future(self.send(wire.Stop()))
            try:
                await asyncio.wait_for(self._process.wait(), timeout_s)
            except asyncio.TimeoutError:
                self.kill()
                await self._process.wait()
            finally:
                asking.cancel()
        if self._socket is not None:
            self._socket.close()
        self._heartbeat.close()
