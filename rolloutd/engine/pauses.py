"""How long work has been kept waiting between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pauses:
    """Watches the time from the end of a step, after which there was work left, to the begin of the next one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.longest_s = 0.0
        self._clock = clock
        self._since: float | None = None

    def step_begins(self) -> None:
        """Take the pause that ends here into account."""
        if self._since is not None:
            self.longest_s = max(self.longest_s, self._clock() - self._since)

    def step_ended(self, *, is_busy: bool) -> None:
        """Begin a pause, if there is work for a next step."""
        self._since = self._clock() if is_busy else None
