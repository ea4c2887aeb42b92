"""Reports beside each other: what got slower, beyond the noise of both; and their plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolloutd.errors import ConfigError

from .peers import OURS
from .run import FORMAT, Report
from .shapes import ModelShape


@dataclass(frozen=True)
class Change:
    """One workload and peer in two reports."""

    workload: str
    peer: str
    measure: str
    """`tokens_per_s`, or `ratio` to a peer of the same run where the machines differ."""
    ratio: float
    """After over before: below 1 is slower."""
    noise: float
    """Half the spread of both reports' runs, relative."""

    def is_loss(self, tolerance: float) -> bool:
        """Return whether it got slower by more than the tolerance and the noise."""
        return self.ratio < 1.0 - max(tolerance, self.noise)


def read_report(path: Path) -> Report:
    """Return a report: the last line of a file that holds JSON."""
    try:
        report = json.loads(path.read_text().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"--compare: {path} holds no report ({error}). Write one with `rolloutd bench`.") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ConfigError(f"--compare: {path} is no throughput report of format {FORMAT}. Write it anew.")
    return report


def compare(before: Report, after: Report) -> list[Change]:
    """Return how ours changed, workload by workload.

    On one machine absolute speeds are compared. Otherwise the ratio to each peer that both reports have: the peer is
    the measure of the machine.
    """
    for key in ("model", "dtype"):
        if before[key] != after[key]:
            raise ConfigError(f"--compare: {key} is {before[key]} and {after[key]}. Measure the same thing twice.")
    same_machine = before["machine"] == after["machine"]
    changes = []
    rows = {(row["workload"], row["peer"]): row for row in before["rows"]}
    for row in after["rows"]:
        old = rows.get((row["workload"], row["peer"]))
        is_ours = row["peer"] in OURS
        measure = "tokens_per_s" if same_machine else "ratio"
        if old is None or is_ours != same_machine:
            continue
        noise = max(_noise(old[measure]), _noise(row[measure]))
        ratio = row[measure]["median"] / old[measure]["median"]
        changes.append(Change(row["workload"], row["peer"], measure, ratio, noise))
    if not changes:
        raise ConfigError("--compare: the two reports share no workload and peer. Measure both with the same peers.")
    return changes


def _noise(spread: dict[str, float]) -> float:
    return (spread["max"] - spread["min"]) / (2 * spread["median"])


def breakdown_lines(report: Report) -> list[str]:
    """Return tables of where the time went, for people."""
    lines = []
    for workload, found in report.get("breakdown", {}).items():
        if "parts" in found:
            steps, whole = max(1, found["num_steps"]), found["seconds"]
            lines.append(f"{workload}: {steps} steps of {1e3 * whole / steps:.2f} ms")
            for part, seconds in sorted(found["parts"].items(), key=lambda item: -item[1]):
                lines.append(f"  {part:<32} {1e3 * seconds / steps:8.3f} ms a step  {seconds / whole:6.1%}")
            lines += _product_lines(report, workload, found)
        else:
            busy = found["busy_fraction"]
            lines.append(f"{workload}: {found['launches_per_step']:.1f} launches a step, busy {busy or 0:.1%}")
            for kernel in found["kernels"]:
                mean_us = kernel["us"] / max(1, kernel["calls"])
                lines.append(f"  {mean_us:9.1f} us x {kernel['calls']:6} {kernel['name'][:90]}")
        lines += _wire_lines(found)
    return lines + (_limit_lines(report) if lines else [])


def _wire_lines(found: dict[str, Any]) -> list[str]:
    if "daemon" not in found:
        return []
    daemon = found["daemon"]
    wire_ms = 1e3 * daemon["wire_s"] / max(1, daemon["num_steps"])
    return [
        f"  through the daemon, outside the steps {wire_ms:5.3f} ms a step  {daemon['wire_s'] / daemon['seconds']:6.1%}"
    ]


def _limit_lines(report: Report) -> list[str]:
    """Return what the machine was measured to do."""
    if "limits" not in report:
        return []
    limits, shape = report["limits"], ModelShape(**report["model"])
    lines = [f"this machine: copies {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, read and written"]
    for rows, seconds in limits["step_product_s"].items():
        whole = seconds["layers"] + seconds["head"]
        rate = 2 * int(rows) * shape.num_step_weights / whole
        lines.append(f"  products of a step of {rows:>4} rows {1e3 * whole:9.3f} ms, {rate / 1e12:.3g} TFLOP/s")
    return lines


def _product_lines(report: Report, workload: str, found: dict[str, Any]) -> list[str]:
    row = next((r for r in report["rows"] if r["workload"] == workload and r["peer"] == "rolloutd"), None)
    if row is None or "fraction_of_limit" not in row or "products" not in found["parts"]:
        return []
    measured, limit = found["parts"]["products"] / found["seconds"], row["fraction_of_limit"]
    return [f"  products are {measured:.0%} of the run; at the machine's limit they would be {limit:.0%}"]


def plot(report: Report, path: Path) -> None:
    """Draw tokens per second by workload and peer."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("--plot needs matplotlib. Install it, or leave the option out.") from None
    mpl.use("agg")
    from matplotlib import pyplot as plt

    peers, workloads = (list(dict.fromkeys(row[key] for row in report["rows"])) for key in ("peer", "workload"))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(workloads), 4), layout="constrained")
    width = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        rows = [row for row in report["rows"] if row["peer"] == peer]
        places = [workloads.index(row["workload"]) + (i - (len(peers) - 1) / 2) * width for row in rows]
        heights = [row["tokens_per_s"]["median"] for row in rows]
        low = [h - row["tokens_per_s"]["min"] for h, row in zip(heights, rows, strict=True)]
        high = [row["tokens_per_s"]["max"] - h for h, row in zip(heights, rows, strict=True)]
        axes.bar(places, heights, width, label=peer, yerr=(low, high), capsize=2)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("generated tokens per second")
    machine = report["machine"]
    axes.set_title(f"{report['model']['name']}, {report['dtype']}, {machine.get('gpu', machine['processor'])}")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
