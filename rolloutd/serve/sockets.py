"""ZeroMQ sockets with every option that matters set explicitly, and who may connect to them."""

from __future__ import annotations

import ipaddress
import os
import resource
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
import zmq.auth

from rolloutd.errors import AddressInUse, ConfigError, InsecureBind

HIGH_WATER_MARK = 1_000
"""Messages queued for one peer before a send fails."""
UNLIMITED_BYTES = 1 << 40
"""For sockets whose peer is trusted: the engine's, and the daemon as its client sees it."""
LAST_WORDS_MS = 1_000
"""How long a daemon that ends waits for answers that still lie in its queues."""
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000


def configure(socket: zmq.asyncio.Socket | zmq.Socket[bytes], max_message_bytes: int) -> None:
    """Set what libzmq leaves open: unlimited frames, no heartbeat, endless linger, 30 s handshakes."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 1_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
    socket.setsockopt(zmq.BACKLOG, 512)
    if socket.socket_type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    if socket.socket_type == zmq.DEALER:
        # Not 1: libzmq then throws away, at a disconnect, what has arrived and is not read yet. A daemon's last words,
        # why it ends, were lost so whenever the client's thread was slower than the hang-up (4 of 4 with 1, none with
        # 0, libzmq 4.3.5). What is sent while there is no connection waits; `Link` bounds that wait itself.
        socket.setsockopt(zmq.IMMEDIATE, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us: one connection is one descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def bind_ipc(socket: zmq.asyncio.Socket, path: Path) -> str:
    """Bind a socket file of mode 0600 and return its endpoint. Call it before threads start: umask is the process's."""
    before = os.umask(0o177)
    try:
        socket.bind(f"ipc://{path}")
    except zmq.ZMQError as error:
        raise AddressInUse(f"cannot bind ipc://{path}: {error.strerror}.") from None
    finally:
        os.umask(before)
    return f"ipc://{path}"


def bind_tcp(socket: zmq.asyncio.Socket, listen: str) -> str:
    """Bind a tcp endpoint and return it with the port that was taken."""
    try:
        socket.bind(listen if not listen.endswith(":0") else listen[:-1] + "*")
    except zmq.ZMQError as error:
        raise AddressInUse(f"cannot listen on {listen}: {error.strerror}. Choose another --listen address.") from None
    endpoint: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
    return endpoint.rstrip(b"\0").decode()


def check_listen(listen: str, *, allow_remote: bool) -> bool:
    """Return True for tcp, False for ipc; `InsecureBind` for an address that other hosts reach, unless allowed."""
    if listen == "ipc":
        return False
    parts = urlsplit(listen)
    if parts.scheme != "tcp" or parts.hostname is None or _port(listen) is None:
        raise ConfigError(f"listen={listen!r} is not understood. Use ipc or tcp://HOST:PORT.")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        if parts.hostname != "localhost":
            raise ConfigError(f"listen={listen!r}: name one numeric address, such as 127.0.0.1.") from None
        raise ConfigError("listen: write 127.0.0.1 instead of localhost.") from None
    if not address.is_loopback and not allow_remote:
        raise InsecureBind(
            f"--listen {listen} can be reached from other hosts. Use 127.0.0.1, or add --allow-remote: clients then "
            "need the keys of the connection file."
        )
    return True


def _port(listen: str) -> int | None:
    try:
        return urlsplit(listen).port
    except ValueError:
        return None


def new_keys() -> tuple[str, str]:
    """Return a CURVE key pair, public and secret, in z85."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


class AllowList:
    """CURVE keys (z85) that may connect; ZAP asks it at every handshake."""

    def __init__(self, *keys: str) -> None:
        self._keys = {key.encode() for key in keys}

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether `key` may connect."""
        return key in self._keys
