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
DEADLINE_S = 160


def run_cases(cases: Path, root: Path, **environment: str) -> str:
    """Return the output of a pytest run over a file of cases; fail the test where it fails."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", str(cases)]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout
    return result.stdout


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem.removeprefix("cases_"))
def test_the_kernels_in_the_interpreter(cases: Path, root: Path) -> None:
    assert " skipped" not in run_cases(cases, root, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus_that_are_not_here(root: Path) -> None:
    run_cases(Path(__file__).parent / "compile_cases.py", root)


@pytest.mark.gpu
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem.removeprefix("cases_"))
def test_the_kernels_on_a_gpu(cases: Path, root: Path) -> None:
    run_cases(cases, root)
