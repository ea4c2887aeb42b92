"""Large pages: asked for where a tensor lies, and never more than advice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rolloutd.runtime import memory

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> set[str]:
    """Return the kernel's flags of the mapping that holds an address."""
    is_there = False
    for line in SMAPS.read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            is_there = start <= address < end
        elif is_there and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux tells what was asked for")
def test_large_tensors_are_asked_to_lie_in_large_pages() -> None:
    tensor = memory.in_large_pages(torch.empty(1 << 23))
    assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)
    small = memory.in_large_pages(torch.zeros(8))
    assert small.tolist() == [0.0] * 8


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    memory._madvise.cache_clear()
    try:
        assert memory._madvise() is None
        assert memory.in_large_pages(torch.ones(1 << 20)).sum() == 1 << 20
    finally:
        memory._madvise.cache_clear()
