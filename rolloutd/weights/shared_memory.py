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
import weakref
from collections.abc import Iterator
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
        self._owner = os.getpid() if is_owner else None
        """The process that removes the file; a fork of it does not."""
        self._map = mmap.mmap(descriptor, num_bytes)
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, num_bytes: int) -> Segment:
        """Return a new segment of zeros, mode 0600; `OSError` where memory is short, before it is touched."""
        if num_bytes <= 0:
            raise ValueError(f"num_bytes={num_bytes}: a segment holds at least one byte.")
        name, descriptor = _new_locked_file()
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
            return cls(name, descriptor, num_bytes, is_owner=True)
        except OSError:
            (DIRECTORY / name).unlink(missing_ok=True)
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, name: str, num_bytes: int) -> Segment:
        """Return a segment that another process of this user created; `ManifestMismatch` for anything else."""
        if _NAME.fullmatch(name) is None:
            raise ManifestMismatch(f"{name!r} is not the name of a shared segment. Use rolloutd's own client.")
        try:
            descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ManifestMismatch(
                f"shared segment {name} cannot be opened ({error.strerror}). Use transport='inline'."
            ) from None
        status = os.fstat(descriptor)
        is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if not is_ours or status.st_size != num_bytes or num_bytes <= 0:
            os.close(descriptor)
            raise ManifestMismatch(
                f"shared segment {name} is not this user's file of {num_bytes} bytes. Use transport='inline'."
            )
        try:
            return cls(name, descriptor, num_bytes, is_owner=False)
        except OSError as error:
            os.close(descriptor)
            raise ManifestMismatch(
                f"shared segment {name} cannot be mapped ({error.strerror}). Use transport='inline'."
            ) from None

    def unlink(self) -> None:
        """Remove the file, if this side created it; whoever has it mapped keeps it."""
        if self._owner == os.getpid():
            (DIRECTORY / self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmap; the creator also removes the file. `BufferError` if views of `buffer` were not released before."""
        if self._descriptor < 0:
            return
        self.unlink()
        self.buffer.release()
        self._map.close()
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class KeptSegment:
    """A segment that is kept between uses: to have memory made and mapped takes as long as what travels through it."""

    def __init__(self) -> None:
        self._kept: list[Segment] = []
        """One at most; a finaliser closes it where nobody else does."""
        self.close = weakref.finalize(self, _close_all, self._kept)
        """Remove it; what is lent then is removed when it comes back."""

    @contextlib.contextmanager
    def lend(self, num_bytes: int) -> Iterator[Segment]:
        """Give out a segment of so many bytes or more for a block of code; `OSError` where memory is short."""
        segment = self._kept.pop() if self._kept else None
        if segment is not None and (segment.num_bytes < num_bytes or not (DIRECTORY / segment.name).exists()):
            segment.close()  # too small, or removed by who cleans up
            segment = None
        segment = segment or Segment.create(num_bytes)
        try:
            yield segment
        finally:
            if self._kept or not self.close.alive:
                segment.close()
            else:
                self._kept.append(segment)


def _close_all(segments: list[Segment]) -> None:
    while segments:
        segments.pop().close()


def _new_locked_file() -> tuple[str, int]:
    """Return name and descriptor of a new file that this process holds the lock of."""
    while True:
        name = f"rolloutd-{secrets.token_hex(16)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(DIRECTORY / name, flags, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return name, descriptor
        # Another process's reclaim_stale came between the two calls and took the file for a leftover.
        (DIRECTORY / name).unlink(missing_ok=True)
        os.close(descriptor)


def reclaim_stale() -> int:
    """Remove segments of this user whose creator is gone; return how many."""
    if not DIRECTORY.is_dir():
        return 0
    paths = [path for path in DIRECTORY.iterdir() if _NAME.fullmatch(path.name) is not None]
    return sum(_reclaim(path) for path in paths)


def _reclaim(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # gone meanwhile, another user's, or no file
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False  # its creator lives
    finally:
        os.close(descriptor)
    return True
