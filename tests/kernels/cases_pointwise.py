"""rms_norm, gated_activation and the options of add_rms_norm as kernels, against references and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from rolloutd.kernels.gated_activation import Activation, gated_activation, gated_activation_reference
from rolloutd.kernels.rms_norm import rms_norm, rms_norm_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ULP = {FP32: 2.0**-22, BF16: 2.0**-7, FP16: 2.0**-10}
"""Relative spacing, about: sums in another order may move a value over the edge of a rounding."""


def assert_within_an_ulp(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2 * ULP[actual.dtype], atol=2e-6)


@pytest.mark.parametrize(("offset", "rounds_last"), [(0.0, False), (1.0, True), (0.0, True)])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16)])
def test_norms_round_where_they_are_told(
    device: torch.device,
    generator: torch.Generator,
    dtypes: tuple[torch.dtype, torch.dtype],
    offset: float,
    rounds_last: bool,
) -> None:
    wide = torch.randn(5, 90, generator=generator).to(device, dtypes[0])
    x = wide[:, 7:80]  # rows of a wider matrix
    residual = torch.randn(5, 73, generator=generator).to(device, dtypes[0])
    weight = (1 + 0.1 * torch.randn(73, generator=generator)).to(device, dtypes[1])
    options = {"offset": offset, "rounds_last": rounds_last}
    assert_within_an_ulp(rms_norm(x, weight, 1e-5, **options), rms_norm_reference(x, weight, 1e-5, **options))
    normed, total = add_rms_norm(x, residual, weight, 1e-5, **options)
    normed_want, total_want = add_rms_norm_reference(x, residual, weight, 1e-5, **options)
    assert torch.equal(total, total_want)
    assert_within_an_ulp(normed, normed_want)
    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * (offset + weight.double())
    error = (rms_norm(x, weight, 1e-5, **options).double() - exact).abs().max()
    assert error < (2e-2 if BF16 in dtypes else 4e-3 if FP16 in dtypes else 2e-6)


def test_a_norm_keeps_poison_in_its_row(device: torch.device, generator: torch.Generator) -> None:
    x = torch.randn(3, 20, generator=generator).to(device)
    weight = torch.ones(20, device=device)
    clean = rms_norm(x, weight, 1e-6)
    x[1, 3] = float("nan")
    poisoned = rms_norm(x, weight, 1e-6)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("size", [1, 63, 1024, 1025])
def test_activations(
    device: torch.device, generator: torch.Generator, size: int, dtype: torch.dtype, activation: Activation
) -> None:
    gate_up = (3 * torch.randn(3, 2 * size, generator=generator)).to(dtype).to(device)
    gate_up[0, 0] = -60.0  # exp(60) is finite, its square is not
    out = gated_activation(gate_up, activation)
    assert_within_an_ulp(out, gated_activation_reference(gate_up, activation))


def test_activation_of_strided_rows(device: torch.device, generator: torch.Generator) -> None:
    wide = torch.randn(4, 50, generator=generator).to(device)
    out = gated_activation(wide[:, 5:25], "silu")
    assert_within_an_ulp(out, gated_activation_reference(wide[:, 5:25], "silu"))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"weight \(3,\) is not \[4\]"):
        rms_norm(torch.ones(2, 4, device=device), torch.ones(3, device=device), 1e-6)
    with pytest.raises(ValueError, match=r"gate_up \(2, 3\) is not"):
        gated_activation(torch.ones(2, 3, device=device), "silu")
