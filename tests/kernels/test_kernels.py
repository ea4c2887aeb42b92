"""Runs the kernel cases (`cases_*.py`) in processes of their own: interpreted here, compiled where there is a GPU.

A process of its own, because TRITON_INTERPRET must be set before triton is imported, and because in this process it
would hide a kernel that the CPU path launches by mistake.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted(Path(__file__).parent.glob("cases_*.py"))


def run_cases(root: Path, **environment: str) -> str:
    """Return the output of a pytest run over all cases; fail the test where it fails."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", *map(str, CASES)]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=160)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_the_kernels_in_the_interpreter(root: Path) -> None:
    output = run_cases(root, TRITON_INTERPRET="1")
    assert len(CASES) == 0
    assert " passed" in output
    assert " skipped" not in output


@pytest.mark.gpu
def test_the_kernels_on_a_gpu(root: Path) -> None:
    assert " passed" in run_cases(root)
