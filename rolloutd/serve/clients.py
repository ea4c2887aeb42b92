"""What the front holds of its clients and their requests: leases, who waits for what, and answers kept for a retry."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rolloutd.errors import IdReuse, TooManyClients

from .arrays import Finished

RESULT_CACHE_BYTES = 64 << 20
"""Answers kept for clients that ask again; the oldest go first."""


@dataclass(slots=True)
class ClientState:
    """One client, known by the random id in its messages; the routing id only says where answers go now."""

    client: str
    routing_id: bytes
    last_heard: float
    request_ids: set[str] = field(default_factory=set)
    update_id: str | None = None
    """The weight update that it has open."""
    calls: int = 0
    """Calls that wait for an answer."""
    holds_pause: bool = False
    share_id: str | None = None
    """Of memory of its own that the daemon may be reading the base from."""

    @property
    def is_waiting(self) -> bool:
        """Whether its end must be noticed soon: it waits for an answer, or holds up others."""
        holds = self.update_id is not None or self.holds_pause or self.share_id is not None
        return bool(self.request_ids) or self.calls > 0 or holds


class Clients:
    """Leases by client id."""

    def __init__(self, *, max_clients: int, lease_s: float) -> None:
        self._max_clients = max_clients
        self._lease_s = lease_s
        self._states: dict[str, ClientState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def heard(self, client: str, routing_id: bytes) -> ClientState:
        """Return the sender's state, renewed; `TooManyClients` for one too many."""
        state = self._states.get(client)
        if state is None:
            if len(self._states) >= self._max_clients:
                raise TooManyClients(
                    f"{len(self._states)} clients are connected, --max-clients is {self._max_clients}. "
                    "Close one, or start the daemon with a higher --max-clients."
                )
            state = self._states[client] = ClientState(client, routing_id, 0.0)
        state.routing_id = routing_id
        state.last_heard = time.monotonic()
        return state

    def get(self, client: str) -> ClientState | None:
        """Return a client's state, None once it is gone."""
        return self._states.get(client)

    def waiting(self) -> list[ClientState]:
        """Return the clients that wait for something, or hold something."""
        return [state for state in self._states.values() if state.is_waiting]

    def is_paused(self) -> bool:
        """Return whether a living client holds new requests back."""
        return any(state.holds_pause for state in self._states.values())

    def end_pause(self) -> None:
        """Let nobody hold new requests back any more."""
        for state in self._states.values():
            state.holds_pause = False

    def remove(self, client: str) -> ClientState | None:
        """Forget a client."""
        return self._states.pop(client, None)

    def expired(self) -> list[ClientState]:
        """Return the clients unheard of for longer than their lease."""
        oldest = time.monotonic() - self._lease_s
        return [state for state in self._states.values() if state.last_heard < oldest]


@dataclass(slots=True)
class RequestState:
    """A request in flight or answered. `fingerprint` tells a retry from a reused id."""

    request_id: str
    client: str
    call: int
    fingerprint: bytes
    finished: list[Finished] = field(default_factory=list)
    is_complete: bool = False

    @property
    def num_bytes(self) -> int:
        return 256 + sum(done.num_bytes for done in self.finished)


def fingerprint(prompt: str | list[int], params: dict[str, Any]) -> bytes:
    """Return a digest of everything that decides an answer."""
    return hashlib.blake2b(msgspec.msgpack.encode((prompt, sorted(params.items()))), digest_size=16).digest()


class Requests:
    """Requests by id, the finished ones kept up to a number of bytes: the same id is never computed twice at once."""

    def __init__(self) -> None:
        self._in_flight: dict[str, RequestState] = {}
        self._finished: OrderedDict[str, RequestState] = OrderedDict()
        self._finished_bytes = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def find(self, request_id: str, mark: bytes) -> RequestState | None:
        """Return the request of that id; `IdReuse` if its content was another."""
        state = self._in_flight.get(request_id) or self._finished.get(request_id)
        if state is not None and state.fingerprint != mark:
            raise IdReuse(f"request id {request_id} came before with other content. Use a new id for each request.")
        return state

    def add(self, state: RequestState) -> None:
        """Remember a request that goes to the engine."""
        self._in_flight[state.request_id] = state

    def get(self, request_id: str) -> RequestState | None:
        """Return a request in flight."""
        return self._in_flight.get(request_id)

    def finish(self, state: RequestState) -> None:
        """Move a completely answered request to the cache."""
        self._in_flight.pop(state.request_id, None)
        state.is_complete = True
        self._finished[state.request_id] = state
        self._finished_bytes += state.num_bytes
        while self._finished_bytes > RESULT_CACHE_BYTES:
            _, oldest = self._finished.popitem(last=False)
            self._finished_bytes -= oldest.num_bytes

    def drop(self, request_id: str) -> RequestState | None:
        """Forget a request that failed or was aborted."""
        return self._in_flight.pop(request_id, None)

    def all_in_flight(self) -> list[RequestState]:
        """Return every request that waits for an answer."""
        return list(self._in_flight.values())
