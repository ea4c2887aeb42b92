"""What the machine can do: its products at a model's shapes and rows, and its memory; measured where they are compared.

On a CPU the weights are packed once, as the engine packs them; torch's own linear packs them at every call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from rolloutd.runtime.cpu_kernels import CpuKernels, cpu_kernels
from rolloutd.runtime.cpu_ops import packed_products

from .shapes import ModelShape

COPY_BYTES = 1 << 28
MIN_SECONDS = 0.15


def best_seconds(run: Callable[[], object], device: str) -> float:
    """Return the shortest of repeated runs: a limit is what the machine does when nothing disturbs it."""

    def once() -> float:
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    once()
    first = once()
    return min(first, *(once() for _ in range(max(3, min(50, int(MIN_SECONDS / max(first, 1e-6)))))))


def copy_bytes_per_s(device: str) -> float:
    """Return bytes read and written per second by a large copy."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), device)


def product(rows: int, columns: int, inputs: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Return a call that multiplies so many rows as fast as the machine's libraries can.

    Where the products are ours the call writes where it wrote before, as a step does: first touches of new memory, of
    39 MB for the head of a 0.5B model, are not the product's time.
    """
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(columns, inputs, device=device).to(dtype)
    products = packed_products(cpu_kernels()) if device == "cpu" and dtype == torch.float32 else None
    if isinstance(products, CpuKernels):
        ours, packed, y = products, products.pack_weight(weight), torch.empty(rows, columns)
        return lambda: ours.product_into(y, x, packed, None)
    if products is not None:
        packed = products.pack_weight(weight)
        return lambda: products.product(x, packed, None, columns)
    return lambda: F.linear(x, weight)


def step_product_seconds(shape: ModelShape, rows: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return seconds of the products of a decode step of so many rows: of all layers one after the other, and the head.

    Each layer has weights of its own, as in a model: one weight again and again would stay in the processor's caches.
    """
    with torch.inference_mode():
        layers = [product(rows, n, k, dtype, device) for _ in range(shape.layers) for _, n, k in shape.layer_products]
        head = product(rows, shape.vocab, shape.hidden, dtype, device)

        def all_layers() -> None:
            for call in layers:
                call()

        def whole_step() -> None:
            all_layers()
            head()

        in_layers = best_seconds(all_layers, device)
        return {"layers": in_layers, "head": max(0.0, best_seconds(whole_step, device) - in_layers)}


def limits(shape: ModelShape, rows: list[int], dtype: str, device: str) -> dict[str, Any]:
    """Return copy speed, and seconds of the products of a step for each number of rows."""
    products = {str(count): step_product_seconds(shape, count, getattr(torch, dtype), device) for count in rows}
    return {"copy_bytes_per_s": copy_bytes_per_s(device), "step_product_s": products}
