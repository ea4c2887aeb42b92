"""add_rms_norm as a kernel, against its reference, float64, and transformers' own module."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.add_rms_norm import add_rms_norm, add_rms_norm_kernel, add_rms_norm_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-6

# Relative RMS of the error against float64: half an ulp of the dtype, spread evenly, is 2**-mantissa / sqrt(12) and
# two roundings follow each other; fp32 also pays for its sums.
LIMITS = {FP32: 5e-7, BF16: 4e-3, FP16: 5e-4}


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS of the difference; NaN anywhere makes it NaN, which no limit admits."""
    expected = expected.double().cpu()
    return float((actual.double().cpu() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def in_float64(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.double() + residual.double()
    return weight.double() * total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS), total


def inputs(
    generator: torch.Generator, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = torch.randn(2, *shape, generator=generator)
    weight = 1 + 0.1 * torch.randn(shape[1], generator=generator)
    return x.to(device, dtypes[0]), residual.to(device, dtypes[1]), weight.to(device, dtypes[2])


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 64), (4, 80), (2, 129), (3, 1000)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_kernel_meets_float64_and_the_reference(
    device: torch.device, generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, residual, weight = inputs(generator, shape, (dtype, dtype, dtype), device)
    out, total = add_rms_norm(x, residual, weight, EPS)
    out_want, total_want = add_rms_norm_reference(x, residual, weight, EPS)
    assert torch.equal(total, total_want), "one addition, one rounding: the same bits"
    assert out.dtype == out_want.dtype == dtype
    assert rms_error(out, in_float64(total, torch.zeros_like(total), weight)[0]) < LIMITS[dtype]
    # Sums in another order move an fp32 value by an ulp, and what lies on the edge of a rounding by one of its own.
    assert rms_error(out, out_want) < LIMITS[dtype] / 2


@pytest.mark.parametrize("dtypes", list(product([FP32, BF16], repeat=3)))
def test_dtypes_are_promoted_as_torch_promotes(
    device: torch.device, generator: torch.Generator, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    x, residual, weight = inputs(generator, (3, 48), dtypes, device)
    out, total = add_rms_norm(x, residual, weight, EPS)
    out_want, total_want = add_rms_norm_reference(x, residual, weight, EPS)
    assert (out.dtype, total.dtype) == (out_want.dtype, total_want.dtype)
    assert torch.equal(total, total_want)
    assert rms_error(out, out_want) < LIMITS[total.dtype] / 2


def test_the_normalised_value_is_rounded_before_the_weight(device: torch.device, generator: torch.Generator) -> None:
    x, residual, weight = inputs(generator, (16, 512), (BF16, BF16, BF16), device)
    out, total = add_rms_norm(x, residual, weight, EPS)
    out_want, _ = add_rms_norm_reference(x, residual, weight, EPS)
    rounded_once = in_float64(total, torch.zeros_like(total), weight)[0].to(BF16)
    assert (out != out_want).float().mean() < 0.005, "only sums on the edge of a rounding may differ"
    assert (rounded_once != out_want).float().mean() > 0.1, "else this test could not tell the two apart"


def test_outputs_are_written_whole_and_not_beyond(device: torch.device, generator: torch.Generator) -> None:
    x, residual, weight = inputs(generator, (3, 37), (FP32, FP32, FP32), device)
    out = torch.full((5, 64), float("nan"), device=device)
    total = torch.full((5, 41), float("nan"), device=device)
    strides = (x.stride(0), residual.stride(0), out.stride(0), total.stride(0))
    add_rms_norm_kernel[(3,)](
        x,
        residual,
        weight,
        out[1],
        total[1],
        x,
        x,
        *strides,
        0,
        0.0,
        EPS,
        E=37,
        OFFSET=0.0,
        ROUNDS_LAST=False,
        RANK=0,
        BLOCK_E=64,
    )
    out_want, total_want = add_rms_norm_reference(x, residual, weight, EPS)
    torch.testing.assert_close(out[1:4, :37], out_want, rtol=1e-6, atol=1e-6)
    assert torch.equal(total[1:4, :37], total_want)
    for buffer in (out, total):
        buffer[1:4, :37] = float("nan")
        assert buffer.isnan().all(), "written outside the rows or past E"


def test_rows_may_be_strided_and_lie_beside_nan(device: torch.device, generator: torch.Generator) -> None:
    def spread(width: int) -> Tensor:
        wide = torch.full((8, width), float("nan"), device=device)
        wide[::2, :45] = torch.randn(4, 45, generator=generator).to(device)
        return wide[::2, :45]

    x, residual = spread(90), spread(51)
    weight = torch.full((90,), float("nan"), device=device)
    weight[:45] = 1.25
    out, total = add_rms_norm(x, residual, weight[:45], EPS)
    out_want, total_want = add_rms_norm_reference(x, residual, weight[:45], EPS)
    assert torch.equal(total, total_want)
    assert rms_error(out, out_want) < 5e-7


def test_a_row_with_nan_spoils_no_other(device: torch.device, generator: torch.Generator) -> None:
    x, residual, weight = inputs(generator, (3, 20), (FP32, FP32, FP32), device)
    x[1, 7] = float("nan")
    out, _ = add_rms_norm(x, residual, weight, EPS)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()


def test_zeros_stay_zeros_and_no_rows_are_no_work(device: torch.device) -> None:
    zeros, weight = torch.zeros(2, 5, device=device), torch.ones(5, device=device)
    out, total = add_rms_norm(zeros, zeros, weight, EPS)
    assert not out.any()
    assert not total.any()
    out, total = add_rms_norm(zeros[:0], zeros[:0], weight, EPS)
    assert out.shape == total.shape == (0, 5)


def test_it_rounds_where_transformers_does(device: torch.device, generator: torch.Generator) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (FP32, BF16):
        x, residual, weight = inputs(generator, (6, 96), (dtype, dtype, dtype), device)
        module = LlamaRMSNorm(96, eps=EPS).to(device, dtype)
        module.weight.data.copy_(weight)
        want = module(residual + x).detach()
        assert torch.equal(add_rms_norm_reference(x, residual, weight, EPS)[0], want)
        assert rms_error(add_rms_norm(x, residual, weight, EPS)[0], want) < LIMITS[dtype] / 2


def test_columns_that_are_not_contiguous_are_refused(device: torch.device) -> None:
    x = torch.ones(4, 3, device=device).t()
    with pytest.raises(ValueError, match="x is not contiguous"):
        add_rms_norm(x, torch.ones(3, 4, device=device), torch.ones(4, device=device), EPS)
