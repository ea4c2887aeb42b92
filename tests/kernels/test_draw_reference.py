"""The reference of the draw: Philox in torch, exact distributions over many draws, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rolloutd.kernels.draw import draw_tokens, draw_tokens_reference
from rolloutd.kernels.draw import uniforms as torch_uniforms
from rolloutd.runtime.philox import uniforms
from tests.kernels.draw_oracle import Rows, check_draw, random_rows

VOCAB = 64
NUM_DRAWS = 100_000
LOGITS = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(4))


def draw(num_draws: int, temperature: float, **cuts: float) -> np.ndarray:
    """Return how often each token was drawn from `LOGITS`."""
    zeros = torch.zeros(num_draws, dtype=torch.int64)
    columns = {name: torch.tensor(value).expand(num_draws).contiguous() for name, value in cuts.items()}
    token_R, _, _ = draw_tokens_reference(
        LOGITS.expand(num_draws, -1),
        torch.full((num_draws,), temperature),
        torch.arange(num_draws) + (3 << 40),
        zeros,
        zeros + 17,
        **columns,
    )
    return np.bincount(token_R.numpy(), minlength=VOCAB)


def test_uniform_numbers_are_those_of_numpy() -> None:
    numbers = np.random.default_rng(1).integers(0, 2**64, (3, 2000), dtype=np.uint64)
    numbers[:, 0], numbers[:, 1] = 0, 2**64 - 1
    found = torch_uniforms(*(torch.from_numpy(n.view(np.int64)) for n in numbers))
    assert found.dtype == torch.float64
    assert found.tolist() == uniforms(*numbers).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_softmax(temperature: float) -> None:
    expected = torch.softmax(LOGITS.double() / temperature, -1).numpy() * NUM_DRAWS
    counts = draw(NUM_DRAWS, temperature)
    often = expected > np.sort(expected)[20]  # the others make one class
    pooled = [*counts[often], counts[~often].sum()], [*expected[often], expected[~often].sum()]
    assert chisquare(*pooled).pvalue > 1e-3
    other = torch.softmax(LOGITS.double() / (temperature * 1.03), -1).numpy()
    assert chisquare(counts[often], other[often] / other[often].sum() * counts[often].sum()).pvalue < 1e-3, "can fail"


def test_draws_after_top_k_follow_what_is_kept() -> None:
    counts = draw(20_000, 1.0, top_k_R=7)
    kept = LOGITS.argsort(descending=True)[:7].numpy()
    assert counts.sum() == counts[kept].sum()
    assert chisquare(counts[kept], torch.softmax(LOGITS[kept].double(), -1).numpy() * 20_000).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_token_is_the_one_that_numpy_predicts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = random_rows(200, generator)
    logits = (2 * torch.randn(200, 300, generator=generator)).to(dtype)
    drawn = draw_tokens_reference(logits, *rows.arguments())
    checked, _ = check_draw(logits.float(), rows, [list(range(300))] * 200, drawn)
    assert checked > 195


def test_equal_logits_are_cut_in_the_order_of_ids_whatever_softmax_rounds() -> None:
    logits = torch.full((1, 6), 10.0)
    logits[0, 4] = torch.nextafter(torch.tensor(10.0), torch.tensor(11.0))  # one ulp, lost in a log-softmax
    zeros = torch.zeros(50, dtype=torch.int64)
    rows = Rows(torch.ones(50), torch.arange(50), zeros, zeros)
    token_R, _, _ = draw_tokens_reference(
        logits.expand(50, -1), *rows.arguments(), top_k_R=torch.full((50,), 3), top_p_R=torch.ones(50)
    )
    assert set(token_R.tolist()) == {0, 1, 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_RV": torch.zeros(3)}, r"logits \(3,\) are not \[R, V\]"),
        ({"logits_RV": torch.zeros(3, 0)}, "at least one token"),
        ({"logits_RV": torch.zeros(3, 4, dtype=torch.int32)}, "expected floating point"),
        ({"seed_R": torch.zeros(2, dtype=torch.int64)}, r"seed is \(2,\), expected one entry a row, \[3\]"),
        ({"temperature_R": torch.zeros(3, dtype=torch.float64)}, "temperature is torch.float64"),
        ({"top_k_R": torch.zeros(3, dtype=torch.int32)}, "top_k is torch.int32, expected torch.int64"),
        ({"position_R": torch.zeros(6, dtype=torch.int64)[::2]}, "position is not contiguous"),
    ],
)
def test_draws_name_what_does_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    ints = {name: torch.zeros(3, dtype=torch.int64) for name in ("seed_R", "index_R", "position_R")}
    arguments = {"logits_RV": torch.zeros(3, 4), "temperature_R": torch.ones(3), **ints} | change
    for op in (draw_tokens, draw_tokens_reference):
        with pytest.raises(ValueError, match=message):
            op(**arguments)
