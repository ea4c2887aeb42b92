"""A page of memory in which the engine process shows that it lives and moves; the front only reads it."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_LAYOUT = struct.Struct("<dQQd")
TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Pulse:
    """What the page says; times are of the machine's monotonic clock, in seconds."""

    tick: float
    """Last sign of life, written by a thread."""
    steps: int
    """Steps and messages finished."""
    busy: bool
    """True within a step or a message."""
    since: float
    """When `busy` last changed or a step began."""


class HeartbeatWriter:
    """The engine's half. `step` and `idle` cost a few hundred nanoseconds."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._steps = 0
        self._busy = False
        self._since = time.monotonic()
        self._write()
        threading.Thread(target=self._tick, name="heartbeat", daemon=True).start()

    def begin(self) -> None:
        """A step begins. `since` is set first: the tick thread must never show a step with an old beginning."""
        self._since = time.monotonic()
        self._busy = True
        self._write()

    def end(self) -> None:
        """A step ended."""
        self._busy = False
        self._since = time.monotonic()
        self._steps += 1
        self._write()

    def _write(self) -> None:
        _LAYOUT.pack_into(self._page, 0, time.monotonic(), self._steps, self._busy, self._since)

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            self._write()


class HeartbeatReader:
    """The front's half; it owns the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(descriptor, mmap.PAGESIZE)
        self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        os.close(descriptor)

    def read(self) -> Pulse:
        """Return the latest pulse."""
        tick, steps, busy, since = _LAYOUT.unpack_from(self._page, 0)
        return Pulse(tick, steps, bool(busy), since)

    def close(self) -> None:
        """Remove the page."""
        self._page.close()
        self.path.unlink(missing_ok=True)
