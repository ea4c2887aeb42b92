"""copy_weights as a kernel: every element, nothing beside it, cast as torch casts, in one launch for many tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.copy_weights import PIECE, copy_weights, copy_weights_reference, piece_table

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(1,), (7,), (3, 5), (PIECE - 1,), (PIECE,), (2, PIECE // 2 + 3), (0, 4)]


def sources(dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    return [torch.randn(size, generator=generator).to(device, dtype) for size in SIZES]


def within(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, at: int) -> tuple[Tensor, Tensor]:
    """Return a poisoned target, and the poisoned memory that it lies in from element `at` on."""
    count = torch.Size(size).numel()
    memory = torch.full((count + 64,), float("nan"), dtype=dtype, device=device)
    return memory[at : at + count].view(size), memory


@pytest.mark.parametrize("source_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("at", [32, 33])
def test_copies_are_exact_and_stay_in_their_tensors(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, source_dtype: torch.dtype, at: int
) -> None:
    new = sources(source_dtype, generator, device)
    places = [within(size, dtype, device, at) for size in SIZES]
    assert copy_weights((target, source) for (target, _), source in zip(places, new, strict=True)) == 1
    for (target, memory), source in zip(places, new, strict=True):
        want = torch.empty_like(target)
        copy_weights_reference([(want, source)])
        assert torch.equal(target, want)
        count = target.numel()
        assert memory[:at].isnan().all()
        assert memory[at + count :].isnan().all()


def test_each_pair_of_dtypes_is_one_launch(device: torch.device, generator: torch.Generator) -> None:
    pairs = [
        (torch.empty_like(source), source) for dtype in (FP32, BF16) for source in sources(dtype, generator, device)
    ]
    assert copy_weights(pairs) == 2
    assert all(torch.equal(target, source) for target, source in pairs)
    assert copy_weights([]) == 0


def test_pieces_cover_a_tensor_once(device: torch.device) -> None:
    target, source = torch.empty(2, 2 * PIECE + 5, device=device, dtype=BF16).unbind()
    table = piece_table([(target, source)])
    assert table[:, 2].tolist() == [PIECE, PIECE, 5]
    assert (table[:, 0] - target.data_ptr()).tolist() == [0, 2 * PIECE, 4 * PIECE]


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"copy_weights: torch.float32 \(3,\) from torch.float32 \(4,\)"):
        copy_weights([(torch.ones(3, device=device), torch.ones(4, device=device))])
    with pytest.raises(ValueError, match="expected contiguous"):
        copy_weights([(torch.ones(3, 4, device=device).t(), torch.ones(4, 3, device=device))])
    with pytest.raises(ValueError, match="int64"):
        copy_weights([(torch.ones(3, device=device), torch.ones(3, dtype=torch.int64, device=device))])
