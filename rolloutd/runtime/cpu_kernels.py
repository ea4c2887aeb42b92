"""The C of a CPU step as Python functions; None where it cannot be compiled, and the log says why."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rolloutd.kernels.compiled import compiled

from .memory import in_large_pages

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("cpu_vectors.h", "cpu_attention.c", "cpu_kernels.c", "cpu_products.c"))
MAX_HEAD_DIM = 256
VECTOR = 16
"""Floats of the widest vector: head dimensions are multiples, of narrower ones too."""
MAX_VOCAB = 1 << 20

_i64, _f32, _ptr, _int = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int


class _Attention(ctypes.Structure):
    _fields_ = (
        [(name, _ptr) for name in ("q", "k", "v", "out", "tables", "lens")]
        + [(name, _i64) for name in ("q_row", "q_head", "k_block", "k_place", "k_head")]
        + [(name, _i64) for name in ("v_block", "v_place", "v_head", "out_row", "out_head")]
        + [(name, _i64) for name in ("R", "H", "K", "D", "B", "M", "window")]
        + [("scale", _f32), ("softcap", _f32)]
    )


class _Rope(ctypes.Structure):
    _fields_ = (
        [(name, _ptr) for name in ("q", "k", "v", "q_norm", "k_norm", "cos", "sin", "positions", "slots")]
        + [(name, _ptr) for name in ("out", "k_cache", "v_cache")]
        + [(name, _i64) for name in ("q_row", "k_row", "v_row", "table_row", "k_block", "k_place", "k_head")]
        + [(name, _i64) for name in ("v_block", "v_place", "v_head", "T", "num_stored", "H", "K", "D", "B", "turned")]
        + [("eps", _f32), ("offset", _f32)]
    )


class _Product(ctypes.Structure):
    _fields_ = [(name, _ptr) for name in ("x", "packed", "bias", "y")] + [
        (name, _i64) for name in ("x_stride", "y_stride", "M", "N", "K")
    ]


class CpuKernels:
    """The library's functions. Tensors are fp32 on the CPU, indices int64, rows contiguous along the last dimension."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._decode_attention = library.decode_attention
        self._decode_attention.argtypes = [_ptr, _i64, _int]
        self._decode_attention.restype = _i64
        self._draw = library.draw
        self._draw.argtypes = [_ptr, _i64, _i64, _i64, *[_ptr] * 7, _int]
        self._rms_norm = library.rms_norm
        self._rms_norm.argtypes = [_ptr, _i64, *[_ptr] * 4, _i64, _i64, _f32, _f32, _int]
        self._gated = library.gated
        self._gated.argtypes = [_ptr, _i64, _ptr, _i64, _i64, _int, _int]
        self._rope_and_store = library.rope_and_store
        self._rope_and_store.argtypes = [_ptr, _int]
        self.has_threads = bool(library.has_threads())
        """Compiled with OpenMP."""
        self._packed_size = library.packed_size
        self._packed_size.argtypes = [_i64, _i64]
        self._packed_size.restype = _i64
        self._pack_weight = library.pack_weight
        self._pack_weight.argtypes = [_ptr, _i64, _i64, _i64, _ptr, _int]
        self._product = library.product
        self._product.argtypes = [_ptr, _int]
        for name in ("draw", "rms_norm", "gated", "rope_and_store", "pack_weight", "product"):
            getattr(library, name).restype = None

    def pack_weight(self, weight_NK: Tensor, spare: Tensor | None = None, num_threads: int | None = None) -> Tensor:
        """Return a weight in the layout that `product` reads; in `spare` if that is of its size."""
        (num_outputs, num_inputs), threads = weight_NK.shape, num_threads or torch.get_num_threads()
        size = self._packed_size(num_outputs, num_inputs)
        packed = spare if spare is not None and spare.numel() == size else in_large_pages(torch.empty(size))
        weight = weight_NK if weight_NK.stride(1) == 1 else weight_NK.contiguous()
        self._pack_weight(weight.data_ptr(), weight.stride(0), num_outputs, num_inputs, packed.data_ptr(), threads)
        return packed

    def product(self, x_MK: Tensor, packed: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
        """Return x W^T + b. A row's sums are added up in the order of the inputs, whatever other rows there are."""
        num_rows, num_inputs = x_MK.shape
        y_MN = torch.empty(num_rows, num_outputs)
        bias = None if bias_N is None else bias_N.data_ptr()
        pointers = x_MK.data_ptr(), packed.data_ptr(), bias, y_MN.data_ptr()
        call = _Product(*pointers, x_MK.stride(0), num_outputs, num_rows, num_outputs, num_inputs)
        self._product(ctypes.byref(call), _threads(num_rows * num_outputs * num_inputs >> 5))
        return y_MN

    def decode_attention(
        self,
        q_RHD: Tensor,
        k_cache_NBKD: Tensor,
        v_cache_NBKD: Tensor,
        tables_RM: Tensor,
        lens_R: Tensor,
        out_RHD: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        item_rows: int | None = None,
    ) -> int:
        """Write to `out` what `decode_attention_reference` returns; return the number of items read.

        Rows that follow each other and begin with the same blocks are one item, which reads these once; at most
        `item_rows` of them, by default as many as leave each thread four items.
        """
        (num_rows, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q_RHD.shape, k_cache_NBKD.shape
        threads = torch.get_num_threads()
        if item_rows is None:
            item_rows = max(1, num_rows * num_kv_heads // (4 * threads))
        call = _Attention(
            q_RHD.data_ptr(),
            k_cache_NBKD.data_ptr(),
            v_cache_NBKD.data_ptr(),
            out_RHD.data_ptr(),
            tables_RM.data_ptr(),
            lens_R.data_ptr(),
            *q_RHD.stride()[:2],
            *k_cache_NBKD.stride()[:3],
            *v_cache_NBKD.stride()[:3],
            *out_RHD.stride()[:2],
            num_rows,
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            tables_RM.stride(0),
            window or 0,
            scale,
            softcap or 0.0,
        )
        num_items = int(self._decode_attention(ctypes.byref(call), item_rows, threads))
        if num_items < 0:
            raise MemoryError("no memory for the scratch of decode_attention")
        return num_items

    def draw(
        self, logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, index_R: Tensor, position_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `draw_tokens` of kernels/draw.py does without cuts; its sums are fp32 by spans of 1,024 ids."""
        num_rows, vocab_size = logits_RV.shape
        token_R = torch.empty(num_rows, dtype=torch.int64)
        logprob_R, sampling_R = torch.empty(num_rows), torch.empty(num_rows)
        keys = (temperature_R, seed_R, index_R, position_R, token_R, logprob_R, sampling_R)
        pointers = [tensor.data_ptr() for tensor in keys]
        threads = torch.get_num_threads()
        self._draw(logits_RV.data_ptr(), logits_RV.stride(0), num_rows, vocab_size, *pointers, threads)
        return token_R, logprob_R, sampling_R

    def rms_norm(
        self, x_TE: Tensor, weight_E: Tensor, eps: float, offset: float, residual_TE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (norm(s) * (offset + weight), s) with s = x + residual, or s = x where there is none."""
        num_rows, size = x_TE.shape
        out_TE = torch.empty(num_rows, size)
        sum_TE = x_TE if residual_TE is None else torch.empty(num_rows, size)
        residual = None if residual_TE is None else residual_TE.data_ptr()
        pointers = (residual, weight_E.data_ptr(), out_TE.data_ptr(), sum_TE.data_ptr())
        threads = _threads(x_TE.numel())
        self._rms_norm(x_TE.data_ptr(), x_TE.stride(0), *pointers, num_rows, size, eps, offset, threads)
        return out_TE, sum_TE

    def gated(self, gate_up_TF: Tensor, *, is_silu: bool) -> Tensor:
        """Return activation(first half) * second half."""
        num_rows, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
        out_TF = torch.empty(num_rows, size)
        pointers = gate_up_TF.data_ptr(), gate_up_TF.stride(0), out_TF.data_ptr()
        self._gated(*pointers, num_rows, size, is_silu, _threads(4 * out_TF.numel()))
        return out_TF

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions_T: Tensor,
        slots: Tensor,
        k_cache_NBKD: Tensor,
        v_cache_NBKD: Tensor,
        *,
        norms: tuple[Tensor, Tensor, float, float] | None,
        table: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return queries [T, H, D]; `norms` are weights of queries and keys, eps and offset, `table` cos and sin."""
        num_rows, (_, block_size, num_kv_heads, head_dim) = q.shape[0], k_cache_NBKD.shape
        out_THD = torch.empty(num_rows, q.shape[1] // head_dim, head_dim)
        cos, sin = table if table is not None else (None, None)
        call = _Rope(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            None if norms is None else norms[0].data_ptr(),
            None if norms is None else norms[1].data_ptr(),
            None if cos is None else cos.data_ptr(),
            None if sin is None else sin.data_ptr(),
            positions_T.data_ptr(),
            slots.data_ptr(),
            out_THD.data_ptr(),
            k_cache_NBKD.data_ptr(),
            v_cache_NBKD.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            0 if cos is None else cos.stride(0),
            *k_cache_NBKD.stride()[:3],
            *v_cache_NBKD.stride()[:3],
            num_rows,
            slots.shape[0],
            out_THD.shape[1],
            num_kv_heads,
            head_dim,
            block_size,
            0 if cos is None else cos.shape[-1],
            0.0 if norms is None else norms[2],
            0.0 if norms is None else norms[3],
        )
        self._rope_and_store(ctypes.byref(call), _threads(2 * q.numel()))
        return out_THD


def _threads(num_elements: int) -> int:
    """Return how many threads share pointwise work: to start them costs some 5 us, as much as 16,000 elements do."""
    return max(1, min(torch.get_num_threads(), num_elements >> 14))


@lru_cache(maxsize=1)
def cpu_kernels() -> CpuKernels | None:
    """Return the kernels, compiled if need be; None, with the reason in the log, where they cannot be had."""
    library = compiled("cpu_kernels", SOURCES, without="products, attention and sampling are slower")
    return None if library is None else CpuKernels(library)
