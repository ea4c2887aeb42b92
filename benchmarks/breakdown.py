"""Where the time of a run goes: on a CPU the engine's own parts under a clock, where they run; what the wire takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rolloutd.runtime.cpu_calls import Attention, Embedding, Gated, Norm, Product, Rope

PARTS = {
    "embed": "embedding",
    "linear": "products",
    "project": "products",
    "paged_attention": "attention",
    "rope_and_store": "rotation and KV write",
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "silu_and_mul": "activation",
    "gelu_tanh_and_mul": "activation",
}
OF_CALLS = {
    Embedding: "embedding",
    Norm: "norms",
    Product: "products",
    Rope: "rotation and KV write",
    Attention: "attention",
    Gated: "activation",
}
"""Of a recorded step, which keeps the seconds of its calls itself."""
THE_REST = "inputs and the rest of the step"


class Clock:
    """Seconds by part; a part that calls another is not charged for it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, charged to a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - begin
                inner = self._inner.pop()
                self._inner[-1] += seconds
                self.seconds[part] += seconds - inner

        return run


def breakdown(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run a request with clocks in the engine; return seconds by part, of the whole, and the number of steps."""
    engine = peer.llm.engine
    runner, scheduler, clock = engine._runner, engine._scheduler, Clock()
    model = runner._model
    places = [(model._ops, name, part) for name, part in PARTS.items()]
    places += [(scheduler, "schedule", "scheduling"), (scheduler, "commit", "scheduling")]
    places += [(runner, "_sample", "sampling"), (runner, "_compute", THE_REST)]
    for owner, name, part in places:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    steps, before = peer.llm.stats().num_steps, _recorded_seconds(runner)
    begin = time.perf_counter()
    try:
        peer.generate(request["prompts"], request["samples"], request["new_tokens"])
        seconds = time.perf_counter() - begin
    finally:
        for owner, name, _ in places:
            delattr(owner, name)
    for part, total in _recorded_seconds(runner).items():
        clock.seconds[part] += total - before.get(part, 0.0)
        clock.seconds[THE_REST] -= total - before.get(part, 0.0)
    parts = dict(clock.seconds)
    parts["requests and outputs"] = seconds - sum(parts.values())
    return {"seconds": seconds, "parts": parts, "num_steps": peer.llm.stats().num_steps - steps}


def wire(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run a request through a daemon; return its seconds, and those in which the engine was not in a step."""
    before, begin = peer.client.stats(), time.perf_counter()
    peer.generate(request["prompts"], request["samples"], request["new_tokens"])
    seconds, after = time.perf_counter() - begin, peer.client.stats()
    num_steps, in_steps = after.num_steps - before.num_steps, after.step_s - before.step_s
    return {"seconds": seconds, "num_steps": num_steps, "wire_s": seconds - in_steps}


def _recorded_seconds(runner: Any) -> dict[str, float]:
    """Return the seconds of all recorded steps so far, by part."""
    step = getattr(runner, "recorded", None)
    return {} if step is None else {part: step.seconds_of(kind) for kind, part in OF_CALLS.items()}
