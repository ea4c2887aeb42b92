"""Runs workloads through peers, interleaved, each in its own process, and gathers one report."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from rolloutd.errors import PeerFailed
from rolloutd.version import __version__

from .peers import OURS, Peer
from .shapes import ModelShape, write_checkpoint
from .workloads import Workload

FORMAT = 1
PREFILL_ROWS = 512
"""Rows whose products say how fast prompts could be prefilled: more are no faster."""
MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.1}
"""Of a log-probability from a plain forward, in nats: what is further off is wrong, and is not timed."""

Echo = Callable[[str], None]
Row = dict[str, Any]
Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and how often."""

    shape: ModelShape
    workloads: tuple[Workload, ...]
    peers: tuple[str, ...]
    device: str
    dtype: str
    repeats: int = 3
    lora: str = "off"
    with_limits: bool = True
    with_breakdown: bool = False
    vllm_python: str | None = None

    @property
    def max_len(self) -> int:
        return max(workload.max_len for workload in self.workloads)


def resolved(device: str, dtype: str) -> tuple[str, str]:
    """Return device and dtype for `auto`: a GPU in bfloat16 where torch sees one, else the CPU in float32."""
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def run(setup: Setup, echo: Echo) -> Report:
    """Measure, and return the report; `PeerFailed` names what a peer printed last."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_checkpoint(setup.shape, Path(folder), setup.dtype, max_len=max(1024, setup.max_len))
        peers = [stack.enter_context(_started(name, setup, folder, echo)) for name in setup.peers]
        report = _head(setup)
        report["peers"] = {peer.name: {"ready_s": peer.ready_s} for peer in peers}
        if setup.with_limits:
            report["limits"] = _limits(setup)
        report["rows"] = [row for workload in setup.workloads for row in _measure(setup, workload, peers, report, echo)]
        if setup.with_breakdown and peers[0].name != "daemon":
            report["breakdown"] = {w.name: _breakdown(setup, w, peers) for w in setup.workloads}
    return report


@contextmanager
def _started(name: str, setup: Setup, folder: str, echo: Echo) -> Iterator[Peer]:
    echo(f"starting {name}")
    with Peer(name, _options(name, setup, folder), setup.vllm_python) as peer:
        peer.wait_ready()
        yield peer


def _options(name: str, setup: Setup, folder: str) -> dict[str, Any]:
    """Return the options of a worker: for all the same sequences at once, for ours a KV cache that holds them."""
    batch = max(workload.batch for workload in setup.workloads)
    options: dict[str, Any] = {"model": folder, "device": setup.device, "dtype": setup.dtype, "max_num_seqs": batch}
    if name == "vllm":
        return options | {"max_model_len": setup.max_len}
    if name in OURS:
        tokens = max(w.num_prompts * (w.prompt_len + 16) + w.batch * (max(w.new_tokens) + 32) for w in setup.workloads)
        size = 4 if setup.dtype == "float32" else 2
        options["kv_cache_bytes"] = int(1.1 * tokens * setup.shape.kv_elements_per_token * size) + (1 << 20)
        options["max_model_len"] = setup.max_len
        options["deterministic"] = name == "deterministic"
        if setup.lora != "off":
            options |= {"lora": setup.lora, "max_lora_rank": 16}
    return options


def _head(setup: Setup) -> Report:
    packages = ("torch", "transformers", "triton", "numpy")
    return {
        "bench": "throughput",
        "format": FORMAT,
        "date": date.today().isoformat(),
        "versions": {"rolloutd": __version__, "python": platform.python_version(), **installed(packages)},
        "machine": machine(setup.device),
        "model": asdict(setup.shape),
        "dtype": setup.dtype,
        "lora": setup.lora,
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were measured on."""
    facts: dict[str, Any] = {"processor": _processor(), "threads": len(os.sched_getaffinity(0))}
    if device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _limits(setup: Setup) -> dict[str, Any]:
    from .limits import limits

    rows = {PREFILL_ROWS, *(workload.batch for workload in setup.workloads)}
    return limits(setup.shape, sorted(rows), setup.dtype, setup.device)


def _measure(setup: Setup, workload: Workload, peers: list[Peer], report: Report, echo: Echo) -> list[Row]:
    """Return a row for each peer, from interleaved runs after one that warms up and is checked."""
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    last: dict[str, dict[str, Any]] = {}
    difference = None
    for i in range(setup.repeats + 1):
        request = _request(workload, setup.shape.vocab, i)
        for peer in peers:
            keeps = not i and peer is peers[0] and peer.name != "daemon" and setup.lora == "off"
            answer = peer.ask("run", **request, keep=keeps)
            if keeps:
                difference = _difference(setup, peers, request, answer)
            if i:
                seconds[peer.name].append(answer["seconds"])
                last[peer.name] = answer
    rows = [_row(setup, workload, name, seconds, peers[0].name, last[name], report) for name in seconds]
    rows[0]["max_logprob_difference"] = difference
    for row in rows:
        echo(line(row))
    return rows


def _request(workload: Workload, vocab: int, seed: int) -> dict[str, Any]:
    prompts = workload.prompts(vocab, seed)
    return {"prompts": prompts, "samples": workload.samples, "new_tokens": list(workload.new_tokens)}


def _difference(setup: Setup, peers: list[Peer], request: dict[str, Any], answer: dict[str, Any]) -> float | None:
    """Return max |log p difference| to plain forwards, one completion a prompt; wrong numbers are not timed."""
    scorer = next((peer for peer in peers if peer.name in ("generate", "generate_batch")), None)
    if scorer is None:
        return None
    pairs = list(zip(request["prompts"], answer["tokens"], strict=True))[:8]
    expected = scorer.ask("score", pairs=pairs)["logprobs"]
    worst: float = max(
        abs(a - b)
        for ours, theirs in zip(answer["logprobs"], expected, strict=False)
        for a, b in zip(ours, theirs, strict=True)
    )
    if worst > MAX_DIFFERENCE[setup.dtype]:
        raise PeerFailed(f"log-probabilities differ by {worst:.2e} from transformers: nothing is timed.")
    return worst


def _row(
    setup: Setup,
    workload: Workload,
    name: str,
    seconds: dict[str, list[float]],
    ours: str,
    last: dict[str, Any],
    report: Report,
) -> Row:
    speeds = [workload.num_tokens / value for value in seconds[name]]
    ratios = [theirs / own for theirs, own in zip(seconds[name], seconds[ours], strict=True)]
    row: Row = {
        "workload": workload.name,
        "peer": name,
        "num_tokens": workload.num_tokens,
        "tokens_per_s": _spread(speeds),
        "ratio": _spread(ratios),
        "peak_bytes": last["peak_bytes"],
        "cpu_s": last["cpu_s"],
    }
    if "stats" in last:
        row["stats"] = last["stats"]
        row["cpu_us_per_step"] = 1e6 * last["cpu_s"] / max(1, last["stats"]["num_steps"])
    if setup.with_limits:
        limit_s = floor_seconds(setup, workload, report["limits"])
        row["fraction_of_limit"] = limit_s / statistics.median(seconds[name])
    return row


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def floor_seconds(setup: Setup, workload: Workload, limits: dict[str, Any]) -> float:
    """Return the seconds below which a workload cannot go.

    On a CPU: the matrix products alone, with packed weights in the same run; a prompt's once a group, 512 rows at a
    time, those of generated tokens a step's rows at a time. On a GPU: weights once a step and KV once, a group's prompt
    shared, at the speed of a copy.
    """
    shape = setup.shape
    if setup.device == "cpu":
        products = limits["step_product_s"]
        decode, prefill = products[str(workload.batch)], products[str(PREFILL_ROWS)]
        prompt_tokens = workload.num_prompts * workload.prompt_len
        in_prefill = prompt_tokens * prefill["layers"] / PREFILL_ROWS
        return float(in_prefill + workload.num_tokens * (decode["layers"] + decode["head"]) / workload.batch)
    size = 4 if setup.dtype == "float32" else 2
    steps = max(workload.new_tokens)
    kv = sum(n * workload.prompt_len + workload.samples * n * (n + 1) / 2 for n in workload.new_tokens)
    num_bytes = size * (steps * shape.num_step_weights + kv * shape.kv_elements_per_token)
    return float(num_bytes / limits["copy_bytes_per_s"])


def _breakdown(setup: Setup, workload: Workload, peers: list[Peer]) -> dict[str, Any]:
    request = _request(workload, setup.shape.vocab, 99)
    found = peers[0].ask("profile" if setup.device == "cuda" else "breakdown", **request)
    for peer in peers:
        if peer.name == "daemon":
            found["daemon"] = peer.ask("wire", **request)
    return found


def line(row: Row) -> str:
    """Return a row for people."""
    speed, ratio = row["tokens_per_s"], row["ratio"]
    text = (
        f"{row['workload']:<16} {row['peer']:<15} {speed['median']:>10,.0f} tok/s ({speed['min']:,.0f} to "
        f"{speed['max']:,.0f})  x{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})  peak "
        f"{row['peak_bytes'] / 2**30:.2f} GiB"
    )
    if "fraction_of_limit" in row:
        text += f"  {row['fraction_of_limit']:.0%} of the limit"
    if row.get("max_logprob_difference") is not None:
        text += f"  max |dlogp| {row['max_logprob_difference']:.1e}"
    return text
