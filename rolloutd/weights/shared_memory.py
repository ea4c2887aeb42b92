"""Memory that two processes of one host and one user share, for weights on their way from trainer to daemon.

A segment is a file of random name in /dev/shm, which lives in memory and has an owner and a mode. Its creator holds a
lock on it, so what a killed process left behind can be told from what is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import stat
from pathlib import Path
from types import TracebackType

from rolloutd.errors import ManifestMismatch

DIRECTORY = Path("/dev/shm")  # noqa: S108  (shared memory itself; files there are 0600 and of random name)
_NAME = re.compile(r"rolloutd-[0-9a-f]{32}")


def available() -> bool:
    """Return whether this system has shared memory where we look for it."""
    return DIRECTORY.is_dir() and os.access(DIRECTORY, os.W_OK)


class Segment:
    """A mapped segment. A context manager: leaving it unmaps, and removes the file where this side created it."""

    def __init__(self, name: str, descriptor: int, num_bytes: int, *, is_owner: bool) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self._descriptor = descriptor
        self._is_owner = is_owner
        self._map = mmap.mmap(descriptor, num_bytes)
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """Return a new segment of zeros, mode 0600; `OSError` where memory is short, before it is touched."""
        name = f"rolloutd-{secrets.token_hex(16)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(DIRECTORY / name, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(descriptor, 0, num_bytes)
            return cls(name, descriptor, num_bytes, is_owner=True)
        except OSError:
            os.close(descriptor)
            (DIRECTORY / name).unlink(missing_ok=True)
            raise

    @classmethod
    def attach(cls, name: str, num_bytes: int) -> Segment:
        """Return a segment that another process of this user created; `ManifestMismatch` for anything else."""
        if _NAME.fullmatch(name) is None:
            raise ManifestMismatch(f"{name!r} is not the name of a shared segment.")
        try:
            descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ManifestMismatch(f"shared segment {name} cannot be opened ({error.strerror}).") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size != num_bytes:
            os.close(descriptor)
            raise ManifestMismatch(f"shared segment {name} is not this user's file of {num_bytes} bytes.")
        return cls(name, descriptor, num_bytes, is_owner=False)

    def close(self) -> None:
        """Unmap; the creator also removes the file. Views of `buffer` must be released before."""
        if self._descriptor < 0:
            return
        self.buffer.release()
        self._map.close()
        os.close(self._descriptor)
        self._descriptor = -1
        if self._is_owner:
            (DIRECTORY / self.name).unlink(missing_ok=True)

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def reclaim_stale() -> int:
    """Remove segments of this user whose creator is gone; return how many."""
    reclaimed = 0
    for path in DIRECTORY.glob("rolloutd-*"):
        if _NAME.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                reclaimed += 1
            finally:
                os.close(descriptor)
    return reclaimed
