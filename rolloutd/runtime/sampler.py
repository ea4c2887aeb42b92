"""Logits to token ids and both log-probabilities, in one pass.

Order: what `logits.py` does to the logits, temperature, top-k, top-p of what top-k kept, min-p. A row is drawn by
inverting its cumulative distribution at one counter-based uniform number. Shapes: R draws, V vocabulary, P positions,
K most likely tokens.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rolloutd.engine.sequence import Candidates, Draw, SampledTokens, Sequence
from rolloutd.errors import RolloutdError
from rolloutd.outputs import NO_TOKEN, TopLogprobs

from .logits import NEVER, adjust, is_adjusted
from .philox import uniforms


@dataclass(frozen=True)
class SamplingInputs:
    """Per draw: where its logits are, and how it samples. Rows that need more than a temperature are listed apart."""

    logits_row_R: Tensor
    temperature_R1: Tensor
    """1 for greedy rows."""
    greedy_R: Tensor
    uniform_R1: Tensor
    """In [0, 1), float64."""
    any_greedy: bool
    truncated: tuple[int, ...]
    top_k_S1: Tensor
    """For the rows in `truncated`; the vocabulary size where off."""
    top_p_S1: Tensor
    min_p_S1: Tensor
    adjusted: tuple[tuple[int, Sequence], ...]
    """Rows whose logits are not the model's own."""
    top: dict[int, list[int]]
    """Number of most likely tokens -> the rows that ask for so many."""


@dataclass(frozen=True)
class Samples:
    """What `sample` drew, by row."""

    token_R: Tensor
    logprob_R: Tensor
    """Under the full-vocabulary softmax at the sampling temperature."""
    sampling_logprob_R: Tensor
    """Under the distribution that the token was drawn from."""
    top: dict[int, TopLogprobs]
    """One position each, for the rows that ask for it."""
    failures: dict[int, RolloutdError]
    """Rows that could not be drawn; their tokens mean nothing."""


def sampling_inputs(
    draws: tuple[Draw, ...], logits_row: np.ndarray, vocab_size: int, device: torch.device
) -> SamplingInputs:
    """Return the draws' parameters as tensors."""
    params = [draw.sequence.group.params for draw in draws]
    temperature = np.array([p.temperature for p in params], np.float32)
    greedy = temperature == 0.0
    uniform = uniforms(
        np.array([draw.sequence.group.seed for draw in draws], np.uint64),
        np.array([draw.sequence.index for draw in draws], np.uint64),
        np.array([len(draw.sequence.token_ids) for draw in draws], np.uint64),
    )
    truncated = tuple(i for i, p in enumerate(params) if p.truncates and p.temperature > 0.0)
    kept = [params[i] for i in truncated]
    top: dict[int, list[int]] = {}
    for i, p in enumerate(params):
        if p.num_top_logprobs:
            top.setdefault(p.num_top_logprobs, []).append(i)

    def column(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)[:, None]

    return SamplingInputs(
        logits_row_R=torch.from_numpy(logits_row).to(device),
        temperature_R1=column(np.where(greedy, np.float32(1.0), temperature)),
        greedy_R=torch.from_numpy(greedy).to(device),
        uniform_R1=column(uniform),
        any_greedy=bool(greedy.any()),
        truncated=truncated,
        top_k_S1=column(np.array([min(p.top_k, vocab_size) or vocab_size for p in kept], np.int64)),
        top_p_S1=column(np.array([p.top_p for p in kept], np.float64)),
        min_p_S1=column(np.array([p.min_p for p in kept], np.float32)),
        adjusted=tuple((i, draw.sequence) for i, draw in enumerate(draws) if is_adjusted(draw.sequence)),
        top=top,
    )


def sample(logits_LV: Tensor, inputs: SamplingInputs) -> Samples:
    """Return what the rows draw. `logits_LV` is fp32 and not changed. Several draws may name one row."""
    logits_RV = logits_LV[inputs.logits_row_R]
    full_RV = torch.log_softmax(logits_RV / inputs.temperature_R1, dim=-1)
    drawn_RV = full_RV
    failures: dict[int, RolloutdError] = {}
    if inputs.adjusted or inputs.truncated:
        drawn_RV, failures = _sampling_distribution(logits_RV, full_RV, inputs)
    token_R1 = _invert_cdf(drawn_RV, inputs.uniform_R1)
    sampling_R1 = drawn_RV.gather(1, token_R1)
    if inputs.any_greedy:
        greedy_R1 = inputs.greedy_R[:, None]
        token_R1 = torch.where(greedy_R1, drawn_RV.argmax(-1, keepdim=True), token_R1)
        sampling_R1 = sampling_R1.masked_fill(greedy_R1, 0.0)
    logprob_R = full_RV.gather(1, token_R1)[:, 0]
    return Samples(token_R1[:, 0], logprob_R, sampling_R1[:, 0], _top_by_row(full_RV, inputs.top), failures)


def _sampling_distribution(
    logits_RV: Tensor, full_RV: Tensor, inputs: SamplingInputs
) -> tuple[Tensor, dict[int, RolloutdError]]:
    """Return log-probabilities of adjusted logits after truncation, and the rows that failed; other rows are equal."""
    result_RV = full_RV.clone()
    failures: dict[int, RolloutdError] = {}
    if inputs.adjusted:
        numbers = [row for row, _ in inputs.adjusted]
        rows = torch.tensor(numbers, device=result_RV.device)
        logits_AV = logits_RV[rows]
        failed = adjust(logits_AV, [sequence for _, sequence in inputs.adjusted])
        failures = {numbers[i]: error for i, error in failed.items()}
        result_RV[rows] = torch.log_softmax(logits_AV / inputs.temperature_R1[rows], dim=-1)
    if inputs.truncated:
        rows = torch.tensor(inputs.truncated, device=result_RV.device)
        kept_SV = _truncate(result_RV[rows], inputs.top_k_S1, inputs.top_p_S1, inputs.min_p_S1)
        result_RV[rows] = torch.log_softmax(kept_SV, dim=-1)
    return result_RV, failures


def top_logprobs(logp_PV: Tensor, k: int) -> TopLogprobs:
    """Return the k most likely tokens of each position, equal ones in the order of their ids."""
    num_positions, vocab_size = logp_PV.shape
    values_PK, ids_PK = logp_PV.topk(min(k, vocab_size), dim=-1)
    ids_PK, order_PK = ids_PK.sort(dim=-1)
    values_PK, by_value_PK = values_PK.gather(1, order_PK).sort(dim=-1, descending=True, stable=True)
    ids = np.full((num_positions, k), NO_TOKEN, np.int32)
    values = np.full((num_positions, k), NEVER, np.float32)
    ids[:, :vocab_size] = ids_PK.gather(1, by_value_PK).cpu().numpy()
    values[:, :vocab_size] = values_PK.cpu().numpy()
    return TopLogprobs(k, array("i", ids.tobytes()), array("f", values.tobytes()))


def _top_by_row(full_RV: Tensor, top: dict[int, list[int]]) -> dict[int, TopLogprobs]:
    found: dict[int, TopLogprobs] = {}
    for k, rows in top.items():
        many = top_logprobs(full_RV[rows], k)
        for i, row in enumerate(rows):
            at = slice(i * k, i * k + k)
            found[row] = TopLogprobs(k, many.token_ids[at], many.logprobs[at])
    return found


def _truncate(logp_SV: Tensor, top_k_S1: Tensor, top_p_S1: Tensor, min_p_S1: Tensor) -> Tensor:
    """Return `logp_SV` with -inf outside top-k, then top-p of the rest, then min-p; equal logits keep id order.

    top-p keeps the most likely tokens until their share reaches p (Holtzman et al. 2020); min-p keeps what is at
    least that fraction as likely as the most likely token (Nguyen et al. 2024).
    """
    sorted_SV, order_SV = logp_SV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logp_SV.shape[1], device=logp_SV.device)
    keep_SV = rank_V < top_k_S1
    probs_SV = sorted_SV.double().exp().masked_fill(~keep_SV, 0.0)
    up_to_SV = probs_SV.cumsum(-1)
    # Not `sum`, whose order depends on the number of rows: a single long row is cut between threads.
    # top_p=1 keeps everything whatever the rounding of the sum.
    keep_SV &= (up_to_SV - probs_SV < top_p_S1 * up_to_SV[:, -1:]) | (top_p_S1 >= 1.0)
    keep_SV &= sorted_SV >= sorted_SV[:, :1] + min_p_S1.log()
    return torch.full_like(logp_SV, NEVER).scatter(1, order_SV, sorted_SV.masked_fill(~keep_SV, NEVER))


def _invert_cdf(logp_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """Return, per row, the first token whose cumulative probability exceeds the uniform number; sums are float64."""
    cdf_RV = logp_RV.exp().cumsum(-1, dtype=torch.float64)
    target_R1 = uniform_R1 * cdf_RV[:, -1:]
    return torch.searchsorted(cdf_RV, target_R1, right=True).clamp_(max=logp_RV.shape[1] - 1)


def beam_candidates(draws: tuple[Draw, ...], logits_row: np.ndarray, logits_LV: Tensor) -> dict[int, Candidates]:
    """Return, for each draw of a beam, its most likely next tokens and their log-probabilities, in order."""
    result: dict[int, Candidates] = {}
    for i, draw in enumerate(draws):
        beam = draw.sequence.group.beam
        if beam is not None:
            logp_V = torch.log_softmax(logits_LV[logits_row[i]], dim=-1)
            top = logp_V.topk(min(beam.num_candidates, logp_V.shape[0]))
            result[i] = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return result


@dataclass(frozen=True)
class PromptScores:
    """For each chunk of a batch, log p of the prompt's tokens that follow; the most likely ones by chunk number."""

    logprobs: list[list[float]]
    top: dict[int, TopLogprobs]


def to_sampled_tokens(
    samples: Samples | None, prompt: PromptScores, candidates: dict[int, Candidates]
) -> SampledTokens:
    """Return the step's answer on the host; `samples` is None where nothing was drawn."""
    if samples is None:
        return SampledTokens([], [], [], prompt.logprobs, prompt_top_logprobs=prompt.top)
    return SampledTokens(
        token_ids=samples.token_R.tolist(),
        logprobs=samples.logprob_R.tolist(),
        sampling_logprobs=samples.sampling_logprob_R.tolist(),
        prompt_logprobs=prompt.logprobs,
        candidates=candidates,
        top_logprobs=samples.top,
        prompt_top_logprobs=prompt.top,
        failures=samples.failures,
    )
