"""The references, the checks, and what happens where a kernel cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rolloutd.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from rolloutd.kernels.launch import next_power_of_two
from rolloutd.kernels.store_kv import store_kv, store_kv_reference

SLOTS = torch.tensor([5, -1, 0])


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_the_reference_writes_slots_of_a_strided_cache() -> None:
    k, v = rows(3, 2, 4), rows(3, 2, 4) + 1
    pair = torch.full((3, 2, 2, 2, 4), float("nan"))
    store_kv_reference(k, v, pair[:, 0], pair[:, 1], SLOTS)
    assert torch.equal(pair[2, 0, 1], k[0])
    assert torch.equal(pair[2, 1, 1], v[0])
    assert torch.equal(pair[0, 0, 0], k[2])
    assert int(pair.isnan().sum()) == pair.numel() - 4 * 2 * 4


@pytest.mark.parametrize("slot", [-2, 6, 1 << 40])
def test_the_reference_raises_on_slots_outside_the_pool_and_writes_nothing(slot: int) -> None:
    k, cache = rows(2, 1, 2), torch.zeros(3, 2, 1, 2)
    with pytest.raises(IndexError, match="outside 0 to 5"):
        store_kv_reference(k, k, cache, cache, torch.tensor([1, slot]))
    assert not cache.any()


@pytest.mark.parametrize(
    ("k", "v", "k_cache", "v_cache", "slots", "message"),
    [
        ((3, 2, 4), (3, 2, 5), (3, 2, 2, 4), (3, 2, 2, 4), SLOTS, r"are not one \[T, K, D\]"),
        ((3, 8), (3, 8), (3, 2, 2, 4), (3, 2, 2, 4), SLOTS, r"are not one \[T, K, D\]"),
        ((3, 2, 4), (3, 2, 4), (3, 2, 4, 2), (3, 2, 4, 2), SLOTS, r"are not one \[N, B, 2, 4\]"),
        ((3, 2, 4), (3, 2, 4), (3, 2, 2, 4), (2, 2, 2, 4), SLOTS, r"are not one \[N, B, 2, 4\]"),
        ((3, 2, 4), (3, 2, 4), (3, 2, 2, 4), (3, 2, 2, 4), SLOTS[:2], r"expected int64 \[3\]"),
        ((3, 2, 4), (3, 2, 4), (3, 2, 2, 4), (3, 2, 2, 4), SLOTS.int(), r"expected int64 \[3\]"),
    ],
)
def test_store_kv_names_what_does_not_fit(
    k: tuple[int, ...],
    v: tuple[int, ...],
    k_cache: tuple[int, ...],
    v_cache: tuple[int, ...],
    slots: torch.Tensor,
    message: str,
) -> None:
    arguments = (rows(*k), rows(*v), rows(*k_cache), rows(*v_cache), slots)
    for op in (store_kv, store_kv_reference):
        with pytest.raises(ValueError, match=message):
            op(*arguments)


def test_store_kv_refuses_caches_of_two_dtypes() -> None:
    k, cache = rows(3, 2, 4), torch.zeros(3, 2, 2, 4)
    with pytest.raises(ValueError, match="differ in dtype"):
        store_kv_reference(k, k, cache, cache.half(), SLOTS)


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        (rows(2, 3), rows(2, 4), rows(3), r"are not one \[T, E\]"),
        (rows(6), rows(6), rows(6), r"are not one \[T, E\]"),
        (rows(2, 3), rows(2, 3), rows(4), r"weight \(4,\) is not \[3\]"),
        (rows(2, 0), rows(2, 0), rows(0), "at least one entry"),
        (rows(2, 3).int(), rows(2, 3), rows(3), "x is torch.int32"),
    ],
)
def test_add_rms_norm_names_what_does_not_fit(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, message: str
) -> None:
    for op in (add_rms_norm, add_rms_norm_reference):
        with pytest.raises(ValueError, match=message):
            op(x, residual, weight, 1e-6)


def test_the_residual_stream_of_autocast_stays_fp32() -> None:
    x, residual, weight = rows(2, 8).bfloat16(), rows(2, 8), torch.ones(8)
    out, total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert out.dtype == total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)


def test_a_kernel_refuses_tensors_of_a_cpu_and_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match="Call add_rms_norm_reference there"):
        add_rms_norm(rows(2, 3), rows(2, 3), rows(3), 1e-6)


def test_powers_of_two() -> None:
    assert [next_power_of_two(n) for n in (1, 2, 3, 64, 65, 80, 1000)] == [1, 2, 4, 64, 128, 128, 1024]


def test_references_import_and_run_where_triton_is_absent(root: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # an import of it raises
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from rolloutd.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from rolloutd.kernels.store_kv import store_kv_reference
out, total = add_rms_norm_reference(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0)
cache = torch.zeros(1, 1, 1, 2)
store_kv_reference(torch.ones(1, 1, 2), torch.ones(1, 1, 2), cache, cache, torch.tensor([0]))
assert total.tolist() == [[2.0, 2.0]] and cache.sum() == 2
try:
    add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0)
except RuntimeError as error:
    print(error)
"""
    env = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("add_rms_norm needs triton, which is not installed")
