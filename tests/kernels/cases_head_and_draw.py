"""head_and_draw as a kernel: its logits' rounding points, and the token that numpy predicts from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolloutd.kernels.draw import draw_tokens_reference
from rolloutd.kernels.head_and_draw import head_and_draw, head_and_draw_reference
from tests.kernels.draw_oracle import Rows, check_draw, random_rows

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


def whole_numbers(generator: torch.Generator, rows: int, vocab_size: int, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Return hidden rows and a head whose products are exact in any order, up to the rounding of the sum."""
    hidden = torch.randint(-8, 9, (rows, hidden_size), generator=generator) / 4
    head = torch.randint(-8, 9, (vocab_size, hidden_size), generator=generator) / 16
    return hidden, head


def rounded_logits(hidden: Tensor, head: Tensor, divisor: float, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """Return float64 logits, rounded to `dtype` after each step."""
    logits = (hidden.double() @ head.double().T).to(dtype)
    if divisor != 1.0:
        logits = (logits.double() / divisor).to(dtype)
    if softcap is not None:
        logits = ((logits.double() / softcap).to(dtype).double().tanh().to(dtype).double() * softcap).to(dtype)
    return logits.double()


@pytest.mark.parametrize("shape", [(1, 5, 1), (3, 300, 40), (64, 129, 100), (7, 128, 64)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_token_is_the_one_that_numpy_predicts(
    device: torch.device, generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num_rows, vocab_size, hidden_size = shape
    hidden, head = whole_numbers(generator, num_rows, vocab_size, hidden_size)
    rows = random_rows(num_rows, generator)
    padded = torch.full((vocab_size, hidden_size + 3), NAN, dtype=dtype)
    padded[:, :hidden_size] = head
    found = head_and_draw(hidden.to(device), padded.to(device)[:, :hidden_size], *rows.arguments(device))
    logits = rounded_logits(hidden, head, 1.0, None, dtype)
    checked, _ = check_draw(logits, rows, [list(range(vocab_size))] * num_rows, found)
    assert checked >= num_rows - 1


@pytest.mark.parametrize(("divisor", "softcap"), [(3.0, None), (1.0, 5.0), (1.7, 2.5)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_logits_are_rounded_after_each_step(
    device: torch.device, generator: torch.Generator, divisor: float, softcap: float | None, dtype: torch.dtype
) -> None:
    hidden, head = whole_numbers(generator, 6, 140, 48)
    rows = random_rows(6, generator)
    options = {"logits_divisor": divisor, "logits_softcap": softcap}
    logits = rounded_logits(hidden, head, divisor, softcap, dtype)
    found = head_and_draw(hidden.to(device), head.to(device, dtype), *rows.arguments(device), **options)
    assert check_draw(logits, rows, [list(range(140))] * 6, found)[0] >= 5
    reference = head_and_draw_reference(hidden, head.to(dtype), *rows.arguments(), **options)
    assert check_draw(logits, rows, [list(range(140))] * 6, reference)[0] >= 5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of maxima of NaN in the interpreter
def test_greedy_padding_and_rows_of_nan(device: torch.device, generator: torch.Generator) -> None:
    hidden, head = whole_numbers(generator, 4, 200, 32)
    hidden[1] = hidden[2] = NAN
    rows = Rows(torch.tensor([0.0, -1.0, 1.0, 0.8]), *torch.ones(3, 4, dtype=torch.int64).unbind())
    found = head_and_draw(hidden.to(device), head.to(device), *rows.arguments(device))
    want = draw_tokens_reference(hidden @ head.T, *rows.arguments())
    assert found[0].tolist() == want[0].tolist()
    for column, expected in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(column.cpu(), expected, atol=2e-6, rtol=0, equal_nan=True)
    assert found[1][1] == 0.0
    assert found[1][2].isnan()


def test_a_row_has_the_bits_that_it_has_alone(device: torch.device, generator: torch.Generator) -> None:
    hidden = torch.randn(20, 50, generator=generator).to(device)
    head = torch.randn(150, 50, generator=generator).to(device)
    arguments = random_rows(20, generator).arguments(device)
    together = head_and_draw(hidden, head, *arguments)
    alone = head_and_draw(hidden[17:18], head, *(a[17:18] for a in arguments))
    for whole, one in zip(together, alone, strict=True):
        assert torch.equal(whole[17:18], one)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    rows = random_rows(65, torch.Generator()).arguments(device)
    with pytest.raises(ValueError, match="65 rows, at most 64"):
        head_and_draw(torch.zeros(65, 4, device=device), torch.zeros(9, 4, device=device), *rows)
    with pytest.raises(ValueError, match=r"are not \[R, E\] and \[V, E\]"):
        head_and_draw_reference(torch.zeros(65, 4), torch.zeros(9, 5), *(r.cpu() for r in rows))
