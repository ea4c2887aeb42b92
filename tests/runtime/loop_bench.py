"""Engines over the decode loop on a CPU, beside the plain runner's, and stand-ins for what a GPU adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rolloutd.config import EngineConfig, SharedPrefixAttention
from rolloutd.engine.engine import Engine
from rolloutd.engine.pipeline import Pipeline
from rolloutd.engine.sequence import Request
from rolloutd.kernels.head_and_draw import head_and_draw_reference
from rolloutd.outputs import CompletionOutput
from rolloutd.runtime.cpu_ops import CpuOps
from rolloutd.runtime.decode_loop import DecodeLoop
from rolloutd.runtime.graph_runner import GraphRunner
from rolloutd.runtime.ops import Ops
from rolloutd.runtime.step_graphs import Capture, Step
from rolloutd.runtime.transfers import CpuTransfers, Event
from rolloutd.sampling_params import SamplingParams

CPU = torch.device("cpu")


class LateTransfers(CpuTransfers):
    """Brings an answer when it is first asked for: what the next run does to the device must not change it."""

    def fetch(self, source: Tensor, target: Tensor) -> Event:
        return _Late(source, target)


class _Late:
    def __init__(self, source: Tensor, target: Tensor) -> None:
        self._source, self._target = source, target

    def query(self) -> bool:
        self._target.copy_(self._source)
        return True


class ReplayingCapture:
    """Runs a step as a capture does, and replays the step that it was given then."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replayed = 0
        self.num_resets = 0

    def reset(self) -> None:
        self.num_resets += 1

    def __call__(self, step: Step) -> Step:
        for _ in range(3):
            step()
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            step()

        return replay


class Bench:
    """One engine and the outputs of its requests."""

    def __init__(
        self,
        model: Path,
        *,
        loop: bool,
        capture: Capture | None = None,
        max_steps: int = 8,
        sharing: SharedPrefixAttention = "off",
        **options: Any,
    ):
        options = {"max_num_seqs": 12, "block_size": 4, "max_model_len": 256, "device": "cpu"} | options
        self.engine = Engine.from_config(EngineConfig(model=str(model), **options))
        self.outputs: dict[tuple[str, int], CompletionOutput] = {}
        model = self.runner._model
        if isinstance(model._ops, CpuOps):  # which packs weights, and the loop writes new ones over the old
            model._ops = Ops()
        if loop:
            self.use_loop(capture, max_steps, sharing)
        if not options.get("deterministic"):  # those ops read whole pieces and trust weights of 0
            self.poison()

    @property
    def runner(self) -> Any:
        return self.engine._runner

    def use_loop(self, capture: Capture | None, max_steps: int, sharing: SharedPrefixAttention) -> None:
        engine, plain, info = self.engine, self.runner, self.engine.info
        runner = GraphRunner(
            plain._model,
            plain.weights,
            plain._precision,
            plain._device,
            max_num_seqs=engine._scheduler._max_num_seqs,
            max_model_len=info.max_model_len,
            capture=capture,
            fused_draw=head_and_draw_reference,
            shared_prefix_attention=sharing,
        )
        runner.max_steps = max_steps
        runner.allocate_cache(info.num_blocks, info.block_size)
        assert runner._loop is not None
        if plain._device == CPU:
            sizes = runner._loop._sizes
            parts = (runner._decode, runner._draw_next, sizes, CPU, LateTransfers(), runner._graphs)
            runner._loop = DecodeLoop(*parts, runner._loop._rows._prefixes)
        engine._runner, engine._pipeline = runner, Pipeline(engine._scheduler, runner)

    def poison(self) -> None:
        """Make every block NaN: what is read before it was written shows."""
        for cache in (*self.runner._cache.keys, *self.runner._cache.values):
            cache.fill_(float("nan"))

    def add(self, name: str, prompt: list[int], **params: Any) -> None:
        self.engine.add_request(Request(name, tuple(prompt), SamplingParams(**params)))

    def step(self) -> None:
        for done in self.engine.step():
            assert (done.request_id, done.completion.index) not in self.outputs
            self.outputs[done.request_id, done.completion.index] = done.completion

    def finish(self) -> None:
        while self.engine.has_unfinished():
            self.step()
        self.engine.check_invariants()


def assert_same(actual: Bench, expected: Bench, *, tolerance: float = 2e-5) -> None:
    """Tokens and reasons are equal, log-probabilities to fp32 rounding."""
    assert actual.outputs.keys() == expected.outputs.keys()
    for key, wanted in expected.outputs.items():
        got = actual.outputs[key]
        assert (got.token_ids, got.finish_reason, got.stop_reason) == (
            wanted.token_ids,
            wanted.finish_reason,
            wanted.stop_reason,
        ), key
        assert len(got.logprobs) == len(got.sampling_logprobs) == len(got.weight_versions) == len(got.token_ids)
        np.testing.assert_allclose(got.logprobs, wanted.logprobs, rtol=0, atol=tolerance)
        np.testing.assert_allclose(got.sampling_logprobs, wanted.sampling_logprobs, rtol=0, atol=tolerance)
