"""How long work was kept waiting between two steps."""

from __future__ import annotations

from rolloutd.engine.pauses import Pauses


def test_only_waiting_work_counts() -> None:
    now = 0.0
    pauses = Pauses(lambda: now)
    for begin, end, is_busy in [(0.0, 1.0, True), (1.5, 2.0, True), (5.0, 6.0, False), (100.0, 101.0, True)]:
        now = begin
        pauses.step_begins()
        now = end
        pauses.step_ended(is_busy=is_busy)
    assert pauses.longest_s == 3.0, "from 2 to 5; from 6 to 100 there was nothing to do"
