"""The C of a CPU step as Python functions; None where it cannot be compiled, and the log says why."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rolloutd.kernels.compiled import compiled

from .cpu_calls import KINDS, Arguments, Attention, Call, Embedding, Gated, Norm, Product, Rope, StepInputs, Value
from .memory import in_large_pages

FOLDER = Path(__file__).parent
_HEADERS = ("cpu_vectors.h", "cpu_calls.h")
_CODE = ("cpu_attention.c", "cpu_kernels.c", "cpu_products.c", "cpu_step.c")
SOURCES = tuple(FOLDER / name for name in (*_HEADERS, *_CODE))
MAX_HEAD_DIM = 256
VECTOR = 16
"""Floats of the widest vector: head dimensions are multiples, of narrower ones too."""
MAX_VOCAB = 1 << 20

_i64, _ptr, _int = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int


class Recorder(Protocol):
    """Takes calls in place of their being run."""

    def add(self, kind: type[Arguments], values: dict[str, Value]) -> None:
        """Take a call; its tensors are not to be read or written now."""
        ...

    def empty(self, *shape: int) -> Tensor:
        """Return what the calls write to and read from; its memory is not the step's."""
        ...


class _OfThread(threading.local):
    recorder: Recorder | None = None


class CpuKernels:
    """The library's functions. Tensors are fp32 on the CPU, indices int64, rows contiguous along the last dimension."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._of_thread = _OfThread()
        self._draw = library.draw
        self._draw.argtypes = [_ptr, _i64, _i64, _i64, *[_ptr] * 7, _int]
        self.has_threads = bool(library.has_threads())
        """Compiled with OpenMP."""
        self._packed_size = library.packed_size
        self._packed_size.argtypes = [_i64, _i64]
        self._packed_size.restype = _i64
        self._pack_weight = library.pack_weight
        self._pack_weight.argtypes = [_ptr, _i64, _i64, _i64, _ptr, _int]
        self._run_calls = library.run_calls
        self._run_calls.argtypes = [_ptr, _i64, _ptr, _ptr, _int]
        self._run_calls.restype = _i64
        self._draw.restype = self._pack_weight.restype = None

    @contextmanager
    def recorded_by(self, recorder: Recorder) -> Iterator[None]:
        """Hand this thread's calls to a recorder, in place of running them."""
        self._of_thread.recorder = recorder
        try:
            yield
        finally:
            self._of_thread.recorder = None

    def run_step(self, calls: ctypes.Array[Call], inputs: StepInputs, seconds: ctypes.Array[ctypes.c_double]) -> int:
        """Run all calls, with these inputs, and add the seconds of each kind; return the items that attention read."""
        return self._run(calls, ctypes.byref(inputs), seconds, torch.get_num_threads())

    def _call(self, kind: type[Arguments], values: dict[str, Value], num_threads: int) -> int:
        recorder = self._of_thread.recorder
        if recorder is not None:
            recorder.add(kind, values)
            return 0
        arguments = kind.of(values)
        call = (Call * 1)(Call(KINDS.index(kind), ctypes.addressof(arguments)))
        return self._run(call, None, None, num_threads)

    def _run(self, calls: ctypes.Array[Call], inputs: Any, seconds: Any, num_threads: int) -> int:
        num_items = int(self._run_calls(calls, len(calls), inputs, seconds, num_threads))
        if num_items < 0:
            raise MemoryError("no memory to plan attention on a CPU")
        return num_items

    def empty(self, *shape: int) -> Tensor:
        """Return memory for what a call writes."""
        recorder = self._of_thread.recorder
        return torch.empty(*shape) if recorder is None else recorder.empty(*shape)

    def pack_weight(self, weight_NK: Tensor, spare: Tensor | None = None, num_threads: int | None = None) -> Tensor:
        """Return a weight in the layout that `product` reads; in `spare` if that is of its size."""
        (num_outputs, num_inputs), threads = weight_NK.shape, num_threads or torch.get_num_threads()
        size = self._packed_size(num_outputs, num_inputs)
        packed = spare if spare is not None and spare.numel() == size else in_large_pages(torch.empty(size))
        weight = weight_NK if weight_NK.stride(1) == 1 else weight_NK.contiguous()
        self._pack_weight(weight.data_ptr(), weight.stride(0), num_outputs, num_inputs, packed.data_ptr(), threads)
        return packed

    def embed(self, ids_T: Tensor, table_VE: Tensor, scale: float) -> Tensor:
        """Return scale * rows of a table, [T, E]; what the table does not have is NaN."""
        (num_rows,), (vocab_size, size) = ids_T.shape, table_VE.shape
        out_TE = self.empty(num_rows, size)
        given: dict[str, Value] = {"ids": ids_T, "table": table_VE, "out": out_TE}
        given |= {"T": num_rows, "V": vocab_size, "E": size, "scale": scale}
        self._call(Embedding, given, _threads(out_TE.numel()))
        return out_TE

    def product(self, x_MK: Tensor, packed: Tensor, bias_N: Tensor | None, num_outputs: int) -> Tensor:
        """Return x W^T + b. A row's sums are added up in the order of the inputs, whatever other rows there are."""
        y_MN = self.empty(x_MK.shape[0], num_outputs)
        self.product_into(y_MN, x_MK, packed, bias_N)
        return y_MN

    def product_into(self, y_MN: Tensor, x_MK: Tensor, packed: Tensor, bias_N: Tensor | None) -> None:
        """Write x W^T + b to y."""
        self._multiply(x_MK, packed, bias_N, y_MN, adds=False, scale=1.0)

    def add_product(self, y_MN: Tensor, x_MK: Tensor, packed: Tensor, scale: float) -> None:
        """Add scale * x W^T to y, where it lies."""
        self._multiply(x_MK, packed, None, y_MN, adds=True, scale=scale)

    def _multiply(
        self, x_MK: Tensor, packed: Tensor, bias_N: Tensor | None, y_MN: Tensor, *, adds: bool, scale: float
    ) -> None:
        (num_rows, num_inputs), num_outputs = x_MK.shape, y_MN.shape[1]
        threads = _threads(num_rows * num_outputs * num_inputs >> 5)
        given: dict[str, Value] = {"x": x_MK, "packed": packed, "bias": bias_N, "y": y_MN}
        given |= {"x_row": x_MK.stride(0), "y_row": y_MN.stride(0), "M": num_rows, "N": num_outputs, "K": num_inputs}
        self._call(Product, given | {"adds": int(adds), "scale": scale}, threads)

    def decode_attention(
        self,
        q_RHD: Tensor,
        k_cache_NBKD: Tensor,
        v_cache_NBKD: Tensor,
        tables_RM: Tensor,
        lens_R: Tensor,
        out_THD: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        item_rows: int | None = None,
    ) -> int:
        """Write to `out` what `decode_attention_reference` returns, zeros behind it; return the number of items read.

        Rows that follow each other and begin with the same blocks are one item, which reads these once; at most
        `item_rows` of them, by default as many as leave each thread four items.
        """
        (_, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q_RHD.shape, k_cache_NBKD.shape
        num_rows = lens_R.shape[0]
        given: dict[str, Value] = {"q": q_RHD, "k": k_cache_NBKD, "v": v_cache_NBKD, "out": out_THD}
        given |= {"tables": tables_RM, "lens": lens_R, "M": tables_RM.stride(0)}
        given |= {"q_row": q_RHD.stride(0), "q_head": q_RHD.stride(1)}
        given |= {"out_row": out_THD.stride(0), "out_head": out_THD.stride(1), **_places(k_cache_NBKD, v_cache_NBKD)}
        given |= {"T": out_THD.shape[0], "R": num_rows, "H": num_heads, "K": num_kv_heads, "D": head_dim}
        given |= {"B": block_size, "scale": scale, "window": window or 0, "softcap": softcap or 0.0}
        given["item_rows"] = item_rows or 0
        return self._call(Attention, given, torch.get_num_threads())

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
        out_TE = self.empty(num_rows, size)
        sum_TE = x_TE if residual_TE is None else self.empty(num_rows, size)
        given: dict[str, Value] = {"x": x_TE, "residual": residual_TE, "weight": weight_E, "out": out_TE, "sum": sum_TE}
        given |= {"x_row": x_TE.stride(0), "T": num_rows, "E": size, "eps": eps, "offset": offset}
        self._call(Norm, given, _threads(x_TE.numel()))
        return out_TE, sum_TE

    def gated(self, gate_up_TF: Tensor, *, is_silu: bool) -> Tensor:
        """Return activation(first half) * second half."""
        num_rows, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
        out_TF = self.empty(num_rows, size)
        given: dict[str, Value] = {"gate_up": gate_up_TF, "out": out_TF, "row": gate_up_TF.stride(0)}
        given |= {"T": num_rows, "F": size, "is_silu": int(is_silu)}
        self._call(Gated, given, _threads(4 * out_TF.numel()))
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
        out_THD = self.empty(num_rows, q.shape[1] // head_dim, head_dim)
        cos, sin = table if table is not None else (None, None)
        q_norm, k_norm, eps, offset = norms if norms is not None else (None, None, 0.0, 0.0)
        given: dict[str, Value] = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "cos": cos, "sin": sin}
        given |= {"positions": positions_T, "slots": slots, "out": out_THD}
        given |= {"k_cache": k_cache_NBKD, "v_cache": v_cache_NBKD, **_places(k_cache_NBKD, v_cache_NBKD)}
        given |= {"q_row": q.stride(0), "k_row": k.stride(0), "v_row": v.stride(0)}
        given |= {"T": num_rows, "num_stored": slots.shape[0], "H": out_THD.shape[1], "K": num_kv_heads, "D": head_dim}
        given |= {"table_row": 0, "turned": 0} if cos is None else {"table_row": cos.stride(0), "turned": cos.shape[-1]}
        given |= {"B": block_size, "eps": eps, "offset": offset}
        self._call(Rope, given, _threads(2 * q.numel()))
        return out_THD


def _places(k_cache_NBKD: Tensor, v_cache_NBKD: Tensor) -> dict[str, int]:
    """Return how far blocks, places in them and heads are apart."""
    k_block, k_place, k_head, _ = k_cache_NBKD.stride()
    v_block, v_place, v_head, _ = v_cache_NBKD.stride()
    keys = {"k_block": k_block, "k_place": k_place, "k_head": k_head}
    return keys | {"v_block": v_block, "v_place": v_place, "v_head": v_head}


def _threads(num_elements: int) -> int:
    """Return how many threads share pointwise work: to start them costs some 5 us, as much as 16,000 elements do."""
    return max(1, min(torch.get_num_threads(), num_elements >> 14))


@lru_cache(maxsize=1)
def cpu_kernels() -> CpuKernels | None:
    """Return the kernels, compiled if need be; None, with the reason in the log, where they cannot be had."""
    library = compiled("cpu_kernels", SOURCES, without="products, attention and sampling are slower")
    return None if library is None else CpuKernels(library)
