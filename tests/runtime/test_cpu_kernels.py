"""The C kernels of a CPU beside the references in float64, on poisoned caches and odd sizes; and how they are built."""

from __future__ import annotations

import gc
import logging
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from rolloutd.kernels import compiled as module
from rolloutd.kernels.decode_attention import decode_attention_reference
from rolloutd.kernels.draw import draw_tokens_reference
from rolloutd.kernels.gated_activation import gated_activation_reference
from rolloutd.kernels.rms_norm import rms_norm_reference
from rolloutd.kernels.rope_and_store import HeadNorms, Rope, rope_and_store_reference
from rolloutd.runtime.cpu_kernels import SOURCES, CpuKernels, cpu_kernels
from rolloutd.runtime.cpu_ops import PackedWeights, packed_products
from tests.kernels.paged import PagedRows, paged_rows

NAN = float("nan")


def skip_without_compiler() -> NoReturn:
    """Skip; code that a compiler refuses is a failure."""
    assert not any(map(shutil.which, ("cc", "gcc", "clang"))), "a compiler made no library: see the log"
    pytest.skip("this machine has no C compiler")


@pytest.fixture(params=["native", "haswell", "x86-64"], scope="module")
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """As compiled for this processor, for one whose registers hold 8 floats, and for one whose hold 4."""
    if request.param != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("code of other processors, by an option of x86")
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "native":
            patch.setattr(module, "_native_flag", lambda: f"-march={request.param}")
        library = module.compiled("cpu_kernels", SOURCES, without="this test is skipped")
    if library is None:
        skip_without_compiler()
    return CpuKernels(library)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows_of(lens: list[int], kv_heads: int, head_dim: int, block_size: int, generator: torch.Generator) -> PagedRows:
    return paged_rows(
        lens,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=generator,
        index_dtype=torch.int64,
    )


def attend(kernels: CpuKernels, q: Tensor, rows: PagedRows, **options: object) -> Tensor:
    out = torch.full_like(q, NAN)
    kernels.decode_attention(q, rows.keys, rows.values, rows.tables, rows.lens, out, scale=0.3, **options)  # type: ignore[arg-type]
    return out


def exact(q: Tensor, rows: PagedRows, **options: float) -> Tensor:
    caches = rows.keys.double(), rows.values.double()
    return decode_attention_reference(q.double(), *caches, rows.tables, rows.lens, scale=0.3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (7, 1, 64), (6, 6, 80), (10, 2, 96), (3, 1, 256)]
)
@pytest.mark.parametrize("block_size", [1, 16, 5])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 5.0}, {"window": 70, "softcap": 2.0}])
def test_attention(
    kernels: CpuKernels,
    generator: torch.Generator,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    options: dict[str, float],
) -> None:
    rows = rows_of([1, 0, 63, 64, 65, 130, 16, 0], kv_heads, head_dim, block_size, generator)
    q = torch.randn(8, heads, head_dim, generator=generator)
    out = attend(kernels, q, rows, **options)
    torch.testing.assert_close(out, exact(q, rows, **options).float(), rtol=0, atol=5e-6)
    assert not out[[1, 7]].any(), "rows of length 0 are zeros"


def shared_rows(generator: torch.Generator, prefixes: list[int], own: list[list[int]]) -> PagedRows:
    """Return groups of rows that have whole blocks of 4 tokens in common, scattered over the batch."""
    lens = [4 * prefix + length for prefix, group in zip(prefixes, own, strict=True) for length in group]
    rows = rows_of(lens, 2, 32, 4, generator)
    at = 0
    for prefix, group in zip(prefixes, own, strict=True):
        rows.tables[at : at + len(group), :prefix] = rows.tables[at, :prefix].clone()
        at += len(group)
    order = torch.randperm(len(lens), generator=generator)
    return PagedRows(rows.keys, rows.values, rows.tables[order].contiguous(), rows.lens[order].contiguous())


@pytest.mark.parametrize("item_rows", [1, 2, 5, 64])
def test_what_siblings_share_is_read_once_and_changes_nothing(
    kernels: CpuKernels, generator: torch.Generator, item_rows: int
) -> None:
    rows = shared_rows(generator, [33, 17, 3, 0], [[1, 7, 90, 3, 64, 1], [2, 5], [1], [6, 66]])
    q = torch.randn(11, 6, 32, generator=generator)
    torch.testing.assert_close(attend(kernels, q, rows, item_rows=item_rows), exact(q, rows).float(), rtol=0, atol=3e-6)
    out = torch.empty_like(q)
    num_items = kernels.decode_attention(
        q, rows.keys, rows.values, rows.tables, rows.lens, out, scale=0.3, item_rows=item_rows
    )
    assert num_items == {1: 11, 2: 3 + 1 + 1 + 2, 5: 2 + 1 + 1 + 2, 64: 5}[item_rows]


def test_a_row_alone_has_the_same_bits_in_any_batch(kernels: CpuKernels, generator: torch.Generator) -> None:
    rows = shared_rows(generator, [33, 17, 3, 0], [[1, 7, 90, 3, 64, 1], [2, 5], [1], [6, 66]])
    q = torch.randn(11, 6, 32, generator=generator)
    together = attend(kernels, q, rows, item_rows=64)
    for i in range(11):
        alone = PagedRows(rows.keys, rows.values, rows.tables[i : i + 1], rows.lens[i : i + 1])
        assert torch.equal(attend(kernels, q[i : i + 1].contiguous(), alone)[0], together[i])
    for item_rows in (1, 2, 5):
        assert torch.equal(attend(kernels, q, rows, item_rows=item_rows), together)
    permuted = rows.permuted(generator)
    assert torch.equal(attend(kernels, q, permuted), together), "where blocks lie changes nothing"


def keys_of(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    high = torch.randint(-(2**62), 2**62, (num_rows,), generator=generator)
    return high, torch.arange(num_rows), torch.randint(0, 2**40, (num_rows,), generator=generator)


@pytest.mark.parametrize("vocab", [1, 7, 16, 1000, 1024, 1025, 40_001])
def test_the_draw_is_the_references(kernels: CpuKernels, generator: torch.Generator, vocab: int) -> None:
    logits = 3 * torch.randn(200, vocab + 3, generator=generator)[:, :vocab]
    temperature = torch.rand(200, generator=generator) + 0.5
    temperature[::7], temperature[::11] = 0.0, -1.0
    keys = keys_of(200, generator)
    ours, theirs = kernels.draw(logits, temperature, *keys), draw_tokens_reference(logits, temperature, *keys)
    assert (ours[0] != theirs[0]).sum() <= 1, "a draw may fall between two sums, but hardly ever does"
    divisor = torch.where(temperature > 0, temperature, 1.0).double()[:, None]
    exact = torch.log_softmax(logits.double() / divisor, -1).gather(1, ours[0][:, None])[:, 0].float()
    torch.testing.assert_close(ours[1], exact.masked_fill(temperature < 0, 0.0), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours[2], exact.masked_fill(temperature <= 0, 0.0), rtol=1e-6, atol=2e-6)


def test_rows_that_cannot_be_drawn(kernels: CpuKernels, generator: torch.Generator) -> None:
    logits = torch.randn(6, 2000, generator=generator)
    logits[0, 1999], logits[1, 3] = NAN, float("inf")
    logits[2] = -float("inf")
    logits[3] = -float("inf")
    logits[3, 1234] = 2.0
    logits[4, :1500] = -float("inf")
    temperature, keys = torch.ones(6), keys_of(6, generator)
    ours, theirs = kernels.draw(logits, temperature, *keys), draw_tokens_reference(logits, temperature, *keys)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, equal_nan=True, rtol=2e-6, atol=2e-6)
    assert ours[1][:3].isnan().all()
    assert ours[0][3] == 1234


def test_the_draw_is_distributed_as_the_softmax(kernels: CpuKernels, generator: torch.Generator) -> None:
    logits = torch.randn(64, generator=generator).expand(100_000, 64)
    index = torch.arange(100_000)
    drawn = kernels.draw(logits, torch.ones(100_000), torch.full_like(index, 5), index, index // 3)[0]
    expected = 100_000 * torch.softmax(logits[0].double(), 0)
    chi_square = float(((drawn.bincount(minlength=64) - expected) ** 2 / expected).sum())
    assert chi_square < 112, "63 degrees of freedom: one in ten thousand exceeds it"


@pytest.mark.parametrize("size", [1, 16, 73, 896])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(kernels: CpuKernels, generator: torch.Generator, size: int, offset: float) -> None:
    x = torch.randn(9, size + 5, generator=generator)[:, :size]
    residual, weight = torch.randn(9, size, generator=generator), torch.randn(size, generator=generator)
    for other in (None, residual):
        out, total = kernels.rms_norm(x, weight, 1e-6, offset, other)
        expected = x if other is None else x + other
        assert torch.equal(total, expected)
        want = rms_norm_reference(expected.double(), weight.double(), 1e-6, offset=offset, rounds_last=True)
        torch.testing.assert_close(out, want.float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 16, 75, 640])
@pytest.mark.parametrize("is_silu", [True, False])
def test_activations(kernels: CpuKernels, generator: torch.Generator, size: int, is_silu: bool) -> None:
    gate_up = 20 * torch.randn(700, 2 * size + 1, generator=generator)[:, : 2 * size]
    gate_up[0, 0], gate_up[1, 0] = -100.0, 100.0
    want = gated_activation_reference(gate_up.double(), "silu" if is_silu else "gelu_tanh")
    torch.testing.assert_close(kernels.gated(gate_up, is_silu=is_silu), want.float(), rtol=3e-6, atol=2e-5)


@pytest.mark.parametrize(("head_dim", "turned"), [(16, 16), (24, 16), (16, 0), (64, 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_store(
    kernels: CpuKernels, generator: torch.Generator, head_dim: int, turned: int, normed: bool
) -> None:
    widths = [4 * head_dim, 2 * head_dim, 2 * head_dim]
    q, k, v = torch.split(torch.randn(5, sum(widths), generator=generator), widths, dim=1)
    angles = torch.randn(20, 1, turned // 2, generator=generator).repeat(1, 1, 2)
    rope = Rope(angles.cos(), angles.sin(), torch.float32) if turned else None
    weights = torch.randn(2, head_dim, generator=generator)
    norms = HeadNorms(weights[0], weights[1], 1e-5, 1.0, True) if normed else None
    positions, slots = torch.tensor([3, 0, 19, 7, 11]), torch.tensor([5, 1, 0, 11])  # the fifth row is padding
    outs = []
    for op in ("ours", "reference"):
        caches = [torch.full((4, 3, 2, head_dim), NAN) for _ in range(2)]
        if op == "ours":
            out = kernels.rope_and_store(
                q,
                k,
                v,
                positions,
                slots,
                *caches,
                norms=None if norms is None else (norms.q, norms.k, norms.eps, norms.offset),
                table=None if rope is None else (rope.cos, rope.sin),
            )
        else:
            out = rope_and_store_reference(q, k, v, positions, slots, *caches, norms=norms, rope=rope)
        outs.append([out, *caches])
    for ours, theirs in zip(*outs, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours.nan_to_num(), theirs.nan_to_num(), rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------------- products


@pytest.mark.parametrize("num_inputs", [1, 16, 129, 512])
@pytest.mark.parametrize("num_outputs", [1, 15, 64, 65, 200])
@pytest.mark.parametrize("num_rows", [1, 5, 6, 7, 64, 131, 600])
def test_product(
    kernels: CpuKernels, num_rows: int, num_outputs: int, num_inputs: int, generator: torch.Generator
) -> None:
    wide = torch.randn(num_rows, num_inputs + 3, generator=generator)
    wide[:, num_inputs:] = NAN
    x, weight = wide[:, :num_inputs], torch.randn(num_outputs, num_inputs, generator=generator)
    bias = torch.randn(num_outputs, generator=generator)
    packed = kernels.pack_weight(weight)
    exact = x.double() @ weight.double().T
    tolerance = 1e-6 * num_inputs
    torch.testing.assert_close(kernels.product(x, packed, None, num_outputs).double(), exact, rtol=1e-5, atol=tolerance)
    with_bias = kernels.product(x, packed, bias, num_outputs)
    torch.testing.assert_close(with_bias.double(), exact + bias.double(), rtol=1e-5, atol=tolerance)
    assert torch.equal(packed, kernels.pack_weight(weight.T.contiguous().T)), "strides of the weight do not matter"


@pytest.mark.parametrize("rank", [1, 8, 16, 33])
@pytest.mark.parametrize(("start", "stop"), [(0, 200), (64, 128), (7, 24), (199, 200), (3, 150)])
def test_a_product_added_to_some_columns(
    kernels: CpuKernels, rank: int, start: int, stop: int, generator: torch.Generator
) -> None:
    x, y = torch.randn(13, rank, generator=generator), torch.randn(13, 200, generator=generator)
    weight, before = torch.randn(stop - start, rank, generator=generator), y.clone()
    kernels.add_product(y[:, start:stop], x, kernels.pack_weight(weight), 0.25)
    exact = before[:, start:stop].double() + 0.25 * (x.double() @ weight.double().T)
    torch.testing.assert_close(y[:, start:stop].double(), exact, rtol=1e-5, atol=1e-6 * rank)
    y[:, start:stop] = before[:, start:stop]
    assert torch.equal(y, before), "other columns are as they were"


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 3.0}])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 150), (70, 33), (64, 64)])
def test_tokens_of_a_chunk_attend_together(
    kernels: CpuKernels, start: int, length: int, options: dict[str, float], generator: torch.Generator
) -> None:
    whole = rows_of([start + length], 2, 32, 16, generator)
    lens = torch.arange(start + 1, start + length + 1)
    rows = PagedRows(whole.keys, whole.values, whole.tables.expand(length, -1), lens)
    q = torch.randn(length, 6, 32, generator=generator)
    out = attend(kernels, q, rows, **options)
    torch.testing.assert_close(out, exact(q, rows, **options).float(), rtol=0, atol=5e-6)
    alone = attend(kernels, q, rows, item_rows=1, **options)
    assert torch.equal(out, alone)
    decoding = PagedRows(whole.keys, whole.values, whole.tables.expand(length, -1).contiguous(), lens)
    assert torch.equal(attend(kernels, q, decoding, item_rows=1, **options), out), "as rows that decode, bit for bit"


def test_a_row_of_a_product_does_not_depend_on_the_others(kernels: CpuKernels, generator: torch.Generator) -> None:
    x, weight = torch.randn(300, 257, generator=generator), torch.randn(190, 257, generator=generator)
    packed = kernels.pack_weight(weight)
    together = kernels.product(x, packed, None, 190)
    for first, last in [(0, 1), (1, 7), (3, 67), (299, 300), (0, 128)]:
        alone = kernels.product(x[first:last], packed, None, 190)
        assert torch.equal(alone, together[first:last])


def test_packed_weights_go_with_their_weight(kernels: CpuKernels, generator: torch.Generator) -> None:
    weights = PackedWeights(kernels)
    x, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    torch.testing.assert_close(weights.multiply(x, weight, None), x @ weight.T)
    assert weights.of(weight) is weights.of(weight)
    del weight
    gc.collect()
    assert not weights._packed


def test_without_our_products_one_dnn_multiplies(generator: torch.Generator) -> None:
    products = packed_products(None)
    if products is None:
        pytest.skip("oneDNN's packed products do not work here")
    x, weight = torch.randn(9, 40, generator=generator), torch.randn(33, 40, generator=generator)
    bias = torch.randn(33, generator=generator)
    y = PackedWeights(products).multiply(x, weight, bias)
    torch.testing.assert_close(y, x @ weight.T + bias, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- how they come to be


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu_kernels.cache_clear()
    yield tmp_path / "cache" / "rolloutd"
    cpu_kernels.cache_clear()


def test_they_are_compiled_once(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_kernels() is None:
        skip_without_compiler()
    (library,) = fresh_cache.iterdir()
    assert stat.S_IMODE(fresh_cache.stat().st_mode) == 0o700
    cpu_kernels.cache_clear()
    ran = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda command: ran.append(command) or run(command))
    assert cpu_kernels() is not None
    assert [command[-1] for command in ran] == ["--version"], "nothing is compiled again"
    assert list(fresh_cache.iterdir()) == [library]


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false", "true"])
def test_without_a_compiler_the_reason_is_logged(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert cpu_kernels() is None
    assert "cpu_kernels=off reason=" in caplog.text


def test_a_compiler_without_openmp(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """What stands between the products runs on one thread; a library multiplies, unless one thread is all there is."""
    if cpu_kernels() is None:
        skip_without_compiler()
    cpu_kernels.cache_clear()
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) echo "no OpenMP here" >&2; exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    with caplog.at_level(logging.WARNING):
        kernels = cpu_kernels()
    assert kernels is not None
    assert not kernels.has_threads
    assert "cpu_kernels=one thread reason='no OpenMP here'" in caplog.text
    assert packed_products(kernels) is not kernels or torch.get_num_threads() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert packed_products(kernels) is kernels


def test_a_directory_that_others_can_write_to_is_not_used(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh_cache.mkdir(parents=True)
    fresh_cache.chmod(0o777)
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    assert module._cache_folder() == tmp_path / f"rolloutd-{os.getuid()}"
    (tmp_path / f"rolloutd-{os.getuid()}").chmod(0o770)
    with pytest.raises(OSError, match="no private directory"):
        module._cache_folder()
