"""Bytes from a trainer to a daemon through torch.distributed, for hosts that share no memory.

A process group of two of its own, which leaves the trainer's groups alone. The trainer opens a TCP store at the address
that it names; the store and the group listen only for as long as an update takes. Nothing is pickled. What arrives is
verified by digest like any other bytes, but it is neither encrypted nor authenticated: use it within a trusted network.
"""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from rolloutd.errors import ConfigError, TransportFailed

TIMEOUT_S = 10.0
"""For the other side to join, to send and to receive 64 MiB at most: the engine computes nothing meanwhile."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the two meet."""

    host: str
    port: int
    name: str
    """Random, so that nobody else meets here by chance."""


class Channel:
    """One end of a connection between two processes; a context manager that hangs up."""

    def __init__(self, store: Any, meeting: Meeting, rank: int, timeout_s: float, own_address: str) -> None:
        self.meeting = meeting
        self._own_address = own_address
        """Of this host on the way to the other one: torch's own choice may be another."""
        self._store = store
        self._rank = rank
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = None
        self._num_messages = 0

    @classmethod
    def host(cls, address: str, *, timeout_s: float = TIMEOUT_S) -> Channel:
        """Return the trainer's end, which waits at a free port of `address`; `ConfigError` where it cannot."""
        check_available()
        try:
            store = _store(address, 0, is_host=True, timeout_s=timeout_s)
        except RuntimeError as error:
            raise ConfigError(
                f"collective_address={address!r} cannot be listened at ({_first_line(error)}). Pass an address of this "
                "host that the daemon reaches."
            ) from None
        return cls(store, Meeting(address, store.port, secrets.token_hex(16)), 0, timeout_s, address)

    @classmethod
    def join(cls, meeting: Meeting, *, timeout_s: float = TIMEOUT_S) -> Channel:
        """Return the daemon's end, connected; `TransportFailed` where the trainer is not there."""
        try:
            # Asked first: a store would try again and again where nobody listens any more.
            with socket.create_connection((meeting.host, meeting.port), timeout_s) as probe:
                own_address = str(probe.getsockname()[0])
            store = _store(meeting.host, meeting.port, is_host=False, timeout_s=timeout_s)
        except (RuntimeError, OSError) as error:
            raise _failed("the trainer cannot be reached", meeting, error) from None
        channel = cls(store, meeting, 1, timeout_s, own_address)
        channel.connect()
        return channel

    def connect(self) -> None:
        """Wait for the other side; `TransportFailed` where it does not come."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._timeout
        try:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._own_address)]
            store = dist.PrefixStore(self.meeting.name, self._store)  # type: ignore[attr-defined]
            self._group = dist.ProcessGroupGloo(store, self._rank, 2, options)
        except RuntimeError as error:
            raise _failed("the other side did not come", self.meeting, error) from None

    def send(self, data: memoryview) -> None:
        """Send bytes; return once their memory may be written to."""
        self._do("send", data, "the daemon does not take what is sent")

    def receive(self, data: memoryview) -> None:
        """Receive as many bytes as `data` has room for."""
        self._do("recv", data, "the trainer does not send")

    def _do(self, verb: str, data: memoryview, what: str) -> None:
        tensor, tag = torch.frombuffer(data, dtype=torch.uint8), self._num_messages
        self._num_messages += 1
        try:
            getattr(self._group, verb)([tensor], 1 - self._rank, tag).wait(self._timeout)
        except RuntimeError as error:
            raise _failed(what, self.meeting, error) from None

    def close(self) -> None:
        """Hang up; the other side's waiting ends with an error."""
        self._group = self._store = None

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_available() -> None:
    """Raise `ConfigError` where this torch has no gloo."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise ConfigError("transport='collective' needs a torch with gloo. Use auto or inline.")


def _store(host: str, port: int, *, is_host: bool, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, 2, is_host, timeout=timeout, wait_for_workers=False
    )


def _failed(what: str, meeting: Meeting, error: Exception) -> TransportFailed:
    return TransportFailed(
        f"{what} at {meeting.host}:{meeting.port} ({_first_line(error)}). The old weights serve on; push again, by "
        "another transport if the two hosts do not reach each other."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
