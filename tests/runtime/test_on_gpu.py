"""The whole engine on a GPU: kernels, graphs and the host-free loop against transformers on the same device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rolloutd import LLM, SamplingParams
from rolloutd.check import Sample, TrainerForward, TrainerMode
from rolloutd.runtime.graph_runner import GraphRunner

pytestmark = pytest.mark.gpu

TinyModel = Callable[..., Path]
KINDS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3", "qwen3_moe"]
PROMPTS = [list(range(5, 5 + length)) for length in (1, 7, 16, 40, 64)]
SHAPE: dict[str, Any] = {"hidden": 256, "head_dim": 64, "layers": 3}
MEAN_LIMIT: dict[TrainerMode, float] = {"fp32": 1e-5, "bf16": 1.5e-2, "autocast": 1e-2}
"""Of |log p - trainer's| on tiny random models; fp32 products run without tf32 on both sides."""


def on_gpu(folder: Path, **options: Any) -> LLM:
    defaults = {"device": "cuda", "max_model_len": 512, "max_num_seqs": 64, "kv_cache_bytes": 64 << 20}
    return LLM(str(folder), **(defaults | options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_log_probabilities_are_the_trainers(tiny_model: TinyModel, kind: str, mode: TrainerMode) -> None:
    folder = tiny_model(kind, **SHAPE)
    with on_gpu(folder, numerics=mode) as llm:
        assert isinstance(llm.engine._runner, GraphRunner)
        outputs = llm.generate(PROMPTS, SamplingParams(n=4, max_tokens=48, ignore_eos=True, seed=1))
    samples = [Sample(o.prompt_token_ids, c.token_ids) for o in outputs for c in o.outputs]
    ours = [c.logprobs for o in outputs for c in o.outputs]
    trainer = TrainerForward.load(folder, mode, torch.device("cuda"))
    theirs = trainer.logprobs(samples, 1.0, padded=False)
    gaps = torch.tensor([abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)])
    print(f"{kind} {mode}: mean {gaps.mean():.2e} max {gaps.max():.2e}")
    assert gaps.mean() < MEAN_LIMIT[mode]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2"])
def test_no_step_is_computed_without_a_graph(
    tiny_model: TinyModel, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), on_gpu(tiny_model(kind, **SHAPE), numerics="bf16") as llm:
        llm.generate(PROMPTS, SamplingParams(n=8, max_tokens=64, ignore_eos=True))
        runner: Any = llm.engine._runner
        assert len(runner._graphs) >= 1
    assert not caplog.records


def test_a_cpu_and_a_gpu_draw_the_same_tokens(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2", **SHAPE)
    drawn = []
    for device in ("cpu", "cuda"):
        with on_gpu(folder, device=device, numerics="fp32") as llm:
            outputs = llm.generate(PROMPTS, SamplingParams(n=4, max_tokens=32, ignore_eos=True, seed=5))
        drawn.append([c.token_ids for o in outputs for c in o.outputs])
    same = sum(a == b for a, b in zip(*drawn, strict=True))
    assert same >= 18, f"{same} of 20 completions agree; a draw may fall between two fp32 sums, but rarely does"


def test_updates_reach_captured_steps(tiny_model: TinyModel) -> None:
    """From the host's memory and from the GPU's."""
    folder = tiny_model("qwen2", **SHAPE)
    changed = {name: tensor * 1.1 for name, tensor in load_file(folder / "model.safetensors").items()}
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
    with on_gpu(folder, numerics="fp32") as llm, on_gpu(folder, numerics="fp32", enforce_eager=True) as eager:
        llm.generate(PROMPTS, params)
        runner: Any = llm.engine._runner
        num_graphs = len(runner._graphs)
        on_host = llm.update_weights(changed.items())
        assert eager.update_weights({name: tensor.cuda() for name, tensor in changed.items()}).digest == on_host.digest
        assert len(runner._graphs) == num_graphs, "the graphs stay: the new numbers lie where they read"
        for ours, theirs in zip(llm.generate(PROMPTS, params), eager.generate(PROMPTS, params), strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


def test_adapters_below_the_weights_reach_captured_steps(tiny_model: TinyModel) -> None:
    folder, generator = tiny_model("qwen2", **SHAPE), torch.Generator().manual_seed(1)
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
    tokens = []
    for max_lora_rank in (16, 0):
        with on_gpu(folder, numerics="fp32", max_lora_rank=max_lora_rank) as llm:
            runner: Any = llm.engine._runner
            for seed in (1, 2):
                generator.manual_seed(seed)
                adapter = {}
                for path, (rows, columns) in runner._model.lora_targets.items():
                    adapter[f"{path}.lora_A.weight"] = torch.randn(8, columns, generator=generator) / columns**0.5
                    adapter[f"{path}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) / 8**0.5
                llm.update_lora(adapter.items(), {"r": 8, "lora_alpha": 8})
                tokens.append([output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)])
            assert bool(list(runner.weights.appended())) == bool(max_lora_rank)
    assert tokens[:2] == tokens[2:]
    assert tokens[0] != tokens[1]


def test_sleep_gives_memory_back_and_wake_up_takes_it(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2", hidden=512, layers=4, vocab=32_768)
    params = SamplingParams(max_tokens=8, temperature=0.0)

    def used() -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    with on_gpu(folder, numerics="bf16", kv_cache_bytes=1 << 30) as llm:
        before = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)]
        awake, cache, weights = used(), llm.info.kv_cache_bytes, llm.info.weight_bytes
        llm.sleep(1)
        assert awake - used() > 0.9 * cache
        llm.sleep(2)
        assert awake - used() > 0.9 * (cache + weights)
        llm.wake_up()
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)] == before


def test_a_prefill_without_memory_is_done_in_smaller_steps(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2", hidden=512, layers=2, vocab=32_768, max_len=4096)
    prompts = [list(range(5, 2005)) for _ in range(4)]
    params = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1)
    options = {"numerics": "bf16", "max_model_len": 2048, "enable_prefix_caching": False, "enforce_eager": True}
    with on_gpu(folder, **options) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with on_gpu(folder, **options) as llm:
        total = torch.cuda.mem_get_info()[1]
        held = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((held + (24 << 20)) / total)
        try:
            found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert llm.stats().num_out_of_memory > 0
    assert found == expected
