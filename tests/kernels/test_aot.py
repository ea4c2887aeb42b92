"""What is shipped for attention and head compiles for GPUs that are not here, without spills and within their limits.

`python -m tests.kernels.aot TARGET` reports on every configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MAX_SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
WORDS = ("attention_kernel qwen2.5-1.5b bf16", "head_tiles_kernel qwen2.5-1.5b bf16")
KNOWN = {
    ("gfx942", "head_tiles_kernel"): "shared memory 73728",
    ("sm_80", "prefill_attention_kernel"): "spills 6",
}
"""Known violations. Four stages of head and draw do not fit an MI300X, where nothing has been run; an A100's prefill at
head_dim 128 spills six instructions. An entry that no longer holds fails the test too."""


def violations(target: str, row: dict[str, Any]) -> list[str]:
    """Return what a configuration may not do."""
    found = []
    if row["shared_bytes"] > MAX_SHARED_BYTES[target]:
        found.append(f"shared memory {row['shared_bytes']}")
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if not row["tensor_cores"]:
        found.append("no tensor cores")
    if target == "sm_90" and not row["async_copies"]:
        found.append("no asynchronous copies")
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", MAX_SHARED_BYTES)
def test_attention_and_head_compile_within_limits(target: str, root: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.aot", target, *WORDS]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = {row["key"].split()[0]: row for row in map(json.loads, result.stdout.splitlines())}
    print(json.dumps(rows))
    assert set(rows) == {f"{kind}_attention_kernel" for kind in ("decode", "prefill", "prefix")} | {"head_tiles_kernel"}
    for kernel, row in rows.items():
        known = KNOWN.get((target, kernel))
        assert violations(target, row) == ([] if known is None else [known]), f"{kernel} on {target}"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spills": 2}, "spills"),
        ({"shared_bytes": 300_000}, "shared memory"),
        ({"tensor_cores": 0}, "no tensor cores"),
        ({"async_copies": 0}, "no asynchronous"),
    ],
)
def test_the_gate_can_close(change: dict[str, int], word: str) -> None:
    row = {"registers": 90, "stack_bytes": 0, "spills": 0, "shared_bytes": 9, "tensor_cores": 4, "async_copies": 4}
    assert violations("sm_90", row) == []
    assert word in violations("sm_90", row | change)[0]


def test_every_kernel_is_among_what_is_shipped(root: Path) -> None:
    code = (
        "from tests.kernels.shipped import kernel_names, shipped\n"
        "print(sorted(kernel_names() - {launch.kernel.__name__ for launch in shipped()}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr[-2000:]
