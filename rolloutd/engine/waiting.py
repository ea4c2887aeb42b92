"""Groups that wait for their first seat, in the order in which they get it: longest expected first, within a bound."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque

from .sequence import Group

MAX_OVERTAKEN = 64
"""A group gets its seat at most so many admissions later than first come, first served would have given it."""
REMEMBERED_PROMPTS = 65_536


class LengthHistory:
    """How long completions of a prompt came out before: what comes back each epoch is no longer a guess."""

    def __init__(self, capacity: int = REMEMBERED_PROMPTS) -> None:
        self._capacity = capacity
        self._mean: OrderedDict[int, float] = OrderedDict()

    def expected_len(self, group: Group) -> float:
        """Return tokens that a completion is expected to take; the most it may take where nothing is known."""
        known = self._mean.get(group.prompt_key)
        return float(group.params.max_tokens) if known is None else min(known, float(group.params.max_tokens))

    def record(self, group: Group, num_tokens: int) -> None:
        """Note the length of a finished completion."""
        key = group.prompt_key
        mean = self._mean.get(key)
        self._mean[key] = float(num_tokens) if mean is None else 0.75 * mean + 0.25 * num_tokens
        self._mean.move_to_end(key)
        if len(self._mean) > self._capacity:
            self._mean.popitem(last=False)


class WaitingGroups:
    """Longest expected first, because a long completion that starts late runs alone at the end.

    Arrivals that fall behind are bounded: of n groups that came before it and `max_overtaken` more, at most all are
    admitted before a group, then it is its turn.
    """

    def __init__(self, max_overtaken: int = MAX_OVERTAKEN) -> None:
        self._max_overtaken = max_overtaken
        self._by_length: list[tuple[float, int, Group]] = []
        self._by_arrival: deque[tuple[int, Group]] = deque()
        self._waiting: dict[str, int] = {}
        """Request id -> arrival; entries of the two queues that do not match it are stale."""
        self._num_left = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, group: Group, expected_len: float) -> None:
        """Queue a group."""
        arrival = self._num_left + len(self._waiting)
        self._waiting[group.request_id] = arrival
        heapq.heappush(self._by_length, (-expected_len, arrival, group))
        self._by_arrival.append((arrival, group))

    def peek(self) -> Group | None:
        """Return the group whose turn it is."""
        while self._by_arrival and not self._is_waiting(*self._by_arrival[0]):
            self._by_arrival.popleft()
        while self._by_length and not self._is_waiting(*self._by_length[0][1:]):
            heapq.heappop(self._by_length)
        if not self._by_arrival:
            return None
        arrival, oldest = self._by_arrival[0]
        return oldest if self._num_left >= arrival + self._max_overtaken else self._by_length[0][2]

    def remove(self, group: Group) -> None:
        """Take out a group that was admitted or aborted; another one is ignored."""
        if self._waiting.pop(group.request_id, None) is not None:
            self._num_left += 1
        if len(self._by_length) > 2 * len(self._waiting) + self._max_overtaken:
            # Short ones that were admitted in their turn lie at the bottom of the heap, where nothing takes them out.
            self._by_length = [entry for entry in self._by_length if self._is_waiting(*entry[1:])]
            heapq.heapify(self._by_length)

    def _is_waiting(self, arrival: int, group: Group) -> bool:
        return self._waiting.get(group.request_id) == arrival
