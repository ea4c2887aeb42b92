"""How long steps have taken, and how long work has been kept waiting between two of them."""

from __future__ import annotations

import time
from collections.abc import Callable


class StepClock:
    """Adds up the seconds in steps, and keeps the longest pause: from a step that left work to the next one's begin."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.in_steps_s = 0.0
        self.longest_pause_s = 0.0
        self._clock = clock
        self._begun = 0.0
        self._waits_since: float | None = None

    def step_begins(self) -> None:
        """Take the pause that ends here into account."""
        self._begun = self._clock()
        if self._waits_since is not None:
            self.longest_pause_s = max(self.longest_pause_s, self._begun - self._waits_since)

    def step_ended(self, *, is_busy: bool) -> None:
        """Begin a pause, if there is work for a next step."""
        now = self._clock()
        self.in_steps_s += now - self._begun
        self._waits_since = now if is_busy else None

    def forget_pauses(self) -> None:
        """Watch from here on."""
        self.longest_pause_s = 0.0
