"""What a weight update costs by each transport, beside a plain copy of the same bytes in the same run.

    python -m rolloutd.benchmarks.weight_sync --shape qwen2.5-0.5b --dtype bfloat16

A trainer's parameters lie in this process's memory; the engine is in this process too, or in a daemon. The pause is the
longest time between two decode steps of eight sequences while the update came in, beside the time of such a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolloutd.sampling_params import SamplingParams
from rolloutd.serve.push_steps import Transport
from rolloutd.weights.digest import tensor_digest
from rolloutd.weights.loader import Checkpoint
from rolloutd.weights.tensors import bytes_of, spec_of

from .run import installed, machine
from .shapes import shape_named, write_checkpoint

RANK = 16
STREAMS, STREAM_TOKENS = 8, 2000
"""Sequences that run while the pause is measured."""

Named = dict[str, Tensor]
Way = tuple[Any, Callable[[], object]]
"""An engine, and the call that updates it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of one update."""

    update: str
    transport: str
    num_bytes: int
    seconds: list[float]
    copy_seconds: list[float]
    """Of a plain copy, in the same round."""
    digest_seconds: float
    """Of the digest alone, once over these bytes."""
    pause_s: float | None
    """None where the engine does not run while it is updated."""
    step_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return medians and ratios."""
        median = statistics.median(self.seconds)
        return {
            "update": self.update,
            "transport": self.transport,
            "num_bytes": self.num_bytes,
            "seconds": median,
            "gb_per_s": self.num_bytes / median / 1e9,
            "of_memcpy": statistics.median(c / s for c, s in zip(self.copy_seconds, self.seconds, strict=True)),
            "digest_seconds": self.digest_seconds,
            "pause_s": self.pause_s,
            "step_s": self.step_s,
            "pause_steps": None if self.pause_s is None or self.step_s is None else self.pause_s / self.step_s,
        }


class Copy:
    """A plain copy of every tensor into memory that was touched before."""

    def __init__(self, tensors: Named) -> None:
        self._pairs = [(tensor, tensor.clone()) for tensor in tensors.values()]

    def seconds(self) -> float:
        """Return what one takes."""
        begin = time.perf_counter()
        for source, target in self._pairs:
            target.copy_(source)
        return time.perf_counter() - begin


TRANSPORTS: tuple[Transport, ...] = ("shared_memory", "inline")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def adapter_of(targets: Named, modules: tuple[str, ...]) -> Named:
    """Return LoRA matrices, fp32 as PEFT trains them, on these linear maps of every layer."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in targets.items():
        if name.endswith(tuple(f"{module}.weight" for module in modules)):
            path = name.removesuffix(".weight")
            rows, columns = weight.shape
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    return tensors


@contextmanager
def running(engine: Any) -> Iterator[None]:
    """Decode in the daemon while the body runs."""
    params = SamplingParams(n=STREAMS, max_tokens=STREAM_TOKENS, ignore_eos=True)
    stream = engine.stream([[1, 2, 3, 4]], params)
    ended = threading.Event()

    def watch() -> None:
        for _ in stream:
            pass
        ended.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30.0
    while engine.stats().num_running < STREAMS and time.monotonic() < deadline:
        time.sleep(0.01)
    yield
    stream.abort(0)
    ended.wait(30.0)


def step_seconds(engine: Any) -> float:
    """Return the time of a decode step of what runs."""
    begin, first = time.perf_counter(), engine.stats().num_steps
    time.sleep(2.0)
    steps: int = engine.stats().num_steps - first
    return (time.perf_counter() - begin) / max(1, steps)


def rows_of(name: str, tensors: Named, transports: dict[str, Way], repeats: int) -> list[Row]:
    """Return a row for each transport, measured in turns."""
    num_bytes, copy = sum(tensor.nbytes for tensor in tensors.values()), Copy(tensors)
    seconds: dict[str, list[float]] = {transport: [] for transport in transports}
    copies: dict[str, list[float]] = {transport: [] for transport in transports}
    copy.seconds()
    for round_number in range(repeats + 1):
        for transport, (_, push) in transports.items():
            plain, begin = copy.seconds(), time.perf_counter()
            push()
            if round_number:  # the first one finds nothing prepared
                seconds[transport].append(time.perf_counter() - begin)
                copies[transport].append(plain)
    begin = time.perf_counter()
    for tensor_name, tensor in tensors.items():
        tensor_digest(spec_of(tensor_name, tensor), bytes_of(tensor))
    digest_s = time.perf_counter() - begin
    rows = []
    for transport, (engine, push) in transports.items():
        pause = step = None
        if hasattr(engine, "stream"):
            with running(engine):
                step = step_seconds(engine)
                push()
                time.sleep(2 * step)
                pause = engine.stats().longest_pause_s
        rows.append(Row(name, transport, num_bytes, seconds[transport], copies[transport], digest_s, pause, step))
    return rows


def measure(shape_name: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Return the report."""
    from rolloutd.llm import LLM
    from rolloutd.serve.client import RolloutClient
    from rolloutd.serve.spawn import start_daemon

    shape = shape_named(shape_name)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, Path(folder), dtype, max_len=4096)
        full = {name: tensor.clone() for name, tensor in Checkpoint(Path(folder)).tensors(getattr(torch, dtype))}
        adapters = {"attention": adapter_of(full, ATTENTION), "all linear": adapter_of(full, ALL_LINEAR)}
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
        options: dict[str, Any] = {"model": folder, "dtype": dtype, "max_num_seqs": STREAMS, "max_model_len": 4096}
        options |= {"kv_cache_bytes": 1 << 30}
        with (
            LLM(**options) as llm,
            start_daemon(options, {"die_with_parent": True}) as daemon,
            RolloutClient(daemon.address, timeout=300.0) as client,
        ):
            client.wait_ready(300.0)
            ways: dict[str, Way] = {"in_process": (llm, lambda: llm.update_weights(full))}
            for transport in TRANSPORTS:
                ways[transport] = client, partial(client.update_weights, full, transport=transport)
            rows = rows_of("full", full, ways, repeats)
            for name, adapter in adapters.items():
                ways = {"in_process": (llm, partial(llm.update_lora, adapter, config))}
                for transport in TRANSPORTS:
                    ways[transport] = client, partial(client.update_lora, adapter, config, transport=transport)
                rows += rows_of(f"lora {name}", adapter, ways, repeats)
    return {
        "bench": "weight_sync",
        "format": 1,
        "versions": installed(("rolloutd", "torch", "numpy", "pyzmq")),
        "machine": machine("cpu"),
        "shape": shape.name,
        "dtype": dtype,
        "rows": [row.to_dict() for row in rows],
    }


def main() -> None:
    """Print a table and, as the last line, JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report = measure(options.shape, options.dtype, options.repeats)
    print(
        f"{'update':<16} {'transport':<14} {'MB':>8} {'s':>8} {'GB/s':>6} {'of memcpy':>10} {'digest s':>9} "
        f"{'pause':>8} steps"
    )
    for row in report["rows"]:
        print(
            f"{row['update']:<16} {row['transport']:<14} {row['num_bytes'] / 1e6:8.1f} {row['seconds']:8.3f} "
            f"{row['gb_per_s']:6.2f} {row['of_memcpy']:10.1%} {row['digest_seconds']:9.3f} "
            + ("" if row["pause_s"] is None else f"{row['pause_s']:8.3f} {row['pause_steps']:.1f}")
        )
    text = json.dumps(report)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
