"""Rows to draw from, and what must be drawn from them: float64 numpy, and the Philox of the engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rolloutd.runtime.philox import uniforms

MARGIN = 1e-6
"""Of a cumulative probability: sums in fp32 and in float64 may fall on two sides of a number nearer than this."""


@dataclass(frozen=True)
class Rows:
    """What decides a draw of each row, besides its logits."""

    temperature: Tensor
    seed: Tensor
    index: Tensor
    position: Tensor

    def arguments(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return tuple(t.to(device) for t in (self.temperature, self.seed, self.index, self.position))

    def uniform(self) -> np.ndarray:
        return uniforms(*(t.numpy().view(np.uint64) for t in (self.seed, self.index, self.position)))


def random_rows(count: int, generator: torch.Generator) -> Rows:
    """Return rows at temperatures from 0.3 to 1.8; seeds take all 64 bits."""
    seed = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    index, position = torch.randint(0, 2**20, (2, count), generator=generator)
    return Rows(0.3 + 1.5 * torch.rand(count, generator=generator), seed, index, position)


def kept_tokens(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int] | None:
    """Return the tokens that truncation keeps of one row; None if a sum is too near to p, or a share to min_p."""
    z = (logits - logits.max()) / temperature
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k or len(order)]
    share = np.exp(z[order])
    before = (np.cumsum(share) - share) / share.sum()
    if top_p < 1.0:
        if np.abs(before - top_p).min() < MARGIN:
            return None
        order = order[before < top_p]
    if min_p > 0.0:
        if np.abs(np.exp(z[order]) - min_p).min() < MARGIN:
            return None
        order = order[np.exp(z[order]) >= min_p]
    return sorted(int(i) for i in order)


def check_draw(
    logits: Tensor, rows: Rows, kept: list[list[int] | None], drawn: tuple[Tensor, Tensor, Tensor]
) -> tuple[int, int]:
    """Assert that tokens and log-probabilities are right; return how many rows were checked, and how many not."""
    checked = 0
    token_R, logprob_R, sampling_R = (t.cpu() for t in drawn)
    for row, u in enumerate(rows.uniform()):
        support = kept[row]
        if support is None:
            continue
        z = logits[row].double().cpu().numpy() / float(rows.temperature[row])
        full = z - z.max() - np.log(np.exp(z - z.max()).sum())
        weights = np.zeros_like(z)
        weights[support] = np.exp(full[support])
        cdf = np.cumsum(weights) / weights.sum()
        if np.abs(cdf - u).min() < MARGIN:
            continue
        checked += 1
        token = int(np.searchsorted(cdf, u, side="right"))
        assert int(token_R[row]) == token, f"row {row} at {u}"
        np.testing.assert_allclose(float(logprob_R[row]), full[token], atol=3e-6)
        np.testing.assert_allclose(float(sampling_R[row]), full[token] - np.log(weights.sum()), atol=3e-6)
    return checked, len(kept) - checked
