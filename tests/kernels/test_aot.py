"""What is shipped compiles for four GPUs that are not here, within their limits, as the committed table says.

`make aot-table` writes the table anew for the triton that is installed: registers, stack bytes, spills, shared bytes,
tensor core instructions and asynchronous copies of every configuration. A change of a kernel changes it in its commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

MAX_SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SMALLEST_SHARED_BYTES = 99 << 10
"""Of sm_86 and sm_89 (A10, RTX 4090), for which sm_80 is compiled."""
HOT = ("attention_kernel", "head_tiles_kernel")
"""Kernels that loop over most of a step's bytes: they may not spill at all."""
MAX_COLD_SPILLS = 3
KNOWN = {("3.6.0", "sm_100", "prefill_attention_kernel gemma2-2b bf16"): "spills 10, stack 24"}
"""Known violations, each of which must still hold: head_dim 256 in eight warps, on a B200, by the older compiler."""

FIELDS = ("registers", "stack_bytes", "spills", "shared_bytes", "tensor_cores", "async_copies")
Row = dict[str, int]
TABLE: dict[str, dict[str, dict[str, list[int]]]] = json.loads(Path(__file__).with_name("aot_table.json").read_text())
ROWS = {
    (triton, target, key): dict(zip(FIELDS, row, strict=True))
    for triton, targets in TABLE.items()
    for target, rows in targets.items()
    for key, row in rows.items()
}


def violations(target: str, key: str, row: Row) -> list[str]:
    """Return what a configuration may not do."""
    found = []
    limit = min(MAX_SHARED_BYTES[target], SMALLEST_SHARED_BYTES) if target == "sm_80" else MAX_SHARED_BYTES[target]
    if row["shared_bytes"] > limit:
        found.append(f"shared memory {row['shared_bytes']}")
    is_hot, is_nvidia = any(word in key for word in HOT), target != "gfx942"
    if (row["spills"] or row["stack_bytes"]) if is_hot else row["spills"] > MAX_COLD_SPILLS:
        found.append(f"spills {row['spills']}, stack {row['stack_bytes']}")
    exact = key.endswith("fp32") and is_nvidia  # NVIDIA's tensor cores round fp32 to tf32
    if is_hot and not row["tensor_cores"] and not exact:
        found.append("no tensor cores")
    if is_hot and is_nvidia and not row["async_copies"]:
        found.append("no asynchronous copies")
    return found


def test_everything_in_the_table_keeps_the_limits() -> None:
    found = {place: "; ".join(violations(*place[1:], row)) for place, row in ROWS.items()}
    assert {place: text for place, text in found.items() if text} == KNOWN


def run_aot(root: Path, cache: Path, *arguments: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", MAX_SHARED_BYTES)
def test_the_compiler_still_makes_of_it_what_the_table_says(target: str, root: Path, tmp_path: Path) -> None:
    output = run_aot(root, tmp_path, "-m", "tests.kernels.aot", target)
    rows = {row.pop("key"): row for row in map(json.loads, output.splitlines())}
    committed = TABLE.get(version("triton"), {}).get(target)
    if committed is None:  # another compiler than the ones we know: its code must keep the limits all the same
        found = {key: violations(target, key, row) for key, row in rows.items()}
        assert {key: text for key, text in found.items() if text} == {}
        return
    changed = [
        f"{key}: {list(rows.get(key, {}).values())} was {committed.get(key)}"
        for key in rows.keys() | committed.keys()
        if key not in rows or key not in committed or not alike(rows[key], committed[key])
    ]
    assert not changed, "\n".join([*sorted(changed), "If this is meant: make aot-table, and commit the table."])


def alike(row: Row, committed: list[int]) -> bool:
    """Return whether a configuration compiles as it did: registers within a tenth, the rest to the number."""
    registers, *rest = row.values()
    return abs(registers - committed[0]) <= committed[0] / 10 and rest == committed[1:]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spills": 2}, "spills"),
        ({"stack_bytes": 8}, "stack"),
        ({"shared_bytes": 300_000}, "shared memory"),
        ({"tensor_cores": 0}, "no tensor cores"),
        ({"async_copies": 0}, "no asynchronous"),
    ],
)
def test_the_gate_can_close(change: Row, word: str) -> None:
    row = {"registers": 90, "stack_bytes": 0, "spills": 0, "shared_bytes": 9, "tensor_cores": 4, "async_copies": 4}
    assert violations("sm_90", "decode_attention_kernel x bf16", row) == []
    assert word in violations("sm_90", "decode_attention_kernel x bf16", row | change)[0]
    assert alike(row, list(row.values()))
    assert not alike(row | change, list(row.values()))


def test_every_kernel_is_among_what_is_shipped(root: Path, tmp_path: Path) -> None:
    code = (
        "from tests.kernels.shipped import kernel_names, shipped\n"
        "print(sorted(kernel_names() - {launch.kernel.__name__ for launch in shipped()}))"
    )
    assert run_aot(root, tmp_path, "-c", code).strip() == "[]"
