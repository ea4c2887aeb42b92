"""Compile what is shipped for GPUs that are not there, and tell what the compiler made of it.

    python -m tests.kernels.aot sm_90 [WORD ...]    one JSON line each; words choose kernels by their names
    python -m tests.kernels.aot table               all targets, written to aot_table.json under this triton's version

Needs no driver: Triton carries the assemblers. A target takes a core one to two minutes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.shipped import Launch, shipped


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    max_shared_bytes: int
    """Of one block."""


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),  # A100
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),  # H100, H200
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),  # B200
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),  # MI300X
}


@dataclass(frozen=True)
class Report:
    """What one configuration uses on one target."""

    key: str
    registers: int
    """Per thread; vector registers on AMD."""
    stack_bytes: int
    """Per thread; scratch on AMD."""
    spills: int
    """Instructions that move registers to memory and back; spilled registers on AMD."""
    shared_bytes: int
    tensor_cores: int
    """Instructions for them."""
    async_copies: int


def compile_launch(launch: Launch, target: str) -> Report:
    """Return the report of one configuration."""
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    gpu = TARGETS[target].gpu
    compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    read = _read_nvidia if gpu.backend == "cuda" else _read_amd
    return Report(key=launch.key, shared_bytes=compiled.metadata.shared, **read(compiled.asm))


def _read_nvidia(asm: Mapping[str, Any]) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"] + found.get("LOCAL", 0),
        "spills": _count(r"LDL|STL", sass),
        "tensor_cores": _count(r"HMMA|HGMMA|UTCHMMA|UTCQMMA", sass),
        "async_copies": _count(r"LDGSTS|UTMALDG|UBLKCP", sass),
    }


def _read_amd(asm: Mapping[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return {
        "registers": value("vgpr_count"),
        "stack_bytes": value("private_segment_fixed_size"),
        "spills": value("vgpr_spill_count"),
        "tensor_cores": _count(r"v_mfma", text),
        "async_copies": 0,
    }


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _count(mnemonics: str, text: str) -> int:
    return len(re.findall(rf"\b(?:{mnemonics})", text))


TABLE = Path(__file__).with_name("aot_table.json")


def write_table() -> None:
    """Compile everything and put it into the table, beside what other versions of triton made of it."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        reports = dict(zip(TARGETS, pool.map(_all_reports, TARGETS), strict=True))
    table[triton.__version__] = {
        target: {report["key"]: [value for name, value in report.items() if name != "key"] for report in rows}
        for target, rows in reports.items()
    }
    text = json.dumps(dict(sorted(table.items())), indent=1)
    TABLE.write_text(
        re.sub(r"\[\s+([^\]]*?)\s+\]", lambda row: f"[{re.sub(chr(92) + 's+', ' ', row[1])}]", text) + "\n"
    )


def _all_reports(target: str) -> list[dict[str, Any]]:
    lines = _output(sys.executable, "-m", "tests.kernels.aot", target).splitlines()
    return [json.loads(line) for line in lines]


def main(target: str, *words: str) -> None:
    """Print a line for each configuration, or write the table."""
    if target == "table":
        write_table()
        return
    for launch in shipped():
        if not words or any(word in launch.key for word in words):
            print(json.dumps(asdict(compile_launch(launch, target))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
