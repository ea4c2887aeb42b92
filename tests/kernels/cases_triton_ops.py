"""Whole models with our kernels under them, beside the same models with PyTorch's operators."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rolloutd import LLM, SamplingParams
from rolloutd.engine.sequence import Request
from rolloutd.runtime.ops import Ops
from rolloutd.runtime.triton_ops import TritonOps

PROMPTS = [[5, 6, 7], list(range(8, 29))]
KINDS = ["qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3", "granite"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Counts launches by kernel."""
    from triton.runtime.interpreter import GridExecutor

    launched: collections.Counter[str] = collections.Counter()
    call = GridExecutor.__call__

    def counted(self: GridExecutor, *args: Any, **options: Any) -> None:
        launched[self.fn.__name__] += 1
        call(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return launched


@contextmanager
def engine(folder: Path, ops: Ops, device: torch.device, **options: Any) -> Iterator[LLM]:
    """An engine in process that computes with `ops`, in chunks of 16 tokens, so that steps mix prefill and decoding."""
    with LLM(str(folder), device=device.type, max_model_len=64, max_num_batched_tokens=16, **options) as llm:
        model: Any = llm.engine._runner._model
        model._ops = ops
        yield llm


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_what_operators_give(device: torch.device, tiny_model: Callable[..., Path], kind: str) -> None:
    folder = tiny_model(kind, hidden=32, head_dim=8, max_len=64)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    completions = []
    for ops in (TritonOps(), Ops()):
        with engine(folder, ops, device, numerics="fp32") as llm:
            completions.append([output.outputs[0] for output in llm.generate(PROMPTS, greedy)])
    for ours, theirs in zip(*completions, strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("numerics", ["bf16", "autocast"])
def test_reduced_precision_is_as_far_from_fp32_as_with_operators(
    device: torch.device, tiny_model: Callable[..., Path], kind: str, numerics: str
) -> None:
    folder = tiny_model(kind, hidden=32, head_dim=8, max_len=64)

    def score(ops: Ops, numerics: str) -> torch.Tensor:
        with engine(folder, ops, device, numerics=numerics) as llm:
            return torch.tensor(llm.score(PROMPTS[1:], [list(range(9, 29))])[0])

    exact = score(Ops(), "fp32")
    ours, theirs = ((score(ops, numerics) - exact).abs().mean() for ops in (TritonOps(), Ops()))
    assert 0 < ours < 1.5 * theirs


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
    if device.type == "cuda":
        pytest.skip("counts in the interpreter")
    counts = []
    for layers in (1, 3):
        folder = tiny_model("qwen2", hidden=32, head_dim=8, max_len=64, layers=layers)
        with engine(folder, TritonOps(), device) as llm:
            counts.append(launches_of_a_step(llm, launched))
    print(dict(launched), counts)
    assert counts[1] - counts[0] == 2 * 10


def launches_of_a_step(llm: LLM, launched: collections.Counter[str]) -> int:
    """Return kernels and products of one step that decodes four samples."""
    params = SamplingParams(n=4, max_tokens=9, ignore_eos=True)
    llm.engine.add_request(Request("r", tuple(range(5, 12)), params))
    for _ in range(3):  # the prefill, and a step that copies the prompt's last block
        llm.engine.step()
    launched.clear()
    with Products() as products:
        llm.engine.step()
    return sum(launched.values()) + products.count
