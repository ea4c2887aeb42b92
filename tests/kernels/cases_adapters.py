"""LoRA adapters inside of the kernels that follow a projection: beside the reference, float64, and a whole model."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rolloutd import LLM
from rolloutd.kernels.adapters import TailAdapters, adapted_reference
from rolloutd.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from rolloutd.kernels.gated_activation import gated_activation, gated_activation_reference
from rolloutd.kernels.rope_and_store import rope_and_store, rope_and_store_reference
from rolloutd.runtime.ops import Ops
from rolloutd.runtime.triton_ops import TritonOps
from tests.kernels.cases_pointwise import assert_within_an_ulp
from tests.kernels.cases_rope_and_store import Case
from tests.kernels.cases_triton_ops import PROMPTS, engine, launched, launches_of_a_step  # noqa: F401 (a fixture)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def adapters(sizes: tuple[int, ...], rows: int, rank: int, dtype: torch.dtype, device: torch.device) -> TailAdapters:
    """Return adapters of parts of these sizes, of which the last but one has none, and poison beyond the last."""
    generator = torch.Generator().manual_seed(rank)
    tail = torch.randn(rows, rank * len(sizes) + 3, generator=generator)
    tail[:, rank * len(sizes) :] = float("nan")
    b = torch.randn(rank, sum(sizes), generator=generator) / rank**0.5
    columns, scalings = [rank * i for i in range(len(sizes))], [0.5 + i for i in range(len(sizes))]
    if len(sizes) > 1:
        scalings[-2] = 0.0
        b[:, sum(sizes[:-2]) : sum(sizes[:-1])] = 0.0
    wide = tail.to(device, dtype)  # rows of a wider matrix
    return TailAdapters(wide[:, : rank * len(sizes)], b.to(device, dtype), tuple(columns), tuple(scalings))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Sums in another order: in fp32 by an error of sums, in 16 bits by a rounding here and there."""
    if ours.dtype == FP32:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    else:
        different = (ours != theirs).float().mean().item()
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=4e-2, atol=4e-2)
        assert different < 0.12, f"{different:.1%} differ"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("rank", [16, 48])
def test_add_rms_norm(device: torch.device, generator: torch.Generator, dtype: torch.dtype, rank: int) -> None:
    x, residual = torch.randn(2, 5, 73, generator=generator).to(device, dtype)
    weight = torch.ones(73, device=device, dtype=dtype)
    options = {"adapters": adapters((73,), 5, rank, dtype, device)}
    for ours, theirs in zip(
        add_rms_norm(x, residual, weight, 1e-5, **options),
        add_rms_norm_reference(x, residual, weight, 1e-5, **options),
        strict=True,
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("rows", "size"), [(1, 40), (8, 256), (11, 259)])
def test_gated_activation(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, rows: int, size: int
) -> None:
    gate_up = torch.randn(rows, 2 * size, generator=generator).to(device, dtype)
    both = adapters((size, size), rows, 16, dtype, device)
    ours, theirs = gated_activation(gate_up, "silu", both), gated_activation_reference(gate_up, "silu", both)
    assert_close(ours, theirs)
    assert not torch.allclose(ours, gated_activation(gate_up, "silu"), atol=0.1)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("norm", [None, BF16])
def test_rope_and_store(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, norm: torch.dtype | None
) -> None:
    case = Case(device, generator, dtype=dtype, rotary_dim=6, norm=norm and dtype)
    three = adapters((32, 16, 16), 5, 16, dtype, device)
    outs = []
    for op in (rope_and_store, rope_and_store_reference):
        caches = case.caches()
        rows = case.q, case.k, case.v, case.positions, case.slots
        outs.append([op(*rows, *caches, norms=case.norms, rope=case.rope, adapters=three), *caches])
    for ours, theirs in zip(*outs, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert_close(ours.nan_to_num(), theirs.nan_to_num())


def test_a_part_without_an_adapter_keeps_its_bits(device: torch.device, generator: torch.Generator) -> None:
    gate_up = torch.randn(3, 2 * 40, generator=generator).to(device, BF16)
    none = adapters((40, 40), 3, 16, BF16, device)
    none = replace(none, b_rN=torch.zeros_like(none.b_rN))
    assert_within_an_ulp(gated_activation(gate_up, "silu", none), gated_activation(gate_up, "silu"))
    assert torch.equal(adapted_reference(gate_up, none, (40, 40)), gate_up)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    gate_up = torch.ones(3, 80, device=device)
    with pytest.raises(ValueError, match=r"B \(16, 60\) is not a contiguous \[r, 80\]"):
        gated_activation(gate_up, "silu", adapters((30, 30), 3, 16, FP32, device))
    with pytest.raises(ValueError, match=r"A x is torch.bfloat16"):
        gated_activation(gate_up, "silu", adapters((40, 40), 3, 16, BF16, device))
    with pytest.raises(ValueError, match=r"of \(3, 3\) parts, expected 2"):
        gated_activation(gate_up, "silu", adapters((40, 30, 10), 3, 16, FP32, device))


def adapter(llm: LLM, ranks: tuple[int, ...] = (3, 16, 5)) -> dict[str, Tensor]:
    """Return an adapter of different ranks on two of three maps of the model."""
    generator = torch.Generator().manual_seed(1)
    model: Any = llm.engine._runner._model
    tensors = {}
    for i, (path, (rows, columns)) in enumerate(model.lora_targets.items()):
        if i % 3 != 1:
            rank = ranks[i % len(ranks)]
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / rank**0.5
    return tensors


def serve_with_adapter(llm: LLM, folder: Path, max_lora_rank: int) -> None:
    """Pack the weights anew with rows for adapters below them, as a GPU does, and push an adapter twice."""
    from safetensors.torch import load_file

    model: Any = llm.engine._runner._model
    model._max_lora_rank = max_lora_rank
    llm.update_weights(load_file(folder / "model.safetensors").items())
    tensors = adapter(llm)
    config = {"r": 16, "lora_alpha": 8}
    llm.update_lora([(name, -tensor) for name, tensor in tensors.items()], config)
    llm.update_lora(tensors.items(), config)


FP32_KINDS = ["qwen2", "gemma2", "olmo2", "phi3", "granite", "qwen2_moe"]


@pytest.mark.parametrize(("kind", "numerics"), [*((kind, "fp32") for kind in FP32_KINDS), ("qwen3", "autocast")])
def test_appended_adapters_give_what_separate_products_give(
    device: torch.device, tiny_model: Callable[..., Path], kind: str, numerics: str
) -> None:
    folder = tiny_model(kind, hidden=32, head_dim=8, max_len=64)
    scores = []
    for ops, max_lora_rank in ((TritonOps(), 16), (TritonOps() if numerics == "autocast" else Ops(), 0)):
        with engine(folder, ops, device, numerics=numerics) as llm:
            before = torch.tensor(llm.score(PROMPTS[:1], [list(range(9, 16))])[0])
            serve_with_adapter(llm, folder, max_lora_rank)
            weights: Any = llm.engine._runner.weights
            assert bool(list(weights.appended())) == bool(max_lora_rank)
            scores.append(torch.tensor(llm.score(PROMPTS[:1], [list(range(9, 16))])[0]))
            assert (scores[-1] - before).abs().max() > 1e-2
    torch.testing.assert_close(*scores, rtol=1e-5, atol=2e-5 if numerics == "fp32" else 5e-2)


def test_adapters_add_no_launch(
    device: torch.device,
    tiny_model: Callable[..., Path],
    launched: collections.Counter[str],  # noqa: F811
) -> None:
    if device.type == "cuda":
        pytest.skip("counts in the interpreter")
    counts = {}
    for max_lora_rank in (16, 0):
        for layers in (1, 3):
            folder = tiny_model("qwen2", hidden=32, head_dim=8, max_len=64, layers=layers)
            with engine(folder, TritonOps(), device) as llm:
                serve_with_adapter(llm, folder, max_lora_rank)
                counts[max_lora_rank, layers] = launches_of_a_step(llm, launched)
    print(counts)
    assert counts[16, 3] - counts[16, 1] == 2 * 10
    assert counts[0, 3] - counts[0, 1] > 2 * 10
