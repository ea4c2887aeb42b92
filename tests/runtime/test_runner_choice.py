"""Which runner a device gets, and that the loop draws from head and hidden state at once where it may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rolloutd.config import EngineConfig
from rolloutd.kernels.head_and_draw import head_and_draw, head_and_draw_reference
from rolloutd.runtime.graph_runner import GraphRunner
from rolloutd.runtime.model_runner import ModelRunner
from rolloutd.runtime.runners import runner_for
from rolloutd.weights.packing import Precision
from tests.runtime.loop_bench import Bench, ReplayingCapture, assert_same

BF16 = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16)


def runner_on(device: str, captures: list[torch.device] | None = None, **options: Any) -> ModelRunner[Any]:
    def capture_on(where: torch.device) -> ReplayingCapture:
        if captures is not None:
            captures.append(where)
        return ReplayingCapture()

    config = EngineConfig(model="m", max_num_seqs=7, **options)
    model: Any = object()
    return runner_for(config, model, object(), BF16, torch.device(device), 99, capture_on)


@pytest.fixture(autouse=True)
def _triton_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rolloutd.runtime.runners.HAS_TRITON", True)  # as on a machine with a GPU


def test_a_gpu_gets_graphs_and_a_cpu_steps() -> None:
    captures: list[torch.device] = []
    assert type(runner_on("cpu", captures)) is ModelRunner
    assert captures == []
    runner: Any = runner_on("cuda", captures)
    assert isinstance(runner, GraphRunner)
    assert captures == [torch.device("cuda")]
    assert (runner._max_num_seqs, runner._max_model_len, runner.max_steps) == (7, 99, 8)
    assert runner._fused_draw is head_and_draw


def test_eager_means_no_capture_and_deterministic_a_head_of_its_own() -> None:
    captures: list[torch.device] = []
    eager: Any = runner_on("cuda", captures, enforce_eager=True)
    assert isinstance(eager, GraphRunner)
    assert captures == []
    strict: Any = runner_on("cuda", deterministic=True)
    assert strict._fused_draw is None


def test_without_triton_a_gpu_computes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rolloutd.runtime.runners.HAS_TRITON", False)
    assert type(runner_on("cuda")) is ModelRunner


@pytest.mark.parametrize(
    ("options", "params", "is_fused"),
    [
        ({"numerics": "bf16"}, {}, True),
        ({"numerics": "bf16"}, {"top_k": 5}, False),
        ({"numerics": "bf16", "head_dtype": "float32"}, {}, False),
        ({"numerics": "fp32"}, {}, False),
        ({"numerics": "bf16", "model_impl": "transformers"}, {}, False),
    ],
)
def test_rows_that_only_have_a_temperature_are_drawn_with_the_head(
    tiny_model: Callable[..., Path], options: dict[str, Any], params: dict[str, Any], is_fused: bool
) -> None:
    model = tiny_model("gemma2" if options.get("model_impl") is None else "qwen2")
    plain, loop = Bench(model, loop=False, **options), Bench(model, loop=True, **options)
    sizes: list[int] = []

    def counted(hidden_RE: Tensor, *keys: Any, **head: Any) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(len(hidden_RE))
        return head_and_draw_reference(hidden_RE, *keys, **head)

    loop.runner._fused_draw = counted
    for bench in (plain, loop):
        for i in range(5):
            bench.add(f"r{i}", [3, 4 + i], max_tokens=11, ignore_eos=True, seed=i, **params)
        bench.finish()
    # A bf16 product of 8 rows need not have the bits of one of 5: what is held equal is the path, in fp32.
    if options["numerics"] == "fp32":
        assert_same(loop, plain)
    assert {key: len(out.token_ids) for key, out in loop.outputs.items()} == dict.fromkeys(plain.outputs, 11)
    assert (set(sizes) == {8}) is is_fused
