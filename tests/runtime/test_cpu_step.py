"""Steps recorded and run as one call: the same to the bit as call by call, and nothing else is ever recorded."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rolloutd import LLM, SamplingParams
from rolloutd.outputs import RequestOutput
from rolloutd.runtime.cpu_calls import KINDS
from rolloutd.runtime.cpu_kernels import CpuKernels, cpu_kernels
from rolloutd.runtime.cpu_runner import CpuRunner
from rolloutd.runtime.cpu_step import NotRecordable, RecordedStep, _offsets, _Span, record
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.model_runner import ModelRunner
from tests.engine.test_updates import adapter_of, lora_copy, trained_copy

Factory = Callable[..., Path]
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7] * 20, [3] * 33]
PARAMS = [SamplingParams(n=5, max_tokens=length, seed=5, ignore_eos=True) for length in (11, 40, 26)]
RECORDED = ["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "smollm3"]
CALL_BY_CALL = ["olmo2", "granite", "qwen3_moe"]

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="without a C compiler there is nothing to record")


@pytest.fixture
def kernels() -> CpuKernels:
    found = cpu_kernels()
    assert found is not None
    return found


def runner_of(llm: LLM) -> CpuRunner[Any]:
    runner = llm.engine._runner
    assert isinstance(runner, CpuRunner)
    return runner


def completions(outputs: list[RequestOutput]) -> list[list[tuple[list[int], list[float]]]]:
    return [[(one.token_ids, one.logprobs) for one in output.outputs] for output in outputs]


# ---------------------------------------------------------------------- the same to the bit


@pytest.mark.parametrize("family", [*RECORDED, *CALL_BY_CALL])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_recorded_step_gives_the_bits_of_its_calls(tiny_model: Factory, family: str, deterministic: bool) -> None:
    folder = str(tiny_model(family))
    with LLM(folder, deterministic=deterministic) as llm, LLM(folder, enforce_eager=True) as eager:
        assert type(eager.engine._runner) is ModelRunner
        if not deterministic:
            assert completions(llm.generate(PROMPTS, PARAMS)) == completions(eager.generate(PROMPTS, PARAMS))
        else:
            with LLM(folder, deterministic=True, enforce_eager=True) as strict:
                assert completions(llm.generate(PROMPTS, PARAMS)) == completions(strict.generate(PROMPTS, PARAMS))
        assert (runner_of(llm).recorded is not None) == (family in RECORDED)


@pytest.mark.parametrize("mode", ["exact", "merged"])
def test_adapters_are_recorded_too(tiny_model: Factory, mode: Any) -> None:
    folder = tiny_model("qwen2", tie=True)
    model = lora_copy(folder, target_modules="all-linear")
    found = []
    for options in ({}, {"enforce_eager": True}):
        with LLM(str(folder), **options) as llm:
            base = completions(llm.generate(PROMPTS, PARAMS))
            llm.update_lora(adapter_of(model), model.peft_config["default"], mode=mode)
            found.append(completions(llm.generate(PROMPTS, PARAMS)))
            assert found[-1] != base
            if not options:
                recorded = runner_of(llm).recorded
                assert recorded is not None
                products = sum(call.kind.__name__ == "Product" for call in recorded.calls)
                assert products == 1 + 2 * (4 + 14 * (mode == "exact")), "A and B of 7 matrices in each of 2 layers"
    assert found[0] == found[1]


def test_why_a_step_is_not_recorded_is_logged_once(tiny_model: Factory, caplog: pytest.LogCaptureFixture) -> None:
    with LLM(str(tiny_model("qwen3_moe"))) as llm, caplog.at_level(logging.INFO):
        llm.generate(PROMPTS, PARAMS)
    (line,) = [record.getMessage() for record in caplog.records if "call by call" in record.getMessage()]
    assert line == "decoding call by call reason='torch computes aten.softmax.int in it'"


def test_more_rows_than_an_mlp_takes_at_once_go_call_by_call(tiny_model: Factory) -> None:
    params = SamplingParams(n=270, max_tokens=6, seed=1, ignore_eos=True)
    found = []
    for options in ({}, {"enforce_eager": True}):
        with LLM(str(tiny_model("qwen2")), max_num_seqs=300, **options) as llm:
            found.append(completions(llm.generate([[5, 6, 7]], params)))
            if not options:
                assert runner_of(llm).recorded is None
                llm.generate([[5, 6, 7]], replace(params, n=256))
                recorded = runner_of(llm).recorded
                assert recorded is not None
                assert recorded.num_rows == 256
    assert found[0] == found[1]


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_who_computes_what_changes_nothing(tiny_model: Factory, threads: int) -> None:
    """Threads without a task of their own in some calls, and more of them than cores."""
    folder, before = str(tiny_model("qwen2")), torch.get_num_threads()
    with LLM(folder) as llm:
        expected = completions(llm.generate(PROMPTS, PARAMS))
    torch.set_num_threads(threads)
    try:
        with LLM(folder) as llm:
            assert completions(llm.generate(PROMPTS, PARAMS)) == expected
            assert runner_of(llm).recorded is not None
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------- what a recorded step belongs to


def test_new_weights_are_recorded_anew_and_old_ones_let_go(tiny_model: Factory) -> None:
    folder = tiny_model("qwen2")
    model = trained_copy(folder)
    with LLM(str(folder)) as llm, LLM(str(folder), enforce_eager=True) as eager:
        llm.generate(PROMPTS, PARAMS)
        runner = runner_of(llm)
        first = weakref.ref(runner.recorded)
        for one in (llm, eager):
            one.update_weights(model.named_parameters())
        assert runner.recorded is None
        gc.collect()
        assert first() is None, "nothing else holds it"
        assert completions(llm.generate(PROMPTS, PARAMS)) == completions(eager.generate(PROMPTS, PARAMS))
        assert runner.recorded is not None
        llm.sleep(1)
        assert runner.recorded is None, "its keys and values are gone"
        llm.wake_up()
        assert completions(llm.generate(PROMPTS, PARAMS)) == completions(eager.generate(PROMPTS, PARAMS))


def test_the_seconds_of_its_calls(tiny_model: Factory) -> None:
    with LLM(str(tiny_model("qwen2"))) as llm:
        llm.generate(PROMPTS, PARAMS)
        recorded = runner_of(llm).recorded
        assert recorded is not None
        if recorded._kernels.has_threads:
            assert all(recorded.seconds_of(kind) > 0.0 for kind in KINDS)


# ---------------------------------------------------------------------- what is not recorded


class Step:
    """A function of a step's inputs like a model's forward, of which parts can be made wrong."""

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels
        self.table = torch.randn(50, 32)
        self.weight = torch.ones(32)
        self.between: Callable[[Tensor], Tensor] = lambda x: x
        self.ids: Callable[[ForwardInputs], Tensor] = lambda inputs: inputs.token_ids_T

    def __call__(self, inputs: ForwardInputs) -> tuple[Tensor, ...]:
        x = self.kernels.embed(self.ids(inputs), self.table, 2.0)
        return self.kernels.rms_norm(self.between(x), self.weight, 1e-6, 0.0, x)


def inputs_of(ids: list[int]) -> ForwardInputs:
    rows = torch.tensor(ids)
    return ForwardInputs(
        token_ids_T=rows,
        positions_T=rows,
        slot_mapping_T=rows,
        num_decode=len(ids),
        decode_block_tables_RM=torch.zeros(len(ids), 1, dtype=torch.int64),
        decode_lens_R=rows,
        prefills=(),
        last_row_of_chunk=rows.numpy(),
    )


def test_a_step_for_any_number_of_rows(kernels: CpuKernels) -> None:
    step = Step(kernels)
    recorded = record(kernels, step, 8)
    for ids in ([3], [49, 0, 7], list(range(8))):
        inputs = inputs_of(ids)
        for ours, its in zip(recorded.run(inputs), step(inputs), strict=True):
            assert torch.equal(ours, its)
    with pytest.raises(AssertionError, match="more rows than were recorded"):
        recorded.run(inputs_of([1] * 9))


def test_an_id_that_no_row_has_is_nan(kernels: CpuKernels) -> None:
    for bad in (-1, 50, 1 << 40):
        out, _ = Step(kernels)(inputs_of([4, bad]))
        assert not out[0].isnan().any()
        assert out[1].isnan().all()


def with_torch(step: Step) -> None:
    step.between = lambda x: x * 2


def with_torch_in_place(step: Step) -> None:
    step.between = lambda x: x.mul_(2)


def of_fewer_rows(step: Step) -> None:
    step.between = lambda x: step.kernels.rms_norm(x[:4], step.weight, 1e-6, 0.0)[0].repeat_interleave(2, 0)


def of_some_rows(step: Step) -> None:
    norm = step.kernels.rms_norm
    step.between = lambda x: norm(x[:4], step.weight, 1e-6, 0.0) and x  # type: ignore[return-value]


def of_other_ids(step: Step) -> None:
    ids = torch.zeros(8, dtype=torch.int64)
    step.ids = lambda inputs: ids


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (with_torch, r"torch computes aten\.mul\.Tensor"),
        (with_torch_in_place, r"torch computes aten\.mul_\.Tensor"),
        (of_fewer_rows, r"torch computes aten\."),
        (of_some_rows, "Norm computes 4 of 8 rows"),
        (of_other_ids, "Embedding reads other ids than the step's"),
    ],
)
def test_what_is_more_than_calls_is_not_recorded(
    kernels: CpuKernels, wrong: Callable[[Step], None], reason: str
) -> None:
    step = Step(kernels)
    wrong(step)
    with pytest.raises(NotRecordable, match=reason):
        record(kernels, step, 8)
    assert not Step(kernels)(inputs_of([3]))[0].isnan().any(), "calls run again"


def test_attention_of_layers_is_planned_once_so_it_must_be_alike(kernels: CpuKernels) -> None:
    caches = [torch.zeros(4, 16, num_kv_heads, 16) for num_kv_heads in (2, 1)]

    def attend(inputs: ForwardInputs, cache: Tensor) -> Tensor:
        q, out = kernels.empty(8, 4, 16), kernels.empty(8, 4, 16)
        tables, lens = inputs.decode_block_tables_RM, inputs.decode_lens_R
        kernels.decode_attention(q, cache, cache, tables, lens, out, scale=1.0)
        return out

    assert len(record(kernels, lambda inputs: (attend(inputs, caches[0]),) * 2, 8).calls) == 1
    with pytest.raises(NotRecordable, match=r"differs in heads or blocks: \[\(4, 1, 16\), \(4, 2, 16\)\]"):
        record(kernels, lambda inputs: tuple(attend(inputs, cache) for cache in caches), 8)


def test_what_no_call_wrote_is_no_result(kernels: CpuKernels) -> None:
    answer = torch.zeros(8, 4)
    with pytest.raises(NotRecordable, match="returns what no call has written"):
        record(kernels, lambda inputs: (answer,), 8)


def test_recording_computes_and_writes_nothing(tiny_model: Factory) -> None:
    with LLM(str(tiny_model("qwen2"))) as llm:
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=1))
        runner = runner_of(llm)
        assert runner._cache is not None
        for tensor in (*runner._cache.keys, *runner._cache.values):
            tensor.fill_(float("nan"))
        recorded = record(runner._kernels, lambda inputs: (ModelRunner._forward(runner, inputs),), 8)
        assert isinstance(recorded, RecordedStep)
        assert all(bool(tensor.isnan().all()) for tensor in (*runner._cache.keys, *runner._cache.values))


# ---------------------------------------------------------------------- memory between calls


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 500)), max_size=30))
def test_what_is_needed_at_once_never_overlaps(drawn: list[tuple[int, int, int]]) -> None:
    spans = [_Span(min(a, b), max(a, b), size) for a, b, size in drawn]
    offsets, num_bytes = _offsets(spans)
    for i, (a, at) in enumerate(zip(spans, offsets, strict=True)):
        assert at % 64 == 0
        assert at + a.num_bytes <= num_bytes
        for b, other in list(zip(spans, offsets, strict=True))[:i]:
            if a.first <= b.last and b.first <= a.last:
                assert at + a.num_bytes <= other or other + b.num_bytes <= at


def test_layers_share_their_memory() -> None:
    layers = [_Span(2 * i, 2 * i + 2, 4096) for i in range(40)]
    assert _offsets(layers)[1] == 2 * 4096, "what a layer writes, and what the one before it wrote"
