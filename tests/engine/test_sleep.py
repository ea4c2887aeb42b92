"""Memory that is given away and comes back, and errors where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rolloutd import LLM, SamplingParams
from rolloutd.config import EngineConfig
from rolloutd.engine.engine import Engine
from rolloutd.engine.sequence import Batch
from rolloutd.errors import DigestMismatch, OutOfMemory, RequestError
from rolloutd.runtime.memory import out_of_memory
from rolloutd.weights.manifest import WeightManifest
from rolloutd.weights.push import Push
from rolloutd.weights.tensors import bytes_of

PROMPTS = [[5, 6, 7], [8, 9]]
PARAMS = SamplingParams(n=2, max_tokens=6, seed=3)
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"


@pytest.fixture
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2")


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    """An engine that takes its weights to other memory for level 2, as on a GPU."""
    with LLM(str(folder)) as llm:
        llm.engine.memory.leaves = True
        yield llm


def tokens(llm: LLM) -> list[list[int]]:
    return [completion.token_ids for output in llm.generate(PROMPTS, PARAMS) for completion in output.outputs]


def places(llm: LLM) -> set[int]:
    runner: Any = llm.engine._runner
    return {tensor.data_ptr() for tensor in runner.weights.tensors()}


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_goes_on_as_before(llm: LLM, level: int) -> None:
    before, memory = tokens(llm), places(llm)
    llm.sleep(level)
    assert llm.engine._runner._cache is None  # type: ignore[attr-defined]
    assert (places(llm) == memory) is (level == 1)
    with pytest.raises(RequestError, match=r"sleeps.*wake_up"):
        tokens(llm)
    llm.wake_up()
    llm.wake_up()
    assert tokens(llm) == before
    assert llm.stats().prefix_hits == 0


def test_a_second_sleep_may_be_deeper(llm: LLM) -> None:
    before, memory = tokens(llm), places(llm)
    llm.sleep()
    llm.sleep(2)
    away = places(llm)
    assert away.isdisjoint(memory)
    llm.sleep(1)
    assert places(llm) == away
    llm.wake_up()
    assert places(llm).isdisjoint(away)
    assert tokens(llm) == before


def test_a_level_that_does_not_exist_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"level=3 is not known. Use 1 .* or 2 "):
        llm.sleep(3)
    assert tokens(llm)


@pytest.mark.parametrize("level", [1, 2])
def test_an_update_during_sleep_is_served_afterwards(llm: LLM, folder: Path, level: int) -> None:
    changed = {name: tensor * 1.1 for name, tensor in load_file(folder / "model.safetensors").items()}
    with LLM(str(folder)) as awake:
        awake.update_weights(changed.items())
        expected = tokens(awake)
    llm.sleep(level)
    llm.update_weights(changed.items())
    assert not llm.engine.memory._is_away
    llm.wake_up()
    assert tokens(llm) == expected
    assert llm.weight_version == 1


def test_an_adapter_during_sleep_brings_its_base_back(llm: LLM, folder: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    rows, columns = llm.engine._weights._model.lora_targets[path]
    generator = torch.Generator().manual_seed(1)
    adapter = [
        (f"{path}.lora_A.weight", torch.randn(2, columns, generator=generator)),
        (f"{path}.lora_B.weight", torch.randn(rows, 2, generator=generator)),
    ]
    with LLM(str(folder)) as awake:
        awake.update_lora(adapter, {"r": 2, "lora_alpha": 4})
        expected = tokens(awake)
    llm.sleep(2)
    llm.update_lora(adapter, {"r": 2, "lora_alpha": 4})
    llm.wake_up()
    assert tokens(llm) == expected


def test_a_refused_update_during_sleep_leaves_what_is_away(llm: LLM) -> None:
    before = tokens(llm)
    llm.sleep(2)
    away = places(llm)
    runner: Any = llm.engine._runner
    push = Push.full((name, torch.zeros(shape)) for name, shape in _shapes(runner).items())
    llm.engine.begin_update("u", "full")
    for spec, tensor in push.tensors():
        llm.engine.stage("u", spec, 0, bytes_of(tensor))
        push.record(spec, lambda: 0)
    manifest = push.manifest()
    wrong = WeightManifest(dict.fromkeys(manifest.digests, 0), manifest.num_bytes)
    with pytest.raises(DigestMismatch):
        llm.engine.commit_update("u", wrong, None, None)
    assert places(llm) == away
    llm.wake_up()
    assert tokens(llm) == before


def _shapes(runner: Any) -> dict[str, tuple[int, ...]]:
    return {name: placement.shape for name, placement in runner._model._names.placements.items()}


# ------------------------------------------------------------------------------------------------------ no memory left


def test_a_wake_up_without_memory_can_be_tried_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(llm)
    llm.sleep(2)
    runner: Any = llm.engine._runner

    def refuse(num_blocks: int, block_size: int) -> int:
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "allocate_cache", refuse)
        with pytest.raises(OutOfMemory, match=r"gave away to sleep \(CUDA out of memory\)"):
            llm.wake_up()
        with pytest.raises(RequestError, match="sleeps"):
            tokens(llm)
    llm.wake_up()
    assert tokens(llm) == before


def test_an_update_without_memory_leaves_the_old_version(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(llm)
    runner: Any = llm.engine._runner

    def refuse(spare: Any) -> Any:
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    tensors = [(name, torch.zeros(shape)) for name, shape in _shapes(runner).items()]
    with monkeypatch.context() as patch:
        patch.setattr(runner._model, "packing", refuse)
        with pytest.raises(OutOfMemory, match="new weights beside those that serve"):
            llm.update_weights(tensors)
    assert llm.weight_version == 0
    assert tokens(llm) == before
    llm.update_weights(tensors)
    assert llm.weight_version == 1


def test_a_model_that_does_not_fit_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    monkeypatch.setattr("rolloutd.engine.engine.load_model", refuse)
    with pytest.raises(OutOfMemory, match=r"no memory for '.*' and its KV cache.*--gpu-memory-utilization"):
        Engine.from_config(EngineConfig(model=str(folder)))


def test_steps_of_a_real_model_shrink_until_they_fit(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(llm)
    runner: Any = llm.engine._runner
    compute, sizes = runner._compute, []

    def limited(batch: Batch) -> Any:
        if batch.num_tokens > 2:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        sizes.append(batch.num_tokens)
        return compute(batch)

    monkeypatch.setattr(runner, "_compute", limited)
    llm.engine._scheduler.blocks.forget_prefixes()
    assert tokens(llm) == before
    assert max(sizes) == 2
    assert llm.stats().num_out_of_memory >= 1
    llm.engine.check_invariants()


def test_the_named_error_holds_no_frame_of_the_step() -> None:
    def step() -> None:
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    try:
        step()
    except torch.OutOfMemoryError as error:
        named = out_of_memory("a step of 9 tokens", error, torch.device("cpu"))
    assert named.__traceback__ is None
    assert named.__context__ is None
    assert "no memory for a step of 9 tokens (CUDA out of memory)" in named.message
