"""What a weight update costs by each transport, beside plain copies of the same bytes in the same run.

    rolloutd bench --weights --shape qwen2.5-0.5b --dtype bfloat16

A trainer's parameters lie in this process's memory, or on the GPU; the engine is in this process too, or in a daemon.
The pause is the longest time between two decode steps of eight sequences while the update came in, beside the time of
such a step. Of each way the parts are given: in process landing the bytes (a copy and a digest in one pass) and the
commit (what is left of packing, and the flip); with a daemon what the sender does (copy and digest, or finding what
changed), what it waits for while the daemon lands bytes, and the commit.

Two copies are given: the C library's memcpy, which is one core's, and torch's, on all cores; both are torch's on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rolloutd.outputs import WeightUpdate
from rolloutd.sampling_params import SamplingParams
from rolloutd.serve import protocol as wire
from rolloutd.serve.push_steps import PushSteps
from rolloutd.serve.steps import Step, Transport
from rolloutd.weights.loader import Checkpoint
from rolloutd.weights.tensors import digest_of, spec_of

from .run import installed, machine
from .shapes import shape_named, write_checkpoint

RANK = 16
STREAMS, STREAM_TOKENS = 8, 2000
"""Sequences that run while the pause is measured."""
STEPS_TIMED = 30

Named = dict[str, Tensor]
Way = tuple[Any, Callable[[], WeightUpdate]]
"""An engine, and the call that updates it."""
CHANGED = (0.01, 0.05, 0.3)
"""Shares of the elements that a step of training changes, for deltas."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of one update."""

    update: str
    transport: str
    num_bytes: int
    """That travelled."""
    seconds: list[float]
    parts: list[dict[str, float]]
    """Seconds of each part, by round."""
    memcpy_seconds: list[float]
    """Of a plain copy on one core, in the same round."""
    copy_seconds: list[float]
    """Of one on all cores."""
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
            "parts": {name: statistics.median(part[name] for part in self.parts) for name in self.parts[0]},
            "gb_per_s": self.num_bytes / median / 1e9,
            "of_memcpy": _ratio(self.memcpy_seconds, self.seconds),
            "of_copy": _ratio(self.copy_seconds, self.seconds),
            "digest_seconds": self.digest_seconds,
            "pause_s": self.pause_s,
            "step_s": self.step_s,
            "pause_steps": None if self.pause_s is None or self.step_s is None else self.pause_s / self.step_s,
        }


def _ratio(plain: list[float], seconds: list[float]) -> float:
    return statistics.median(p / s for p, s in zip(plain, seconds, strict=True))


class Copy:
    """Plain copies of every tensor into memory that was touched before."""

    def __init__(self, tensors: Named) -> None:
        self._pairs = [(tensor, tensor.clone()) for tensor in tensors.values()]

    def seconds(self) -> tuple[float, float]:
        """Return what memcpy takes, and torch's copy; each once its threads are awake."""

        def memcpy(target: Tensor, source: Tensor) -> None:
            if source.is_cuda:
                target.copy_(source)
                return
            ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)

        return self._timed(memcpy), self._timed(Tensor.copy_)

    def _timed(self, copy: Callable[[Tensor, Tensor], object]) -> float:
        for _ in range(2):
            begin = time.perf_counter()
            for source, target in self._pairs:
                copy(target, source)
            settle()
        return time.perf_counter() - begin


def settle() -> None:
    """Wait for what a GPU has been told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def timed(engine: Any) -> Iterator[dict[str, float]]:
    """Fill in how long the parts of the updates of this block take."""
    parts: dict[str, float] = {}

    def measured(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        parts[name] = 0.0

        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                parts[name] += time.perf_counter() - begin

        return call

    if hasattr(engine, "engine"):
        within = engine.engine
        with (
            mock.patch.object(within, "stage", measured("landing", within.stage)),
            mock.patch.object(within, "commit_update", measured("commit", within.commit_update)),
        ):
            yield parts
        return
    parts |= {"sender": 0.0, "waiting": 0.0, "commit": 0.0}
    original = PushSteps.steps

    def steps(push: PushSteps) -> Generator[Step, Any, None]:
        made, answer = original(push), None
        while True:
            begin = time.perf_counter()
            try:
                step = made.send(answer)
            except StopIteration:
                return
            done = time.perf_counter()
            parts["sender"] += done - begin
            answer = yield step
            waits_for = "commit" if isinstance(step.message, wire.WeightsCommit) else "waiting"
            parts[waits_for] += time.perf_counter() - done

    with mock.patch.object(PushSteps, "steps", steps):
        yield parts


TRANSPORTS: tuple[Transport, ...] = ("shared_memory", "collective", "inline")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def adapter_of(targets: Named, modules: tuple[str, ...]) -> Named:
    """Return LoRA matrices, fp32 as PEFT trains them, on these linear maps of every layer."""
    generator = torch.Generator().manual_seed(0)
    tensors: Named = {}
    for name, weight in targets.items():
        if name.endswith(tuple(f"{module}.weight" for module in modules)):
            path = name.removesuffix(".weight")
            rows, columns = weight.shape
            a = torch.randn(RANK, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, RANK, generator=generator) * 0.01
            tensors |= {f"{path}.lora_A.weight": a.to(weight.device), f"{path}.lora_B.weight": b.to(weight.device)}
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
    begin, first, steps = time.perf_counter(), engine.stats().num_steps, 0
    while steps < STEPS_TIMED and time.perf_counter() - begin < 30.0:
        time.sleep(0.02)
        steps = engine.stats().num_steps - first
    return (time.perf_counter() - begin) / max(1, steps)


def rows_of(name: str, tensors: Named, transports: dict[str, Way], repeats: int) -> list[Row]:
    """Return a row for each transport, measured in turns."""
    copy = Copy(tensors)
    seconds: dict[str, list[float]] = {transport: [] for transport in transports}
    copies: dict[str, list[tuple[float, float]]] = {transport: [] for transport in transports}
    parts: dict[str, list[dict[str, float]]] = {transport: [] for transport in transports}
    num_bytes: dict[str, int] = {}
    copy.seconds()
    for round_number in range(repeats + 1):
        for transport, (engine, push) in transports.items():
            plain = copy.seconds()
            with timed(engine) as shares:
                begin = time.perf_counter()
                update = push()
                settle()
                whole = time.perf_counter() - begin
            if round_number:  # the first one finds nothing prepared
                seconds[transport].append(whole)
                copies[transport].append(plain)
                parts[transport].append(shares)
                num_bytes[transport] = update.num_bytes
    begin = time.perf_counter()
    for tensor_name, tensor in tensors.items():
        digest_of(spec_of(tensor_name, tensor), tensor)
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
        memcpys, plain_copies = (list(column) for column in zip(*copies[transport], strict=True))
        taken = seconds[transport], parts[transport], memcpys, plain_copies
        rows.append(Row(name, transport, num_bytes[transport], *taken, digest_s, pause, step))
    return rows


def stepped(tensors: Named, ratio: float) -> Named:
    """Return the parameters after a step that changes this share of their elements."""
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name, tensor in tensors.items():
        is_changed = (torch.rand(tensor.shape, generator=generator) < ratio).to(tensor.device)
        changed[name] = torch.where(is_changed, tensor + 1, tensor)
    return changed


def measure(shape_name: str, dtype: str, repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Return the report of a trainer and an engine on `device`."""
    from rolloutd.llm import LLM
    from rolloutd.serve.client import RolloutClient
    from rolloutd.serve.spawn import start_daemon

    shape = shape_named(shape_name)
    gpu_only: tuple[Transport, ...] = ("cuda_ipc",) if device == "cuda" else ()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, Path(folder), dtype, max_len=4096)
        full = {name: tensor.clone() for name, tensor in Checkpoint(Path(folder)).tensors(getattr(torch, dtype))}
        full = {name: tensor.to(device) for name, tensor in full.items()}
        adapters = {"attention": adapter_of(full, ATTENTION), "all linear": adapter_of(full, ALL_LINEAR)}
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
        options: dict[str, Any] = {"model": folder, "dtype": dtype, "max_num_seqs": STREAMS, "max_model_len": 4096}
        options |= {"kv_cache_bytes": 1 << 30, "device": device}
        with (
            LLM(**options) as llm,
            start_daemon(options, {"die_with_parent": True}) as daemon,
            RolloutClient(daemon.address, timeout=300.0) as client,
        ):
            client.wait_ready(300.0)
            ways: dict[str, Way] = {"in_process": (llm, lambda: llm.update_weights(full))}
            for transport in (*gpu_only, *TRANSPORTS):
                ways[transport] = client, partial(client.update_weights, full, transport=transport)
            rows = rows_of("full", full, ways, repeats)
            for ratio in CHANGED if dtype == "bfloat16" else ():  # in fp32 a step changes every element
                versions = itertools.cycle([full, stepped(full, ratio)])

                def push(versions: Iterator[Named] = versions) -> WeightUpdate:
                    return client.update_weights(next(versions), transport="inline", delta=True)

                push()
                rows += rows_of(f"delta {ratio:.0%}", full, {"inline": (client, push)}, repeats)
            for name, adapter in adapters.items():
                ways = {"in_process": (llm, partial(llm.update_lora, adapter, config))}
                for transport in TRANSPORTS:
                    ways[transport] = client, partial(client.update_lora, adapter, config, transport=transport)
                rows += rows_of(f"lora {name}", adapter, ways, repeats)
    return {
        "bench": "weight_sync",
        "format": 1,
        "versions": installed(("rolloutd", "torch", "numpy", "pyzmq")),
        "machine": machine(device),
        "shape": shape.name,
        "dtype": dtype,
        "rows": [row.to_dict() for row in rows],
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report as a table."""
    yield (
        f"{'update':<16} {'transport':<14} {'MB':>8} {'s':>7} {'GB/s':>6} {'of memcpy':>10} {'of copy':>8} "
        f"{'digest s':>9} {'pause s':>8} {'steps':>6}  parts"
    )
    for row in report["rows"]:
        pause = " " * 15 if row["pause_s"] is None else f"{row['pause_s']:8.3f} {row['pause_steps']:6.1f}"
        parts = ", ".join(f"{name} {part / row['seconds']:.0%}" for name, part in row["parts"].items())
        yield (
            f"{row['update']:<16} {row['transport']:<14} {row['num_bytes'] / 1e6:8.1f} {row['seconds']:7.3f} "
            f"{row['gb_per_s']:6.2f} {row['of_memcpy']:10.1%} {row['of_copy']:8.1%} {row['digest_seconds']:9.3f} "
            f"{pause}  {parts}"
        )
