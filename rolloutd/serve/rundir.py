"""Where daemons keep their sockets and connection files: a directory that only its owner can enter.

A daemon's files share a random name: `.lock` (held for life, so that leftovers of a killed daemon can be told), `.sock`
and `-engine.sock`, `.beat`, and the connection file `.json`, which is all that a client needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rolloutd.errors import AddressInUse, ConfigError, InsecureBind, NoListener

MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path (sockaddr_un, Linux)."""


def run_dir() -> Path:
    """Return the per-user directory, made with mode 0700; `InsecureBind` if others own it or can enter it."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "rolloutd" if base and Path(base).is_dir() else _fallback_dir()
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass  # judged below, without following a link
    except OSError as error:
        raise ConfigError(f"the run directory {path} cannot be made ({error.strerror}). Set XDG_RUNTIME_DIR.") from None
    status = path.lstat()
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    if not private:
        raise InsecureBind(
            f"the run directory {path} is a link, belongs to somebody else, or is open to others "
            f"(mode {stat.S_IMODE(status.st_mode):o}). Remove it, or set XDG_RUNTIME_DIR to a directory of yours."
        )
    return path


def _fallback_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"rolloutd-{os.getuid()}"


@dataclass(frozen=True)
class Connection:
    """What a client needs, as the connection file holds it."""

    address: str
    pid: int
    incarnation: str
    model: str
    log_path: str | None = None
    server_key: str | None = None
    """CURVE keys (z85) of a tcp listener: the server's public one and a pair for clients."""
    client_key: str | None = None
    client_secret: str | None = None

    @property
    def token(self) -> str | None:
        """The keys in one string, for `token=`."""
        if self.server_key is None or self.client_key is None or self.client_secret is None:
            return None
        return f"{self.server_key} {self.client_key} {self.client_secret}"

    def write(self, path: Path) -> None:
        """Write the file with mode 0600, whole or not at all."""
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Connection:
        """Return the file's content; `ConfigError` if it is none of ours."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ConfigError(
                f"{path} is not a rolloutd connection file. Pass the path that the daemon printed."
            ) from None
        except OSError as error:
            raise NoListener(
                f"the connection file {path} cannot be read ({error.strerror}). Is the daemon running?"
            ) from None


class Lease:
    """The files of one daemon; the lock is held until `release` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.incarnation = secrets.token_hex(8)
        # Locked before it gets its name: another daemon that starts now must not take it for a dead one's.
        draft = self._path(".draft")
        self._lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.rename(self._path(".lock"))
        if len(os.fsencode(self.engine_socket)) > MAX_SOCKET_PATH:
            raise ConfigError(f"{self.engine_socket} is too long for a socket. Set XDG_RUNTIME_DIR to a shorter path.")

    def _path(self, suffix: str) -> Path:
        return self.directory / f"{self.incarnation}{suffix}"

    @property
    def client_socket(self) -> Path:
        return self._path(".sock")

    @property
    def engine_socket(self) -> Path:
        return self._path("-engine.sock")

    @property
    def heartbeat(self) -> Path:
        return self._path(".beat")

    @property
    def connection_file(self) -> Path:
        return self._path(".json")

    def release(self) -> None:
        """Remove the files and give the lock back."""
        _remove(self.directory, self.incarnation)
        os.close(self._lock)


def reclaim_stale(directory: Path) -> int:
    """Remove the files of daemons that died without cleaning up; return how many daemons those were."""
    reclaimed = 0
    for lock in directory.glob("*.lock"):
        if not _is_locked(lock):
            _remove(directory, lock.stem)
            reclaimed += 1
    return reclaimed


def _is_locked(lock: Path) -> bool:
    """Return whether a living daemon holds the lock; True where that cannot be told. Asking takes it for a moment."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(directory: Path, incarnation: str) -> None:
    for suffix in (".sock", "-engine.sock", ".beat", ".json", ".lock"):
        (directory / f"{incarnation}{suffix}").unlink(missing_ok=True)


def live_connections() -> Iterator[Connection]:
    """Yield the connections of the run directory's living daemons, newest first."""
    with contextlib.suppress(OSError):
        files = sorted(run_dir().glob("*.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for file in files:
            if _is_locked(file.with_suffix(".lock")):
                with contextlib.suppress(ConfigError, NoListener):
                    yield Connection.read(file)


def find_connection(address: str | None, token: str | None) -> Connection:
    """Return how to reach a daemon.

    `address` is an endpoint (`ipc://…`, `tcp://…`), a connection file, or None for this user's newest daemon. Keys of a
    tcp endpoint come from `token`, or from the connection file of this user that names the endpoint.
    """
    if address is None:
        for connection in live_connections():
            return connection
        raise NoListener("no daemon of this user is running. Start one: rolloutd --model DIR, or pass its address.")
    if "://" not in address:
        return Connection.read(Path(address).expanduser())
    known = next((c for c in live_connections() if c.address == address), None)
    if known is not None and token is None:
        return known
    keys = token.split() if token else []
    if token is not None and len(keys) != 3:
        raise ConfigError("token is not one that a daemon wrote. Pass the token of its connection file.")
    bare = Connection(address=address, pid=0, incarnation="", model="")
    return Connection(
        **{**asdict(bare), **dict(zip(("server_key", "client_key", "client_secret"), keys, strict=False))}
    )


def claim(path: Path | None, lease: Lease) -> Path:
    """Return the connection file to write; `AddressInUse` if a live daemon's file lies at the path asked for."""
    if path is None:
        return lease.connection_file
    if path.exists():
        old = None
        with contextlib.suppress(ConfigError, NoListener):
            old = Connection.read(path)
        if old is not None and any(c.incarnation == old.incarnation for c in live_connections()):
            raise AddressInUse(f"{path} is the connection file of a running daemon (pid {old.pid}). Use another path.")
    return path


def boot_id() -> str:
    """Return an id of this boot of this machine: equal ids can share memory. The mount namespace is part of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/mnt').readlink()}"
    except OSError:
        return f"unknown {os.urandom(8).hex()}"
