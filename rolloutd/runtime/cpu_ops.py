"""Ops of native models on a CPU in fp32: products with weights packed once a version, our C between them.

torch's own linear packs a weight at every call; with one that is packed already, oneDNN multiplies 64 rows 1.6 to 3
times as fast, and our own products 1.2 to 1.4 times as fast as that (docs/performance.md). The packed copy takes the
memory of the weights once more.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.kernels.adapters import TailAdapters
from rolloutd.weights.packing import Linear

from .cpu_kernels import MAX_HEAD_DIM, VECTOR, CpuKernels
from .inputs import ForwardInputs
from .kv_cache import KVLayer
from .ops import AttentionSpec, HeadSpec, Ops, Projection, completed
from .row_invariant import RowInvariantOps

log = logging.getLogger(__name__)

PACKED_ROWS = 64
"""Rows that oneDNN packs for. On the processors that were measured its layout for 64 is the best one for 8 to 512."""


MLP_ROWS = 256
"""What an MLP has between its products then stays in the caches, and in memory that the last rows had already."""


class PackedProducts(Protocol):
    """Products with weights in a layout of their own. Weights [N, K] and inputs [M, K] are fp32."""

    def pack_weight(self, weight_NK: Tensor, spare: Tensor | None = None, num_threads: int | None = None) -> Tensor:
        """Return a weight packed; if it can be, in `spare`, to which one of this shape was packed that is no more.

        On so many threads, if the products have a say in it; None: on all.
        """
        ...

    def product(self, x_MK: Tensor, packed: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
        """Return x W^T + b."""
        ...


class OneDnnProducts:
    """Products of the library that torch is built with, for machines without a C compiler."""

    def pack_weight(self, weight_NK: Tensor, spare: Tensor | None = None, num_threads: int | None = None) -> Tensor:
        """Return a weight in oneDNN's own layout, in memory of its own."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, PACKED_ROWS)
        return packed

    def product(self, x_MK: Tensor, packed: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
        """Return x W^T + b."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, packed, bias_N, "none", [], "")
        return y


def packed_products(kernels: CpuKernels | None) -> PackedProducts | None:
    """Return the fastest products that this machine has; None, with the reason in the log, where it is torch's own.

    Ours on one thread would lose against a library's on several.
    """
    if kernels is not None and (kernels.has_threads or torch.get_num_threads() == 1):
        return kernels
    return _one_dnn()


@lru_cache(maxsize=1)
def _one_dnn() -> OneDnnProducts | None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 24, generator=generator), torch.randn(40, 24, generator=generator)
    bias, products = torch.randn(40, generator=generator), OneDnnProducts()
    try:
        y = products.product(x, products.pack_weight(weight), bias, 40)
    except (AttributeError, RuntimeError) as error:  # operators of torch's compiler, not of its public interface
        log.warning("packed_weights=off reason=%r; products are slower", str(error).splitlines()[0])
        return None
    if not torch.allclose(y, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4):
        log.warning("packed_weights=off reason='a packed product gave other numbers'; products are slower")
        return None
    return products


class PackedWeights:
    """Weights that are packed, each for as long as the weight itself lives.

    The memory of those that went is kept for the next version: fresh memory costs more than the packing.
    """

    def __init__(self, products: PackedProducts) -> None:
        self._products = products
        self._packed: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        """By the id of a weight, which says nothing once the weight is gone: an entry goes with it."""
        self._spare: dict[tuple[int, ...], list[Tensor]] = {}
        """By the shape of the weight."""

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b for inputs [..., K]."""
        num_outputs, num_inputs = weight.shape
        rows = x if x.dim() == 2 else x.reshape(-1, num_inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = self._products.product(rows, self.of(weight), bias, num_outputs)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], num_outputs)

    def of(self, weight: Tensor, num_threads: int | None = None) -> Tensor:
        """Return an fp32 weight [N, K] packed; it is packed the first time. What is packed may not be written to."""
        key = id(weight)
        found = self._packed.get(key)
        if found is not None and found[0]() is weight:
            return found[1]
        shape = tuple(weight.shape)
        spare = self._spare.get(shape)
        packed = self._products.pack_weight(weight, spare.pop() if spare else None, num_threads)
        self._packed[key] = weakref.ref(weight, self._forgetting(key, shape)), packed
        return packed

    def _forgetting(self, key: int, shape: tuple[int, ...]) -> Callable[[weakref.ref[Tensor]], None]:
        """Return what to do when a weight is gone."""
        entries, spare = self._packed, self._spare

        def forget(gone: weakref.ref[Tensor]) -> None:
            if key in entries and entries[key][0] is gone:
                spare.setdefault(shape, []).append(entries.pop(key)[1])

        return forget


class CpuOps(Ops):
    """What fp32 on a CPU gains; other dtypes and odd shapes are computed as `Ops` does."""

    rows_of_mlp = MLP_ROWS

    def __init__(self, kernels: CpuKernels | None, products: PackedProducts | None) -> None:
        self._kernels = kernels
        self._ours = products if isinstance(products, CpuKernels) else None
        """Our products keep a row's bits whatever the number of rows, and add to what is there; a library's do not."""
        self._weights = None if products is None else PackedWeights(products)

    def prepare(self, linears: Iterable[Linear], kv_layers: Iterable[KVLayer], num_threads: int | None = None) -> None:
        """Pack weights that are new; those that an adapter leaves as they were stay packed."""
        if self._weights is not None:
            for layer in linears:
                if layer.weight.dtype == torch.float32:
                    self._weights.of(layer.weight, num_threads)
                for cut in layer.lora if self._multiplies_adapters(layer) else ():
                    self._weights.of(cut.a, num_threads)
                    self._weights.of(cut.b, num_threads)

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """Return x W^T + b, plus the adapters' parts."""
        if self._weights is None or x.dtype != torch.float32 or layer.weight.dtype != torch.float32:
            return super().linear(x, layer)
        return self._add_adapters(self._weights.multiply(x, layer.weight, layer.bias), x, layer)

    def _multiplies_adapters(self, layer: Linear) -> bool:
        """Return whether the products are ours, and take these adapters if there are any."""
        return self._ours is not None and all(cut.a.dtype == cut.b.dtype == torch.float32 for cut in layer.lora)

    def _add_adapters(self, y: Tensor, x: Tensor, layer: Linear) -> Tensor:
        ours, weights = self._ours, self._weights
        if ours is None or weights is None or x.dim() != 2 or not self._multiplies_adapters(layer):
            return super()._add_adapters(y, x, layer)
        for cut in layer.lora:
            down = weights.multiply(x, cut.a, None)
            ours.add_product(y[:, cut.start : cut.stop], down, weights.of(cut.b), cut.scaling)
        return y

    def embed(self, token_ids_T: Tensor, embedding_VE: Tensor, scale: float) -> Tensor:
        """Return scale * embeddings of tokens, [T, E]."""
        if self._kernels is None or not _exact(embedding_VE) or not embedding_VE.is_contiguous():
            return super().embed(token_ids_T, embedding_VE, scale)
        return self._kernels.embed(token_ids_T, embedding_VE, scale)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_last: bool = False
    ) -> Tensor:
        """Return the norm of the last dimension."""
        if self._kernels is None or not _exact(x, weight):
            return super().rms_norm(x, weight, eps, offset=offset, rounds_last=rounds_last)
        return self._kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, offset)[0].view(x.shape)

    def add_rms_norm(
        self, x: Projection, residual: Tensor, weight: Tensor, eps: float, *, offset: float, rounds_last: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of residual + x, and that sum."""
        y = completed(x, residual.shape[1])
        if self._kernels is None or not _exact(y, residual, weight):
            return super().add_rms_norm(y, residual, weight, eps, offset=offset, rounds_last=rounds_last)
        return self._kernels.rms_norm(y, weight, eps, offset, residual.contiguous())

    def silu_and_mul(self, gate_up: Projection) -> Tensor:
        """Return silu(first half) * second half."""
        return self._gated(gate_up, is_silu=True)

    def gelu_tanh_and_mul(self, gate_up: Projection) -> Tensor:
        """Return gelu(first half) * second half."""
        return self._gated(gate_up, is_silu=False)

    def _gated(self, gate_up: Projection, *, is_silu: bool) -> Tensor:
        if self._kernels is None or not isinstance(gate_up, Tensor) or not _exact(gate_up):
            return super().silu_and_mul(gate_up) if is_silu else super().gelu_tanh_and_mul(gate_up)
        return self._kernels.gated(gate_up, is_silu=is_silu)

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        k_cache_NBKD: Tensor,
        v_cache_NBKD: Tensor,
        inputs: ForwardInputs,
        heads: HeadSpec,
        adapters: TailAdapters | None = None,
    ) -> Tensor:
        """Norm and rotate heads, store keys and values; return queries [T, H, D]."""
        turn, norms = heads.rotation, None if q_norm is None or k_norm is None else (q_norm, k_norm)
        tensors = [q, k, v, k_cache_NBKD, v_cache_NBKD, *(norms or ()), *((turn.cos, turn.sin) if turn else ())]
        exact = _exact(*tensors) and (turn is None or turn.dtype == torch.float32)
        if self._kernels is None or adapters is not None or not exact or heads.head_dim > MAX_HEAD_DIM:
            return super().rope_and_store(q, k, v, q_norm, k_norm, k_cache_NBKD, v_cache_NBKD, inputs, heads, adapters)
        return self._kernels.rope_and_store(
            q,
            k,
            v,
            inputs.positions_T,
            inputs.slot_mapping_T,
            k_cache_NBKD,
            v_cache_NBKD,
            norms=None if norms is None else (*norms, heads.eps, heads.norm_offset),
            table=None if turn is None else (turn.cos, turn.sin),
        )

    def paged_attention(
        self, q_THD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKW: Tensor, inputs: ForwardInputs, spec: AttentionSpec
    ) -> Tensor:
        """Attend over blocks where they lie; what rows share, siblings or tokens of a chunk, is read once for several.

        Rows of padding, and decode rows of length 0, come back as zeros.
        """
        head_dim = q_THD.shape[-1]
        decode = inputs.decode_block_tables_RM, inputs.decode_lens_R
        fits = head_dim == v_cache_NBKW.shape[-1] <= MAX_HEAD_DIM and head_dim % VECTOR == 0
        fits = fits and all(row.dtype == torch.int64 and row.is_contiguous() for row in decode)
        if self._kernels is None or not fits or not _exact(q_THD, k_cache_NBKD, v_cache_NBKW):
            return super().paged_attention(q_THD, k_cache_NBKD, v_cache_NBKW, inputs, spec)
        out_THD = self._kernels.empty(*q_THD.shape)
        parts = [(0, *decode)] if inputs.num_decode else []
        for rows in inputs.prefills:
            lens_T = torch.arange(rows.start + 1, rows.start + rows.length + 1)
            parts.append((rows.row, rows.block_table_M.expand(rows.length, -1), lens_T))
        ends = [*(begin for begin, _, _ in parts[1:]), len(out_THD)]  # the last part has the padding with it
        for (begin, tables, lens), end in zip(parts, ends, strict=True):
            self._kernels.decode_attention(
                q_THD[begin:end],
                k_cache_NBKD,
                v_cache_NBKW,
                tables,
                lens,
                out_THD[begin:end],
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
            )
        return out_THD


class RowInvariantCpuOps(CpuOps, RowInvariantOps):
    """The same for `deterministic=True`: products in proven row counts.

    The C functions give a row the bits that it has alone, whatever stands beside it: rows that read tiles of keys
    together meet the tiles that each meets alone.
    """

    def __init__(self, kernels: CpuKernels | None, products: PackedProducts | None) -> None:
        CpuOps.__init__(self, kernels, products)
        RowInvariantOps.__init__(self, self._multiply)

    def prepare(self, linears: Iterable[Linear], kv_layers: Iterable[KVLayer], num_threads: int | None = None) -> None:
        """Pack weights that are new, and find the row counts in which their products agree."""
        layers = list(linears)
        CpuOps.prepare(self, layers, kv_layers, num_threads)
        RowInvariantOps.prepare(self, layers, kv_layers, num_threads)

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """Return x W^T + b and the adapters' parts: in proven row counts, if the number of rows counts at all."""
        if self._multiplies_adapters(layer):
            return CpuOps.linear(self, x, layer)
        return RowInvariantOps.linear(self, x, layer)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._weights is None or weight.dtype != torch.float32:
            return F.linear(x, weight, bias)
        return self._weights.multiply(x, weight, bias)


def _exact(*tensors: Tensor) -> bool:
    """Return whether all are fp32 and contiguous along the last dimension: what the C functions take."""
    return all(tensor.dtype == torch.float32 and tensor.stride(-1) == 1 for tensor in tensors)
