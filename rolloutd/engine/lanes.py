"""Requests for other weights than those that batches are computed with now.

A batch never mixes weights: one lane runs at a time. The policy is a lane, so is the base without an adapter, and so is
each adapter that was kept under a name. Who wants another lane waits until what runs is finished; who comes later waits
behind, so that nobody waits for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from rolloutd.errors import RequestError

from .sequence import Group

BASE = "base"
"""The lane of the base weights: the checkpoint's, or those of the last full update."""
MAX_ADAPTERS = 64
MAX_NAME = 64


def check_adapter_name(name: str) -> None:
    """Raise `RequestError` for a name that no adapter may have."""
    if not 0 < len(name) <= MAX_NAME or name == BASE:
        raise RequestError(
            f"adapter={name[:MAX_NAME]!r} cannot name an adapter. Use 1 to {MAX_NAME} characters; {BASE!r} is the base "
            "without one."
        )


@dataclass(slots=True)
class Lanes:
    """Which lane runs, and who waits for others, in the order of their coming."""

    current: str | None = None
    """None is the policy."""
    _waiting: deque[tuple[str | None, Group]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return any(group.request_id == request_id for _, group in self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return sum(group.num_unfinished for _, group in self._waiting)

    def joins(self, adapter: str | None, group: Group) -> bool:
        """Return whether a group may join what runs; if not, it waits from now on."""
        if adapter == self.current and not self._waiting:
            return True
        self._waiting.append((adapter, group))
        return False

    def uses(self, adapter: str) -> bool:
        """Return whether somebody waits for an adapter."""
        return any(wanted == adapter for wanted, _ in self._waiting)

    def pop(self, request_id: str) -> Group | None:
        """Return a group that waits no more."""
        for entry in self._waiting:
            if entry[1].request_id == request_id:
                self._waiting.remove(entry)
                return entry[1]
        return None

    def request_ids(self) -> list[str]:
        """Return who waits."""
        return [group.request_id for _, group in self._waiting]

    def turn(self) -> list[Group]:
        """Turn to the lane that the first in line wants, and return all that want it."""
        self.current = self._waiting[0][0]
        groups = [group for wanted, group in self._waiting if wanted == self.current]
        self._waiting = deque(entry for entry in self._waiting if entry[0] != self.current)
        return groups
