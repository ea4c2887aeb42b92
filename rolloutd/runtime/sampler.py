"""Logits to token ids and both log-probabilities, in one pass.

Order: penalties and `min_tokens` on the logits, temperature, top-k, top-p of what top-k kept, min-p. A row is drawn by
inverting its cumulative distribution at one counter-based uniform number. Shapes: R draws, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rolloutd.engine.sequence import Candidates, Draw, SampledTokens, Sequence

from .philox import uniforms

NEVER = float("-inf")


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
    """Rows with penalties, or too short to stop yet."""


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
        adjusted=tuple((i, draw.sequence) for i, draw in enumerate(draws) if _is_adjusted(draw.sequence)),
    )


def _is_adjusted(sequence: Sequence) -> bool:
    return sequence.group.params.penalises or _may_not_stop(sequence)


def _may_not_stop(sequence: Sequence) -> bool:
    return sequence.num_output < sequence.group.params.min_tokens and bool(sequence.group.stop_token_ids)


def sample(logits_LV: Tensor, inputs: SamplingInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids, full-vocabulary log-probabilities and sampling log-probabilities, [R] each.

    `logits_LV` is fp32 and not changed. Several draws may name one row.
    """
    logits_RV = logits_LV[inputs.logits_row_R]
    full_RV = torch.log_softmax(logits_RV / inputs.temperature_R1, dim=-1)
    drawn_RV = full_RV
    if inputs.adjusted or inputs.truncated:
        drawn_RV = _sampling_distribution(logits_RV, full_RV, inputs)
    token_R1 = _invert_cdf(drawn_RV, inputs.uniform_R1)
    sampling_R1 = drawn_RV.gather(1, token_R1)
    if inputs.any_greedy:
        greedy_R1 = inputs.greedy_R[:, None]
        token_R1 = torch.where(greedy_R1, drawn_RV.argmax(-1, keepdim=True), token_R1)
        sampling_R1 = sampling_R1.masked_fill(greedy_R1, 0.0)
    return token_R1[:, 0], full_RV.gather(1, token_R1)[:, 0], sampling_R1[:, 0]


def _sampling_distribution(logits_RV: Tensor, full_RV: Tensor, inputs: SamplingInputs) -> Tensor:
    """Return log-probabilities after penalties, `min_tokens` and truncation; other rows equal `full_RV`."""
    result_RV = full_RV.clone()
    for row, sequence in inputs.adjusted:
        adjusted_V = _adjust(logits_RV[row], sequence)
        result_RV[row] = torch.log_softmax(adjusted_V / inputs.temperature_R1[row], dim=-1)
    if inputs.truncated:
        rows = torch.tensor(inputs.truncated, device=result_RV.device)
        kept_SV = _truncate(result_RV[rows], inputs.top_k_S1, inputs.top_p_S1, inputs.min_p_S1)
        result_RV[rows] = torch.log_softmax(kept_SV, dim=-1)
    return result_RV


def _adjust(logits_V: Tensor, sequence: Sequence) -> Tensor:
    """Return logits with the sequence's penalties, and its stop ids at -inf while it is too short to stop."""
    params = sequence.group.params
    logits_V = logits_V.clone()
    device = logits_V.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=device)
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        output = torch.tensor(
            sequence.token_ids[len(sequence.group.prompt_token_ids) :], dtype=torch.long, device=device
        )
        counts_V = torch.bincount(output, minlength=logits_V.shape[0])
        logits_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)
    if _may_not_stop(sequence):
        logits_V[[i for i in sequence.group.stop_token_ids if i < logits_V.shape[0]]] = NEVER
    return logits_V


def _truncate(logp_SV: Tensor, top_k_S1: Tensor, top_p_S1: Tensor, min_p_S1: Tensor) -> Tensor:
    """Return `logp_SV` with -inf outside top-k, then top-p of the rest, then min-p; equal logits keep id order.

    top-p keeps the most likely tokens until their share reaches p (Holtzman et al. 2020); min-p keeps what is at
    least that fraction as likely as the most likely token (Nguyen et al. 2024).
    """
    sorted_SV, order_SV = logp_SV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logp_SV.shape[1], device=logp_SV.device)
    keep_SV = rank_V < top_k_S1
    probs_SV = sorted_SV.double().exp().masked_fill(~keep_SV, 0.0)
    before_SV = probs_SV.cumsum(-1) - probs_SV
    # top_p=1 keeps everything whatever the rounding of the sum.
    keep_SV &= (before_SV < top_p_S1 * probs_SV.sum(-1, keepdim=True)) | (top_p_S1 >= 1.0)
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


def to_sampled_tokens(
    tokens: tuple[Tensor, Tensor, Tensor], prompt_logprobs: list[list[float]], candidates: dict[int, Candidates]
) -> SampledTokens:
    """Return the step's answer on the host."""
    token_ids, logprobs, sampling_logprobs = (column.tolist() for column in tokens)
    return SampledTokens(token_ids, logprobs, sampling_logprobs, prompt_logprobs, candidates)
