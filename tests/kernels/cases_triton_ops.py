"""Whole models with our kernels under them, beside the same models with PyTorch's operators."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from rolloutd import LLM, RequestOutput, SamplingParams
from rolloutd.runtime.triton_ops import TritonOps

PROMPTS = [[5, 6, 7], list(range(8, 29))]
KINDS = ["qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3", "granite"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Counts launches by kernel."""
    launched: collections.Counter[str] = collections.Counter()
    call = GridExecutor.__call__

    def counted(self: GridExecutor, *args: Any, **options: Any) -> None:
        launched[self.fn.__name__] += 1
        call(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return launched


def generate(folder: Path, *, kernels: bool, **options: Any) -> list[RequestOutput]:
    """Return greedy completions; chunks of 16 tokens, so that prefill and decoding share steps."""
    with LLM(str(folder), device="cpu", max_model_len=64, max_num_batched_tokens=16, **options) as llm:
        if kernels:
            model: Any = llm.engine._runner._model
            model._ops = TritonOps()
        return llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))


@pytest.mark.parametrize(
    ("kind", "numerics"), [*((kind, "fp32") for kind in KINDS), ("qwen3", "autocast"), ("gemma2", "autocast")]
)
def test_kernels_give_what_operators_give(
    device: torch.device, tiny_model: Callable[..., Path], kind: str, numerics: str
) -> None:
    folder = tiny_model(kind, hidden=32, head_dim=8, max_len=64)
    with_kernels = generate(folder, kernels=True, numerics=numerics)
    without = generate(folder, kernels=False, numerics=numerics)
    for ours, theirs in zip(with_kernels, without, strict=True):
        a, b = ours.outputs[0], theirs.outputs[0]
        if numerics == "fp32":
            assert a.token_ids == b.token_ids
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-5)
        else:  # weights of attention are rounded after another sum: the first token's gap is a rounding's
            assert abs(a.logprobs[0] - b.logprobs[0]) < 0.05 or a.token_ids[0] != b.token_ids[0]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)
        return func(*args, **(kwargs or {}))


def test_a_decoding_step_launches_ten_kernels_a_layer(
    device: torch.device, tiny_model: Callable[..., Path], launched: collections.Counter[str]
) -> None:
    counts = []
    for layers in (1, 3):
        folder = tiny_model("qwen2", hidden=32, head_dim=8, max_len=64, layers=layers)
        with LLM(str(folder), device="cpu", max_model_len=64) as llm:
            model: Any = llm.engine._runner._model
            model._ops = TritonOps()
            llm.engine.add_request(_request(SamplingParams(n=4, max_tokens=9, ignore_eos=True)))
            for _ in range(3):  # the prefill, and a step that copies the prompt's last block
                llm.engine.step()
            launched.clear()
            with Products() as products:
                llm.engine.step()
        counts.append(sum(launched.values()) + products.count)
    print(dict(launched), counts)
    assert counts[1] - counts[0] == 2 * 10


def _request(params: SamplingParams) -> Any:
    from rolloutd.engine.sequence import Request

    return Request("r", tuple(range(5, 12)), params)
