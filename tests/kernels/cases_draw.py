"""draw_tokens as a kernel: the very tokens of the CPU's sampler, and log-probabilities in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rolloutd.kernels.draw import PADDING, draw_tokens, draw_tokens_reference, uniforms_reference
from rolloutd.runtime.philox import uniforms

SEEDS = np.array([0, 1, (1 << 64) - 1, 0x0123456789ABCDEF, 1 << 63], np.uint64)


def counters(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return seeds, sample indices and positions that use all of their bits."""
    seeds = torch.from_numpy(np.resize(SEEDS, rows).view(np.int64).copy())
    indices = torch.arange(rows, dtype=torch.int64) * 7
    positions = torch.arange(rows, dtype=torch.int64) * ((1 << 32) + 3) + 5
    return seeds.to(device), indices.to(device), positions.to(device)


def cdf_of(logits: Tensor, temperature: Tensor) -> Tensor:
    scaled = logits.cpu().float() / temperature.cpu()[:, None].clamp_min(1e-30)
    return torch.softmax(scaled.double(), -1).cumsum(-1)


def test_the_reference_draws_at_the_published_numbers(device: torch.device) -> None:
    seed, index, position = counters(200, device)
    wanted = uniforms(*(tensor.cpu().numpy().view(np.uint64) for tensor in (seed, index, position)))
    assert (uniforms_reference(seed, index, position).cpu().numpy() == wanted).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000, 4096, 4097, 9001])
def test_tokens_are_those_at_the_uniform_number(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, vocab: int
) -> None:
    rows = 11
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype).to(device)
    temperature = torch.tensor([0.5, 1.0, 1.3] * 4)[:rows].to(device)
    numbers = counters(rows, device)
    token, logprob, sampling = draw_tokens(logits, temperature, *numbers)
    cdf = cdf_of(logits, temperature)
    random = uniforms_reference(*numbers).cpu()
    for row in range(rows):
        below = cdf[row, token[row] - 1] if token[row] > 0 else 0.0
        assert below - 1e-6 <= random[row] <= cdf[row, token[row]] + 1e-6
    exact = torch.log_softmax((logits.float() / temperature[:, None]).double(), -1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.equal(sampling, logprob)
    assert torch.equal(token, draw_tokens_reference(logits, temperature, *numbers)[0])


def test_greedy_rows_take_the_first_of_the_largest(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(4, 5000, generator=generator)
    logits[0, [4500, 30]] = 9.0
    logits[1, 4999] = 9.0
    logits[2, :] = 0.0
    logits[3, [4096, 4097]] = 9.0
    temperature = torch.zeros(4)
    token, logprob, sampling = draw_tokens(logits.to(device), temperature.to(device), *counters(4, device))
    assert token.tolist() == [30, 4999, 0, 4096]
    exact = torch.log_softmax(logits.double(), -1).gather(1, token.cpu()[:, None])[:, 0]
    torch.testing.assert_close(logprob.cpu().double(), exact, rtol=2e-6, atol=2e-6)
    assert (sampling == 0.0).all()


def test_tokens_at_minus_infinity_are_never_drawn(device: torch.device) -> None:
    rows, vocab = 64, 4200
    logits = torch.full((rows, vocab), float("-inf"))
    logits[:, [3, 4199]] = torch.tensor([0.0, 1.0])
    logits[0, 4199] = float("-inf")
    numbers = counters(rows, device)
    token, logprob, _ = draw_tokens(logits.to(device), torch.ones(rows, device=device), *numbers)
    assert set(token.tolist()) == {3, 4199}
    assert (token[0], logprob[0]) == (3, 0.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what a GPU computes in silence
def test_padding_is_not_drawn_and_poison_stays_in_its_row(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(6, 300, generator=generator).to(device)
    temperature = torch.tensor([1.0, PADDING, 1.0, 0.0, 1.0, 1.0], device=device)
    numbers = counters(6, device)
    clean = draw_tokens(logits, temperature, *numbers)
    logits[1] = float("nan")
    logits[4, 7] = float("nan")
    logits[5] = float("-inf")
    token, logprob, _ = draw_tokens(logits, temperature, *numbers)
    assert token[1] == 0
    assert logprob[4].isnan()
    assert ((token >= 0) & (token < 300)).all()
    for row in (0, 2, 3):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(clean[:2], (token, logprob), strict=True))


def test_a_row_alone_and_a_strided_row_draw_the_same_bits(device: torch.device, generator: torch.Generator) -> None:
    wide = torch.randn(5, 4500, generator=generator).to(device)
    numbers = counters(5, device)
    temperature = torch.full((5,), 0.8, device=device)
    together = draw_tokens(wide[:, :4300], temperature, *numbers)
    for row in range(5):
        one = slice(row, row + 1)
        alone = draw_tokens(wide[one, :4300].contiguous(), temperature[one], *(tensor[one] for tensor in numbers))
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


def test_draws_follow_the_distribution(device: torch.device, generator: torch.Generator) -> None:
    """Chi-square over 100,000 draws of the reference, 64 tokens; the kernel draws the same."""
    logits = torch.randn(1, 64, generator=generator).to(device)
    count = 100_000
    seeds = torch.arange(count, dtype=torch.int64, device=device)
    zeros, ones = torch.zeros_like(seeds), torch.ones(count, device=device)
    tokens = draw_tokens_reference(logits.expand(count, -1), ones, seeds, zeros, zeros)[0]
    expected = count * torch.softmax(logits[0].cpu().double(), -1)
    chi_square = float(((torch.bincount(tokens.cpu(), minlength=64) - expected) ** 2 / expected).sum())
    assert 25 < chi_square < 115  # 63 degrees of freedom: outside at p < 1e-4
    some = slice(0, 200)
    drawn = draw_tokens(logits.expand(200, -1), ones[some], seeds[some], zeros[some], zeros[some])[0]
    assert torch.equal(drawn, tokens[some])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    logits, numbers = torch.zeros(2, 8, device=device), counters(2, device)
    with pytest.raises(ValueError, match=r"temperature is torch.float64 \(2,\), not float32 \[2\]"):
        draw_tokens(logits, torch.ones(2, dtype=torch.float64, device=device), *numbers)
    with pytest.raises(ValueError, match="logits are not contiguous along V"):
        draw_tokens(logits.T.contiguous().T, torch.ones(2, device=device), *numbers)
