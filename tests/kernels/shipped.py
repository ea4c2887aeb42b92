"""Every launch that the kernels' host functions make for the models that are shipped for, recorded and not listed.

The host functions run on meta tensors, and what would be launched is noted with its arguments as Triton specialises
them. So the table cannot say anything that is not launched. Import it in a process of its own: it replaces launches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton  # before the kernels, which else do without it on a CPU
from torch import Tensor
from triton.runtime.jit import JITFunction

from rolloutd.kernels.adapters import TailAdapters

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
MODULES = {
    path.stem: importlib.import_module(f"rolloutd.kernels.{path.stem}")
    for path in sorted(KERNELS.glob("*.py"))
    if path.stem not in ("adapters", "launch", "row_state")
}
PIECE = 1 << 15

BF16, FP16, FP32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
TYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", I32: "i32", I64: "i64"}
ROWS, BLOCK_SIZE, NUM_BLOCKS, TABLE_WIDTH = 256, 16, 20_000, 128


@dataclass(frozen=True)
class Shape:
    """What of a model decides how its kernels are compiled."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    qk_norm: bool = False
    softcap: float | None = None
    window: int | None = None


SHAPES = [
    Shape("qwen2.5-0.5b", 14, 2, 64, 896, 4864, 151_936),
    Shape("qwen2.5-1.5b", 12, 2, 128, 1536, 8960, 151_936),
    Shape("qwen2.5-7b", 28, 4, 128, 3584, 18_944, 152_064),
    Shape("qwen3-0.6b", 16, 8, 128, 1024, 3072, 151_936, qk_norm=True),
    Shape("gemma2-2b", 8, 4, 256, 2304, 9216, 256_000, softcap=50.0, window=4096),
    Shape("phi3-mini", 32, 32, 96, 3072, 8192, 32_064),
    Shape("head-dim-80", 32, 32, 80, 2560, 6912, 50_304),
]


@dataclass(frozen=True)
class Launch:
    """One configuration of one kernel."""

    kernel: Any
    case: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16: all pointers, and the integers that happen to be."""
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """What the table calls it: kernel and first case, which is unique."""
        return f"{self.kernel.__name__} {self.case}"


class Recorder:
    """Stands where a launch is; two that compile alike are one."""

    def __init__(self) -> None:
        self.launches: dict[tuple[Any, ...], Launch] = {}
        self.case = ""
        self._count: dict[tuple[str, str], int] = {}

    def record(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(kernel.arg_names)
        values = dict(zip(names, args, strict=False))
        values |= {name: value for name, value in kwargs.items() if name in names}
        options = {name: value for name, value in kwargs.items() if name not in names}
        fixed = {param.name for param in kernel.params if param.is_constexpr}
        signature, constants, aligned = [], {}, []
        for name in names:
            value = values[name]
            if name in fixed or (isinstance(value, int) and value == 1):
                constants[name] = value
                kind = "constexpr"
            elif isinstance(value, Tensor):
                kind = "*" + TYPES[value.dtype]
                aligned.append(name)
            elif isinstance(value, float):
                kind = "fp32"
            else:
                kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
            signature.append((name, kind))
        what = (tuple(signature), tuple(sorted(constants.items())), tuple(aligned), tuple(sorted(options.items())))
        identity = (kernel.__name__, *what)
        if identity not in self.launches:
            number = self._count[kernel.__name__, self.case] = self._count.get((kernel.__name__, self.case), 0) + 1
            case = self.case if number == 1 else f"{self.case} #{number}"
            self.launches[identity] = Launch(kernel, case, *what)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(shape: Shape, dtype: torch.dtype, width: int = TABLE_WIDTH) -> None:
    """Decoding flat and in groups, and prefill."""
    q = meta(ROWS, shape.heads, shape.head_dim, dtype=dtype)
    cache = meta(NUM_BLOCKS, BLOCK_SIZE, shape.kv_heads, shape.head_dim, dtype=dtype)
    tables, lens = meta(ROWS, width, dtype=I32), meta(ROWS, dtype=I32)
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "softcap": shape.softcap}
    decode = MODULES["decode_attention"].decode_attention
    prefill = MODULES["prefill_attention"].prefill_attention
    for window in {None, shape.window}:
        decode(q, cache, cache, tables, lens, window=window, **options)
        starts, ends = meta(5, dtype=I64), meta(4, dtype=I64)
        prefill(q, cache, cache, meta(4, width, dtype=I64), starts, ends, max_query_len=512, window=window, **options)
    items = MODULES["prefix_attention"].ITEM_ROWS
    lists = meta(ROWS, dtype=I32), meta(ROWS // 2, items, dtype=I32)
    MODULES["prefix_attention"].prefix_attention(q, cache, cache, tables, lens, *lists, **options)


def pointwise(shape: Shape, residual: torch.dtype) -> None:
    """What stands between products: norms, rotation and store, activation; bf16 products, a residual of either kind."""
    x, weight = meta(ROWS, shape.hidden), meta(shape.hidden, dtype=residual)
    stream = meta(ROWS, shape.hidden, dtype=residual)
    offset = {"offset": 1.0, "rounds_last": True} if "gemma" in shape.name else {"offset": 0.0, "rounds_last": False}
    MODULES["add_rms_norm"].add_rms_norm(x, stream, weight, 1e-6, **offset)
    MODULES["rms_norm"].rms_norm(stream, weight, 1e-6, **offset)
    kind = "gelu_tanh" if "gemma" in shape.name else "silu"
    MODULES["gated_activation"].gated_activation(meta(ROWS, 2 * shape.ffn), kind)
    rope = MODULES["rope_and_store"]
    sizes = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
    q, k, v = torch.split(meta(ROWS, sum(sizes)), sizes, dim=1)
    cache = meta(NUM_BLOCKS, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    norm = meta(shape.head_dim, dtype=residual)
    norms = rope.HeadNorms(norm, norm, 1e-6) if shape.qk_norm else None
    table = meta(4096, 1, shape.head_dim, dtype=FP32)
    turn = rope.Rope(table, table, residual)
    positions = meta(ROWS, dtype=I64)
    rope.rope_and_store(q, k, v, positions, positions, cache, cache, norms=norms, rope=turn)
    MODULES["store_kv"].store_kv(
        *(part.view(ROWS, shape.kv_heads, shape.head_dim) for part in (k, v)), cache, cache, positions
    )


def adapted(shape: Shape, rank: int) -> None:
    """What adds adapters: bf16 products, an fp32 residual."""
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def adapters(width: int, parts: int) -> TailAdapters:
        columns, scalings = tuple(rank * i for i in range(parts)), (0.5,) * parts
        tail = meta(ROWS, width + rank * parts)[:, width:]
        return TailAdapters(tail, meta(rank, width), columns, scalings)

    weight, stream = meta(shape.hidden, dtype=FP32), meta(ROWS, shape.hidden, dtype=FP32)
    wide = meta(ROWS, shape.hidden + rank)[:, : shape.hidden]
    MODULES["add_rms_norm"].add_rms_norm(wide, stream, weight, 1e-6, adapters=adapters(shape.hidden, 1))
    gate_up = meta(ROWS, 2 * shape.ffn + 2 * rank)[:, : 2 * shape.ffn]
    MODULES["gated_activation"].gated_activation(gate_up, "silu", adapters(2 * shape.ffn, 2))
    sizes = [q_size, kv_size, kv_size, 3 * rank]
    q, k, v, _ = torch.split(meta(ROWS, sum(sizes)), sizes, dim=1)
    cache = meta(NUM_BLOCKS, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    rope, table = MODULES["rope_and_store"], meta(4096, 1, shape.head_dim, dtype=FP32)
    positions, turn = meta(ROWS, dtype=I64), rope.Rope(table, table, FP32)
    three = adapters(q_size + 2 * kv_size, 3)
    rope.rope_and_store(q, k, v, positions, positions, cache, cache, rope=turn, adapters=three)


def copies() -> None:
    """New weights to where the old ones lie. Meta tensors have no address; the kernel has the same arguments."""
    module = MODULES["copy_weights"]
    for target, source in ((BF16, BF16), (FP32, FP32), (BF16, FP32)):
        module.copy_weights([(meta(PIECE, dtype=target), meta(PIECE, dtype=source))])


def draws(shape: Shape, dtype: torch.dtype) -> None:
    """Plain and truncated draws from logits, and head and draw at once."""
    logits = meta(ROWS, shape.vocab, dtype=dtype)
    keys = (meta(ROWS, dtype=FP32), *(meta(ROWS, dtype=I64) for _ in range(3)))
    cuts = {"top_k_R": meta(ROWS, dtype=I64), "top_p_R": meta(ROWS, dtype=FP32), "min_p_R": meta(ROWS, dtype=FP32)}
    draw = MODULES["draw"].draw_tokens
    draw(logits, *keys)
    draw(logits, *keys, **cuts)
    if dtype == FP32:  # an fp32 head is multiplied by cuBLAS
        return
    few = tuple(key[:64] for key in keys)
    hidden, head = meta(64, shape.hidden, dtype=dtype), meta(shape.vocab, shape.hidden, dtype=dtype)
    MODULES["head_and_draw"].head_and_draw(hidden, head, *few, logits_softcap=shape.softcap)


def ends_of_a_step() -> None:
    """What a step of the loop begins and ends with."""
    from rolloutd.kernels.begin_step import StepRows
    from rolloutd.kernels.row_state import RowState

    device = torch.device("meta")
    state, rows = RowState.allocate(ROWS + 1, 8, device), StepRows.allocate(ROWS, device)
    active, tables = meta(ROWS, dtype=I64), meta(ROWS, TABLE_WIDTH, dtype=I32)
    MODULES["begin_step"].begin_step(active, state, tables, rows, block_size=BLOCK_SIZE, scratch_slot=320_000)
    drawn = meta(ROWS, dtype=I64), meta(ROWS, dtype=FP32), meta(ROWS, dtype=FP32)
    cursor, record = meta(ROWS, dtype=I32), meta(50, ROWS, dtype=I32)
    MODULES["end_step"].end_step(*drawn, active, state, cursor, record, cells_apart=8)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield a name and calls of host functions."""
    for shape in SHAPES:
        yield f"{shape.name} bf16", lambda shape=shape: attention(shape, BF16)
        yield f"{shape.name} bf16", lambda shape=shape: pointwise(shape, BF16)
    for shape in SHAPES[:3]:
        yield f"{shape.name} autocast", lambda shape=shape: pointwise(shape, FP32)
    for dtype in (FP32, FP16):
        yield f"{SHAPES[0].name} {TYPES[dtype]}", lambda dtype=dtype: attention(SHAPES[0], dtype)
    for shape in (SHAPES[0], SHAPES[1], SHAPES[4]):
        yield f"{shape.name} bf16", lambda shape=shape: draws(shape, BF16)
    yield f"{SHAPES[0].name} fp32", lambda: draws(SHAPES[0], FP32)
    for shape in SHAPES[:2]:
        yield f"{shape.name} adapters", lambda shape=shape: adapted(shape, 16)
    yield "weights", copies
    yield "loop", ends_of_a_step


def shipped() -> list[Launch]:
    """Return every configuration, each once, in the order of `cases`."""
    recorder = Recorder()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorder.record(self, args, kwargs)

    launch = JITFunction.run
    JITFunction.run = run  # type: ignore[method-assign]
    for module in MODULES.values():
        module.check_launchable = lambda *args: None  # type: ignore[attr-defined]
    try:
        for name, call in cases():
            recorder.case = name
            call()
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]
    return list(recorder.launches.values())


def kernel_names() -> set[str]:
    """Return the names of all functions of kernels/ that are launched."""
    return {
        name
        for module in MODULES.values()
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.jit.JITFunction) and name.endswith("_kernel")
    }
