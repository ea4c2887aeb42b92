"""Bytes from a trainer to a daemon through torch.distributed, for hosts that share no memory.

By gloo from host memory to host memory, by NCCL from a GPU to another one. NCCL has not run yet: its calls are tested
with gloo in their place, which shows all but what NCCL itself does.

A process group of two of its own, which leaves the trainer's groups alone. The trainer opens a TCP store at the address
that it names; the store and the group listen only for as long as an update takes. Nothing is pickled. What arrives is
verified by digest like any other bytes, but it is neither encrypted nor authenticated: use it within a trusted network.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rolloutd.errors import ConfigError, TransportFailed, first_line

from .tensors import Bytes

Backend = Literal["gloo", "nccl"]

TIMEOUT_S = 10.0
"""For the other side to join, to send and to receive 64 MiB at most: the engine computes nothing meanwhile."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the two meet."""

    host: str
    port: int
    name: str
    """Random, so that nobody else meets here by chance."""
    backend: Backend = "gloo"


class Channel:
    """One end of a connection between two processes; a context manager that hangs up."""

    def __init__(
        self,
        store: Any,
        meeting: Meeting,
        rank: int,
        timeout_s: float,
        own_address: str,
        device: torch.device | None = None,
    ) -> None:
        self.meeting = meeting
        self.device = device
        """Of the memory that is sent from, or received into; None for host memory."""
        self._own_address = own_address
        """Of this host on the way to the other one: torch's own choice may be another."""
        self._store = store
        self._rank = rank
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = None
        self._num_messages = 0
        self._received = self._memory(0)

    @classmethod
    def host(cls, address: str, *, device: torch.device | None = None, timeout_s: float = TIMEOUT_S) -> Channel:
        """Return the trainer's end, which waits at a free port of `address`; `ConfigError` where it cannot.

        With a GPU for `device` the bytes go by NCCL from its memory.
        """
        backend: Backend = "gloo" if device is None else "nccl"
        check_available(backend)
        try:
            store = _store(address, 0, is_host=True, timeout_s=timeout_s)
        except RuntimeError as error:
            raise ConfigError(
                f"collective_address={address!r} cannot be listened at ({first_line(error)}). Pass an address of this "
                "host that the daemon reaches."
            ) from None
        meeting = Meeting(address, store.port, secrets.token_hex(16), backend)
        return cls(store, meeting, 0, timeout_s, address, device)

    @classmethod
    def join(cls, meeting: Meeting, own_device: str = "cpu", *, timeout_s: float = TIMEOUT_S) -> Channel:
        """Return the daemon's end, connected; `TransportFailed` where the trainer is not there.

        By NCCL the bytes arrive in the memory of its own device.
        """
        check_available(meeting.backend)
        try:
            # Asked first: a store would try again and again where nobody listens any more.
            with socket.create_connection((meeting.host, meeting.port), timeout_s) as probe:
                own_address = str(probe.getsockname()[0])
            store = _store(meeting.host, meeting.port, is_host=False, timeout_s=timeout_s)
        except (RuntimeError, OSError) as error:
            raise _failed("the trainer cannot be reached", meeting, error) from None
        device = torch.device(own_device) if meeting.backend == "nccl" else None
        channel = cls(store, meeting, 1, timeout_s, own_address, device)
        channel.connect()
        return channel

    def connect(self) -> None:
        """Wait for the other side; `TransportFailed` where it does not come."""
        try:
            store = dist.PrefixStore(self.meeting.name, self._store)  # type: ignore[attr-defined]
            if self.device is None:
                self._group = _gloo(store, self._rank, self._timeout, self._own_address)
            else:
                self._group = _nccl(store, self._rank, self._timeout)
                _within(self._timeout, self._greet)
        except (RuntimeError, TimeoutError) as error:
            raise _failed("the other side did not come", self.meeting, error) from None

    def _greet(self) -> None:
        """Send one byte: the two GPUs find each other with the first message, and that wait has no end of its own."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        work = self._group.recv([byte], 0, 0) if self._rank else self._group.send([byte], 1, 0)
        work.wait(self._timeout)

    def send(self, data: Bytes) -> None:
        """Send bytes; return once their memory may be written to."""
        self._do("send", data, "the daemon does not take what is sent")

    def receive(self, num_bytes: int) -> Bytes:
        """Return the next so many bytes, in memory of the host or of the device; the next ones come there too."""
        if self._received.nbytes < num_bytes:
            self._received = self._memory(num_bytes)
        arrived = self._received[:num_bytes]
        self._do("recv", arrived, "the trainer does not send")
        return arrived

    def _memory(self, num_bytes: int) -> Bytes:
        if self.device is None:
            return memoryview(bytearray(num_bytes))
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _do(self, verb: str, data: Bytes, what: str) -> None:
        tensor = data if isinstance(data, Tensor) else torch.frombuffer(data, dtype=torch.uint8)
        self._num_messages += 1
        tag = self._num_messages
        try:
            getattr(self._group, verb)([tensor], 1 - self._rank, tag).wait(self._timeout)
        except RuntimeError as error:
            raise _failed(what, self.meeting, error) from None

    def close(self) -> None:
        """Hang up; the other side's waiting ends with an error."""
        if self._group is not None and self.device is not None:
            self._group.abort()  # what is left of a message would keep a GPU busy for ever
        self._group = self._store = None
        self._received = self._memory(0)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_available(backend: Backend) -> None:
    """Raise `ConfigError` where this torch does not have it."""
    if not (dist.is_available() and dist.is_backend_available(backend)):
        transport = "collective" if backend == "gloo" else "nccl"
        raise ConfigError(f"transport={transport!r} needs a torch with {backend} at both ends. Use auto or inline.")


def _gloo(store: Any, rank: int, timeout: timedelta, own_address: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address)]
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Any, rank: int, timeout: timedelta) -> Any:
    """Return a group whose `wait` blocks and raises.

    Without that NCCL has a thread that ends the whole process, trainer or daemon, when a message takes too long.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _environment("TORCH_NCCL_BLOCKING_WAIT", "1"):
        return dist.ProcessGroupNCCL(store, rank, 2, options)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _within(timeout: timedelta, call: Callable[[], None]) -> None:
    """Make a call that may never return; `TimeoutError` then, and it is left behind in its thread."""
    errors: list[RuntimeError] = []

    def run() -> None:
        try:
            call()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="rolloutd-greeting", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds())
    if thread.is_alive():
        raise TimeoutError(f"no greeting in {timeout.total_seconds():.0f} s")
    if errors:
        raise errors[0]


def _store(host: str, port: int, *, is_host: bool, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, 2, is_host, timeout=timeout, wait_for_workers=False
    )


def _failed(what: str, meeting: Meeting, error: Exception) -> TransportFailed:
    return TransportFailed(
        f"{what} at {meeting.host}:{meeting.port} ({first_line(error)}). The old weights serve on; push again, by "
        "another transport if the two hosts do not reach each other."
    )
