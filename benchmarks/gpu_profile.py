"""What a GPU did during a run: how long it was busy, how many kernels a step launched, and which took the time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

NUM_KERNELS = 25


def profile(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Run a request under torch's profiler; the run is slower than one without it, its kernels are not."""
    before = peer.llm.stats().num_steps
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as trace:
        peer.generate(request["prompts"], request["samples"], request["new_tokens"])
        torch.cuda.synchronize()
    steps = peer.llm.stats().num_steps - before
    spans, by_kernel = [], defaultdict[str, list[float]](list)
    for event in trace.events():
        if event.device_type == DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            by_kernel[event.name].append(event.time_range.end - event.time_range.start)
    spans.sort()
    busy, last = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    whole = spans[-1][1] - spans[0][0] if spans else 0.0
    kernels = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS]
    return {
        "num_steps": steps,
        "busy_fraction": busy / whole if whole else None,
        "launches_per_step": len(spans) / max(1, steps),
        "kernels": [{"name": name, "calls": len(times), "us": sum(times)} for name, times in kernels],
    }
