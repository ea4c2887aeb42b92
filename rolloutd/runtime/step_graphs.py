"""Steps as CUDA graphs: captured when they are first needed, replayed after that, eager where a capture fails."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

log = logging.getLogger(__name__)

NUM_WARM_UPS = 2
"""Eager runs before a capture: the first compiles kernels and lets cuBLAS choose, the second shows what is left."""

Step = Callable[[], None]
"""Computes one step on tensors that never move, and allocates nothing that outlives it."""


class Capture(Protocol):
    """How a step becomes something that replays it."""

    def __call__(self, step: Step) -> Step:
        """Run `step` to warm up, capture it, and return what replays it; `RuntimeError` where that cannot be."""
        ...

    def reset(self) -> None:
        """Forget memory that captured steps share; none of them is replayed again."""
        ...


class CudaCapture:
    """CUDA graphs in one memory pool: they never run at once, and keep nothing there between replays."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.reset()

    def reset(self) -> None:
        """Begin a new pool; the old one's memory is free once its graphs are gone."""
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Return a graph's replay."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        replay: Step = graph.replay
        return replay


class StepGraphs:
    """One graph for each key. After a capture that failed, and with no `capture`, every step is eager."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Step] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def replay_of(self, key: Hashable, step: Step) -> Step:
        """Return what computes `step`, captured now if it was not; a capture runs it a few times.

        The caller sees to it that such a run changes nothing.
        """
        if self._capture is None:
            return step
        replay = self._replays.get(key)
        if replay is None:
            try:
                replay = self._replays[key] = self._capture(step)
            except RuntimeError as error:
                log.warning("decoding eagerly, without CUDA graphs: key=%s reason=%s", key, _reason(error))
                self._replays.clear()
                self._capture = None
                return step
        return replay

    def forget(self) -> None:
        """Drop all graphs: memory that they read has moved."""
        if self._replays:
            self._replays.clear()
            assert self._capture is not None
            self._capture.reset()


def _reason(error: BaseException) -> str:
    """Return the first error of a chain with the place that raised it: the end of a capture only says that one was."""
    while error.__context__ is not None:
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "rolloutd" in frame.filename or "kernels" in frame.filename]
    place = (ours or frames)[-1]
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message} (at {place.name}, {place.filename}:{place.lineno})"
