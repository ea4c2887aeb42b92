"""rope_and_store as a kernel: in reduced precision the reference's very bits, and nothing else in the cache moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.rope_and_store import HeadNorms, Rope, rope_and_store, rope_and_store_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


class Case:
    """Strided projections of a few rows, one of which is skipped and one of which is padding."""

    def __init__(
        self,
        device: torch.device,
        generator: torch.Generator,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 8,
        rotary_dim: int | None = None,
        dtype: torch.dtype = FP32,
        cache: torch.dtype | None = None,
        angle: torch.dtype | None = None,
        rope_rounds_last: bool = False,
        norm: torch.dtype | None = None,
        norm_rounds_last: bool = False,
    ) -> None:
        rows, self.cache_dtype = 5, cache or dtype
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv = torch.randn(rows, sum(widths), generator=generator).to(dtype).to(device)
        self.q, self.k, self.v = torch.split(self.qkv, widths, dim=1)
        self.positions = torch.tensor([3, 0, 19, 7, 11], device=device)
        self.slots = torch.tensor([5, -1, 0, 11], device=device)  # the fifth row is padding
        self.shape = (4, 3, kv_heads, head_dim)
        rotary = head_dim if rotary_dim is None else rotary_dim
        angles = torch.outer(torch.arange(20.0), 1.0 / 100 ** (torch.arange(0, rotary, 2) / max(rotary, 1)))
        angles = angles.repeat(1, 2)[:, None].to(device)
        self.rope = Rope(angles.cos(), angles.sin(), angle or dtype, rope_rounds_last) if rotary else None
        self.norms = None
        if norm is not None:
            q, k = (1 + 0.2 * torch.randn(2, head_dim, generator=generator)).to(norm).to(device)
            self.norms = HeadNorms(q, k, 1e-5, 1.0 if norm_rounds_last else 0.0, norm_rounds_last)

    def caches(self) -> list[Tensor]:
        return [torch.full(self.shape, NAN, dtype=self.cache_dtype, device=self.q.device) for _ in range(2)]

    def run(self, op: object) -> list[Tensor]:
        caches = self.caches()
        out = op(  # type: ignore[operator]
            self.q, self.k, self.v, self.positions, self.slots, *caches, norms=self.norms, rope=self.rope
        )
        return [out, *caches]

    def assert_equal(self, *, exact: bool) -> None:
        tolerance = 0.0 if exact else {FP32: 1e-6, BF16: 2.0**-7, FP16: 2.0**-10}[self.cache_dtype]
        for actual, expected in zip(self.run(rope_and_store), self.run(rope_and_store_reference), strict=True):
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 8, 8), (7, 1, 64, 64), (3, 3, 80, 32), (2, 1, 96, 96), (2, 2, 128, 64), (1, 1, 256, 256), (4, 2, 8, 0)],
)
def test_rotated_heads_have_the_references_bits(
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rotary_dim": rotary_dim}
    Case(device, generator, dtype=dtype, **shape).assert_equal(exact=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("angle", [FP32, BF16])
@pytest.mark.parametrize("rope_rounds_last", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rounding_points_of_the_modes(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, angle: torch.dtype, rope_rounds_last: bool
) -> None:
    case = Case(device, generator, dtype=dtype, cache=BF16, angle=angle, rope_rounds_last=rope_rounds_last)
    case.assert_equal(exact=True)


@pytest.mark.parametrize("norm", [FP32, BF16])
@pytest.mark.parametrize("norm_rounds_last", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norms_of_heads(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, norm: torch.dtype, norm_rounds_last: bool
) -> None:
    Case(device, generator, dtype=dtype, norm=norm, norm_rounds_last=norm_rounds_last, head_dim=24).assert_equal(
        exact=False
    )


def test_skipped_rows_padding_and_slots_outside_the_pool_write_nothing(
    device: torch.device, generator: torch.Generator
) -> None:
    case = Case(device, generator)
    case.slots = torch.tensor([5, -1, 400, 11], device=device)
    _, keys, values = case.run(rope_and_store)
    for cache in (keys, values):
        written = ~cache.flatten(0, 1).isnan().flatten(1).any(1)
        assert written.nonzero()[:, 0].tolist() == [5, 11]


def test_a_row_does_not_depend_on_the_others(device: torch.device, generator: torch.Generator) -> None:
    case = Case(device, generator, norm=FP32)
    out = case.run(rope_and_store)[0]
    case.qkv[1:] = NAN
    assert torch.equal(case.run(rope_and_store)[0][0], out[0])


def test_what_does_not_fit_is_refused(device: torch.device, generator: torch.Generator) -> None:
    case = Case(device, generator)
    case.k = case.k[:, :8]
    with pytest.raises(ValueError, match=r"k \(5, 8\) is not \[5, 16\]"):
        case.run(rope_and_store)
    case = Case(device, generator)
    assert case.rope is not None
    case.rope = replace(case.rope, cos=case.rope.cos[..., :3], sin=case.rope.sin[..., :3])
    with pytest.raises(ValueError, match="not one contiguous"):
        case.run(rope_and_store)
