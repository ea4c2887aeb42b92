"""How long steps took, and how long work was kept waiting between two of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rolloutd.engine.step_clock import StepClock
from rolloutd.llm import LLM
from rolloutd.sampling_params import SamplingParams


def test_only_waiting_work_counts() -> None:
    now = 0.0
    clock = StepClock(lambda: now)
    for begin, end, is_busy in [(0.0, 1.0, True), (1.5, 2.0, True), (5.0, 6.0, False), (100.0, 101.5, True)]:
        now = begin
        clock.step_begins()
        now = end
        clock.step_ended(is_busy=is_busy)
    assert clock.longest_pause_s == 3.0, "from 2 to 5; from 6 to 100 there was nothing to do"
    assert clock.in_steps_s == pytest.approx(1.0 + 0.5 + 1.0 + 1.5)
    clock.forget_pauses()
    assert clock.longest_pause_s == 0.0
    assert clock.in_steps_s == pytest.approx(4.0), "steps are counted since the start"


def test_an_idle_engine_spends_nothing_in_steps(tiny_model: Callable[..., Path]) -> None:
    with LLM(str(tiny_model("qwen2"))) as llm:
        assert llm.stats().step_s == 0.0
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
        used = llm.stats().step_s
        assert used > 0.0
        assert llm.stats().step_s == used
