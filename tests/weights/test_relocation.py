"""Weights that move: same numbers, same sharing, no memory in common with where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rolloutd import LLM
from rolloutd.weights.relocation import Relocation
from rolloutd.weights.store import WeightStore

CPU = torch.device("cpu")


def test_views_of_one_storage_move_once_and_stay_views_of_one() -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    parts = [whole, whole[1:3], whole.T[2], whole.view(torch.int32)[0]]
    move = Relocation.to(CPU)
    moved = [move(part) for part in parts]
    for old, new in zip(parts, moved, strict=True):
        assert (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride())
        assert torch.equal(new, old)
    assert len({new.untyped_storage().data_ptr() for new in moved}) == 1
    whole.zero_()
    assert moved[0][1, 1] == 7
    moved[0][2, 2] = -1.0
    assert moved[1][1, 2] == -1.0
    assert moved[2][2] == -1.0


@pytest.mark.parametrize(("kind", "impl"), [("qwen2", "auto"), ("qwen3_moe", "auto"), ("qwen2", "transformers")])
def test_a_store_moves_base_and_serving_weights_together(tiny_model: Callable[..., Path], kind: str, impl: str) -> None:
    with LLM(str(tiny_model(kind)), model_impl=impl) as llm:
        runner: Any = llm.engine._runner
        store: WeightStore[Any] = llm.engine._weights
        path, (rows, columns) = next(iter(store._model.lora_targets.items()))
        adapter = [(f"{path}.lora_A.weight", torch.randn(4, columns)), (f"{path}.lora_B.weight", torch.randn(rows, 4))]
        llm.update_lora(adapter, {"r": 4, "lora_alpha": 8})
        before = llm.score([[5, 6, 7]], [[8, 9, 10]])
        old = [tensor.data_ptr() for tensor in _tensors(runner.weights)]
        num_bytes, base = runner.weights.num_bytes, store._base
        runner.relocate(store.relocate(runner.weights, Relocation.to(CPU)))
        assert runner.weights.num_bytes == num_bytes
        assert not set(old) & {tensor.data_ptr() for tensor in _tensors(runner.weights)}
        assert store._base is not base
        shared = {t.data_ptr() for t in _tensors(store._base)} & {t.data_ptr() for t in _tensors(runner.weights)}
        assert len(shared) > 5, "base and adapted weights still hold one copy of the matrices"
        for tensor in _tensors(base):
            tensor.fill_(float("nan"))
        assert llm.score([[5, 6, 7]], [[8, 9, 10]]) == before


def test_what_serves_without_an_adapter_is_the_base_after_a_move_too(tiny_model: Callable[..., Path]) -> None:
    with LLM(str(tiny_model())) as llm:
        store: WeightStore[Any] = llm.engine._weights
        assert store.relocate(store._base, Relocation.to(CPU)) is store._base


def _tensors(weights: Any) -> list[torch.Tensor]:
    return list(weights.packed.values() if hasattr(weights, "packed") else weights.tensors.values())
