"""Counts what a run of the engine does, by hooks that any machine has: operators, products, memory, calls, bytes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rolloutd
from rolloutd import LLM, SamplingParams
from rolloutd.engine.sequence import Request
from rolloutd.outputs import FinishedCompletion
from rolloutd.runtime.cpu_calls import Product
from rolloutd.runtime.cpu_kernels import CpuKernels
from rolloutd.runtime.cpu_step import RecordedStep
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.serve import arrays
from rolloutd.serve.protocol import Completions, encode

PACKAGE = str(Path(rolloutd.__file__).parent)
PROMPTS = [[7 + 31 * i + j for j in range(72)] for i in range(4)]
SAMPLES, NEW_TOKENS = 4, 6
KERNELS = (
    *("embed", "decode_attention", "draw", "rms_norm", "gated", "rope_and_store", "product", "add_product"),
    "pack_weight",
)

aten = torch.ops.aten
PRODUCTS = {torch.ops.mkldnn._linear_pointwise, aten.mm, aten.addmm, aten.bmm, aten.linear}


class Operators(TorchDispatchMode):
    """Sees every operator of torch that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        counts, packet = self.counts, func.overloadpacket
        counts["operators"] += 1
        if packet in PRODUCTS:
            count_product(counts, args[1] if packet is aten.addmm else args[0], out)
        known = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in known:
                counts["allocations"] += 1
                counts["allocated_bytes"] += tensor.nbytes
        return out


def count_product(counts: Counter[str], x: Tensor, y: Tensor) -> None:
    """Count one matrix product x W^T = y."""
    rows, columns = x.shape[-2], y.shape[-1]
    counts["products"] += 1
    counts["product_rows"] += rows
    counts["product_flops"] += 2 * rows * columns * x.shape[-1]
    counts["product_bytes"] += 4 * (x.numel() + columns * x.shape[-1] + y.numel())


def _storage(tensor: Tensor) -> object:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


@contextmanager
def watched_kernels(counts: Counter[str]) -> Iterator[None]:
    """Count calls of our C functions, and the items that attention reads: fewer where siblings share a prefix."""
    originals = {name: getattr(CpuKernels, name) for name in KERNELS}
    run_step = RecordedStep.run

    def replay(self: RecordedStep, inputs: ForwardInputs) -> tuple[Tensor, ...]:
        result, num_rows = run_step(self, inputs), len(inputs.token_ids_T)
        counts["attention_items"] += self.num_items
        for call in self.calls:
            if call.kind is Product:
                x, y = (tensor[:num_rows] for name in "xy" if isinstance(tensor := call.values[name], Tensor))
                count_product(counts, x, y)
            else:
                counts["kernel_calls"] += 1
        return result

    def watch(name: str) -> Any:
        def call(self: CpuKernels, *args: Any, **kwargs: Any) -> Any:
            result = originals[name](self, *args, **kwargs)
            counts["weights_packed"] += name == "pack_weight"
            counts["attention_items"] += result if name == "decode_attention" else 0
            if name == "product":
                count_product(counts, args[0], result)
            elif name == "add_product":
                count_product(counts, args[1], args[0])
            else:
                counts["kernel_calls"] += 1
            return result

        return call

    for name in KERNELS:
        setattr(CpuKernels, name, watch(name))
    RecordedStep.run = replay  # type: ignore[method-assign]
    try:
        yield
    finally:
        RecordedStep.run = run_step  # type: ignore[method-assign]
        for name, function in originals.items():
            setattr(CpuKernels, name, function)


@contextmanager
def watched_calls(counts: Counter[str]) -> Iterator[None]:
    """Count calls of the package's own functions."""

    def see(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code  # comprehensions are calls in some versions of Python, and their names begin with "<"
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            counts["host_calls"] += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(before)


def wire_bytes(finished: list[FinishedCompletion], prompts: dict[str, list[int]]) -> int:
    """Return the bytes of the one message that carries these completions."""
    items, frames = arrays.join_finished([arrays.pack_finished(done, prompts[done.request_id]) for done in finished])
    return sum(len(part) for part in encode(Completions(items=items), frames))


def measure(folder: Path) -> dict[str, int]:
    """Return what a small GRPO batch costs: as a whole, in its prefilling step, and in one step that decodes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # attention is cut into items by it
    try:
        return _measure(folder)
    finally:
        torch.set_num_threads(threads)


def _measure(folder: Path) -> dict[str, int]:
    prompts = {f"r{i}": ids for i, ids in enumerate(PROMPTS)}
    params = SamplingParams(n=SAMPLES, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(str(folder), max_model_len=128, kv_cache_bytes=1 << 20) as llm:
        engine = llm.engine
        for name, ids in prompts.items():
            engine.add_request(Request(name, tuple(ids), params))
        prefill, decode = Operators(), Operators()
        with prefill, watched_kernels(prefill.counts):
            finished = engine.step()
        finished += engine.step()
        calls: Counter[str] = Counter()
        with watched_calls(calls):
            finished += engine.step()
        with decode, watched_kernels(decode.counts):
            finished += engine.step()
        while engine.has_unfinished():
            finished += engine.step()
        stats = engine.stats()
    whole = {
        "prompt_tokens_computed": stats.prefill_tokens,
        "decode_tokens_computed": stats.decode_tokens,
        "steps": stats.num_steps,
        "block_copies": stats.block_copies,
        "peak_blocks": stats.peak_blocks_used,
        "wire_bytes": wire_bytes(finished, prompts),
        "decode_host_calls": calls["host_calls"],
    }
    parts = {"prefill": prefill.counts, "decode": decode.counts}
    names = (
        *("operators", "products", "product_rows", "product_flops", "product_bytes", "weights_packed"),
        *("allocations", "allocated_bytes", "kernel_calls", "attention_items"),
    )
    return whole | {f"{part}_{name}": counts[name] for part, counts in parts.items() for name in names}
