"""draw_tokens as kernels: the very token that numpy's Philox predicts, cuts against a sort, rows that are not sound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy.stats import chisquare
from torch import Tensor

from rolloutd.engine.sequence import Draw, Group, Request
from rolloutd.kernels.draw import draw_config, draw_tokens, draw_tokens_reference, uniform
from rolloutd.kernels.truncate import find_cuts, truncate_reference
from rolloutd.runtime.philox import uniforms
from rolloutd.runtime.sampler import sample, sampling_inputs
from rolloutd.sampling_params import SamplingParams
from tests.kernels.draw_oracle import Rows, check_draw, kept_tokens, random_rows

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")


@triton.jit
def uniform_kernel(seed_ptr: tl.tensor, index_ptr: tl.tensor, position_ptr: tl.tensor, out_ptr: tl.tensor) -> None:
    row = tl.program_id(0)
    number = uniform(tl.load(seed_ptr + row), tl.load(index_ptr + row), tl.load(position_ptr + row))
    tl.store(out_ptr + row, number)


def test_uniform_numbers_are_those_of_numpy(device: torch.device) -> None:
    numbers = np.random.default_rng(0).integers(0, 2**64, (3, 40), dtype=np.uint64)
    numbers[:, 0], numbers[:, 1] = 0, 2**64 - 1
    out = torch.empty(40, dtype=torch.float64, device=device)
    uniform_kernel[(40,)](*(torch.from_numpy(n.view(np.int64)).to(device) for n in numbers), out)
    assert out.cpu().numpy().tolist() == uniforms(*numbers).tolist()


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 100, 1000, 2049])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_token_is_the_one_that_numpy_predicts(
    device: torch.device, generator: torch.Generator, vocab_size: int, dtype: torch.dtype
) -> None:
    rows = random_rows(5, generator)
    wide = torch.full((5, vocab_size + 7), NAN, dtype=dtype)
    wide[:, :vocab_size] = 2 * torch.randn(5, vocab_size, generator=generator)
    logits = wide.to(device)[:, :vocab_size]
    drawn = draw_tokens(logits, *rows.arguments(device))
    checked, skipped = check_draw(logits.float(), rows, [list(range(vocab_size))] * 5, drawn)
    assert checked >= 4
    assert checked + skipped == 5
    assert torch.equal(drawn[1], drawn[2]), "nothing is cut"


def test_tiles_are_many_and_cover_the_vocabulary() -> None:
    for vocab_size in (1, 33, 100, 2049, 32_000, 151_936, 262_144):
        config = draw_config(vocab_size)
        assert config.block_v * (config.num_tiles - 1) < vocab_size <= config.block_v * config.num_tiles
        assert config.num_tiles <= 64
    assert draw_config(1000).num_tiles > 30, "else the cases above would not cross tiles"


def test_rows_are_drawn_in_proportion(device: torch.device) -> None:
    count, probabilities = 150, np.array([0.4, 0.3, 0.2, 0.1])
    logits = torch.full((count, 64), -INF)
    logits[:, [5, 31, 32, 63]] = torch.from_numpy(np.log(probabilities)).float()  # the first two share a tile
    zeros = torch.zeros(count, dtype=torch.int64)
    rows = Rows(torch.ones(count), torch.arange(count), zeros, zeros)
    token_R = draw_tokens(logits.to(device), *rows.arguments(device))[0].cpu().numpy()
    counts = np.bincount(token_R, minlength=64)
    assert counts.sum() == counts[[5, 31, 32, 63]].sum()
    assert chisquare(counts[[5, 31, 32, 63]], probabilities * count).pvalue > 1e-3


@pytest.mark.parametrize("op", [draw_tokens, draw_tokens_reference])
def test_greedy_takes_the_first_of_equals_in_any_tile(device: torch.device, op: Any) -> None:
    logits = torch.zeros(4, 100)
    logits[0, [98, 40, 70]] = 3.0
    logits[1] = -INF
    logits[1, 77] = -5.0
    logits[3] = 1e30
    rows = Rows(torch.zeros(4), *torch.ones(3, 4, dtype=torch.int64).unbind())
    token_R, logprob_R, sampling_R = op(logits.to(device), *rows.arguments(device))
    assert token_R.tolist() == [40, 77, 0, 0]
    want = torch.log_softmax(logits.double(), -1)[torch.arange(4), token_R.cpu()]
    torch.testing.assert_close(logprob_R.double().cpu(), want, atol=1e-6, rtol=0)
    assert sampling_R.tolist() == [0.0] * 4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf - inf in the interpreter
@pytest.mark.parametrize("op", [draw_tokens, draw_tokens_reference])
@pytest.mark.parametrize("truncated", [False, True])
def test_rows_that_are_not_sound_give_token_0_and_nan(device: torch.device, op: Any, truncated: bool) -> None:
    logits = torch.randn(8, 70, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = logits[1, 69] = NAN
    logits[2, 50] = INF
    logits[3] = -INF
    logits[4] = NAN
    logits[5] = NAN
    temperature = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, -1.0, 1.0, 0.0])
    rows = Rows(temperature, *torch.ones(3, 8, dtype=torch.int64).unbind())
    cuts = (
        {"top_k_R": torch.full((8,), 20), "top_p_R": torch.full((8,), 0.9), "min_p_R": torch.full((8,), 0.01)}
        if truncated
        else {}
    )
    cuts = {name: cut.to(device) for name, cut in cuts.items()}
    token_R, logprob_R, sampling_R = (t.cpu() for t in op(logits.to(device), *rows.arguments(device), **cuts))
    assert token_R[:6].tolist() == [0] * 6
    assert logprob_R[:5].isnan().all()
    assert sampling_R[:5].isnan().all()
    assert logprob_R[5] == sampling_R[5] == 0.0, "padding"
    assert logprob_R[6:].isfinite().all()
    assert sampling_R[6:].isfinite().all()


@pytest.mark.parametrize("op", [draw_tokens, draw_tokens_reference])
def test_one_token_that_is_left_is_drawn(device: torch.device, generator: torch.Generator, op: Any) -> None:
    logits = torch.full((6, 100), -INF)
    places = torch.tensor([0, 31, 32, 63, 64, 99])
    logits[torch.arange(6), places] = -3.0
    drawn = op(logits.to(device), *random_rows(6, generator).arguments(device))
    assert drawn[0].tolist() == places.tolist()
    assert drawn[1].tolist() == drawn[2].tolist() == [0.0] * 6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a quotient becomes -inf in the interpreter
def test_a_tiny_temperature_takes_the_largest_without_overflow(
    device: torch.device, generator: torch.Generator
) -> None:
    logits = 1e5 * torch.randn(4, 100, generator=generator)
    _, *keys = random_rows(4, generator).arguments(device)
    token_R, logprob_R, sampling_R = draw_tokens(logits.to(device), torch.full((4,), 1e-35, device=device), *keys)
    assert token_R.tolist() == logits.argmax(-1).tolist()
    assert logprob_R.tolist() == sampling_R.tolist() == [0.0] * 4


def truncations(generator: torch.Generator, count: int, vocab_size: int) -> dict[str, Tensor]:
    """Return cuts of each kind; one row in four leaves one of them off."""
    top_k = torch.randint(0, vocab_size + 2, (count,), generator=generator)
    top_p = 0.05 + 0.9 * torch.rand(count, generator=generator)
    min_p = 0.2 * torch.rand(count, generator=generator)
    top_k[1::4], top_p[2::4], min_p[3::4] = 0, 1.0, 0.0
    return {"top_k_R": top_k, "top_p_R": top_p, "min_p_R": min_p}


@pytest.mark.parametrize("names", [("top_k_R",), ("top_p_R",), ("min_p_R",), ("top_k_R", "top_p_R", "min_p_R")])
@pytest.mark.parametrize(("vocab_size", "levels"), [(50, 0), (50, 3), (70, 6)])
def test_cuts_keep_what_a_sort_keeps(
    device: torch.device, generator: torch.Generator, names: tuple[str, ...], vocab_size: int, levels: int
) -> None:
    count = 4
    logits = 2 * torch.randn(count, vocab_size, generator=generator)
    if levels:
        logits = torch.randint(0, levels, (count, vocab_size), generator=generator).float() / 2 - 0.5
        logits[:, ::3] *= -1  # both zeros, which are equal
    rows, cuts = random_rows(count, generator), truncations(generator, count, vocab_size)
    used = {name: cuts[name] if name in names else None for name in cuts}
    on_device = {name: None if cut is None else cut.to(device) for name, cut in used.items()}
    off = {"top_k_R": 0, "top_p_R": 1.0, "min_p_R": 0.0}
    numbers = [[off[name] if cut is None else cut[row].item() for name, cut in used.items()] for row in range(count)]
    kept = [
        kept_tokens(logits[row].double().numpy(), float(rows.temperature[row]), *numbers[row])  # type: ignore[arg-type]
        for row in range(count)
    ]
    cut_R, last_R = find_cuts(logits.to(device), rows.temperature.to(device), *on_device.values())
    logp = torch.log_softmax(logits / rows.temperature[:, None], -1)
    reference = truncate_reference(logits, logp, *used.values()).isfinite()
    bits = (logits + 0.0).view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    cut, last = cut_R.cpu()[:, None], last_R.cpu()[:, None]
    found = (key > cut) | ((key == cut) & (torch.arange(vocab_size) <= last))
    sound = [row for row in range(count) if kept[row] is not None]
    assert len(sound) >= 3
    for row in sound:
        assert found[row].nonzero()[:, 0].tolist() == kept[row], f"row {row} {numbers[row]}"
        assert reference[row].nonzero()[:, 0].tolist() == kept[row], f"row {row} {numbers[row]}"
    for op, place in ((draw_tokens, device), (draw_tokens_reference, torch.device("cpu"))):
        arguments = {name: cut.to(place) for name, cut in used.items() if cut is not None}
        checked, _ = check_draw(logits, rows, kept, op(logits.to(place), *rows.arguments(place), **arguments))
        assert checked >= 3


def test_a_row_has_the_bits_that_it_has_alone(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(5, 70, generator=generator).to(device)
    arguments = random_rows(5, generator).arguments(device)
    cuts = {name: cut.to(device) for name, cut in truncations(generator, 5, 70).items()}
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    for used in ({}, cuts):
        together = draw_tokens(logits, *arguments, **used)
        moved = draw_tokens(logits[order], *(a[order] for a in arguments), **{n: c[order] for n, c in used.items()})
        alone = draw_tokens(logits[2:3], *(a[2:3] for a in arguments), **{n: c[2:3] for n, c in used.items()})
        for whole, permuted, one in zip(together, moved, alone, strict=True):
            assert torch.equal(whole[order], permuted)
            assert torch.equal(whole[2:3], one)


def test_the_sampler_draws_with_the_kernel_what_it_draws_with_the_reference(
    device: torch.device, generator: torch.Generator
) -> None:
    logits = 2 * torch.randn(2, 90, generator=generator)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=9),
        SamplingParams(temperature=0.7, top_p=0.8, min_p=0.02, repetition_penalty=1.4),
        SamplingParams(temperature=0.0, repetition_penalty=1.4),
        SamplingParams(presence_penalty=1.0, min_tokens=5),
    ]
    draws = []
    for i, p in enumerate(params):
        group = Group.from_request(Request(str(i), (3, 4, 5), p), seed=2**63 + i, eos_token_ids=frozenset({1}))
        draws.append(Draw(group.spawn(), 0))
    logits_row = np.array([0, 1, 0, 1, 0, 1])
    found, want = (
        sample(logits.to(place), sampling_inputs(tuple(draws), logits_row, len(logits), 90, place), op)
        for place, op in ((device, draw_tokens), (torch.device("cpu"), draw_tokens_reference))
    )
    assert found.token_R.tolist() == want.token_R.tolist()
    torch.testing.assert_close(found.logprob_R.cpu(), want.logprob_R, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.sampling_logprob_R.cpu(), want.sampling_logprob_R, atol=2e-6, rtol=0)


def test_no_rows_are_no_work_and_strided_vocabularies_are_refused(device: torch.device) -> None:
    rows = random_rows(0, torch.Generator())
    assert [t.shape for t in draw_tokens(torch.empty(0, 5, device=device), *rows.arguments(device))] == [(0,)] * 3
    rows = random_rows(5, torch.Generator())
    with pytest.raises(ValueError, match="not contiguous along V"):
        draw_tokens(torch.zeros(4, 5, device=device).T, *rows.arguments(device))
