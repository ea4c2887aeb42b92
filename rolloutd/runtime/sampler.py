"""Logits to token ids and both log-probabilities, in one pass.

Order: what `logits.py` does to the logits, then as `kernels/draw.py` says: temperature, top-k, top-p of what top-k
kept, min-p, and one counter-based uniform number a row. Shapes: R draws, S truncated ones, A adjusted ones, V
vocabulary, P positions, K most likely tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rolloutd.engine.sequence import Candidates, Draw, SampledTokens, Sequence
from rolloutd.errors import RolloutdError
from rolloutd.kernels.draw import draw_tokens, draw_tokens_reference
from rolloutd.outputs import NO_TOKEN, TopLogprobs

from .cpu_kernels import MAX_VOCAB, CpuKernels, cpu_kernels
from .logits import NEVER, adjust, is_adjusted, may_be_adjusted

DrawTokens = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`draw_tokens` of kernels/draw.py, or its reference."""


@dataclass(frozen=True)
class SamplingInputs:
    """Per draw: where its logits are, and how it samples. Rows that need more than a temperature are listed apart."""

    sequences: list[Sequence]
    logits_row_R: Tensor
    takes_all_rows: bool
    """Draw i is from row i of the logits, and there are no more: to gather them would copy them."""
    temperature_R: Tensor
    """0 for greedy rows."""
    seed_R: Tensor
    """The bits of an unsigned integer, as the next two."""
    index_R: Tensor
    position_R: Tensor
    truncated: tuple[int, ...]
    top_k_S: Tensor
    """For the rows in `truncated`; the vocabulary size where off."""
    top_p_S: Tensor
    min_p_S: Tensor
    may_be_adjusted: tuple[tuple[int, Sequence], ...]
    """Rows whose logits are not always the model's own."""
    adjusted: tuple[tuple[int, Sequence], ...]
    """Those of them whose logits are not so now."""
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
    draws: tuple[Draw, ...],
    logits_row: np.ndarray,
    num_logits: int,
    vocab_size: int,
    device: torch.device,
    previous: SamplingInputs | None = None,
) -> SamplingInputs:
    """Return the draws' parameters as tensors; draw i is from row `logits_row[i]` of `num_logits`.

    What does not change from step to step is taken from `previous`, where that was for the same sequences.
    """
    sequences = [draw.sequence for draw in draws]

    def column(values: list[int] | list[float], dtype: type[np.generic]) -> Tensor:
        array = np.array(values, dtype)
        return torch.from_numpy(array.view(np.int64) if dtype is np.uint64 else array).to(device)

    logits_row_R = torch.from_numpy(logits_row).to(device)
    takes_all_rows = num_logits == len(draws) and bool((logits_row == np.arange(num_logits)).all())
    position_R = column([len(sequence.token_ids) for sequence in sequences], np.uint64)
    known = previous if previous is not None and previous.sequences == sequences else None
    rows = enumerate(sequences)
    candidates = tuple(row for row in rows if may_be_adjusted(row[1])) if known is None else known.may_be_adjusted
    adjusted = tuple((i, sequence) for i, sequence in candidates if is_adjusted(sequence))
    if known is not None:
        return replace(
            known,
            logits_row_R=logits_row_R,
            takes_all_rows=takes_all_rows,
            position_R=position_R,
            adjusted=adjusted,
        )
    params = [sequence.group.params for sequence in sequences]
    truncated = tuple(i for i, p in enumerate(params) if p.truncates and p.temperature > 0.0)
    kept = [params[i] for i in truncated]
    top: dict[int, list[int]] = {}
    for i, p in enumerate(params):
        if p.num_top_logprobs:
            top.setdefault(p.num_top_logprobs, []).append(i)

    return SamplingInputs(
        sequences=sequences,
        logits_row_R=logits_row_R,
        takes_all_rows=takes_all_rows,
        temperature_R=column([p.temperature for p in params], np.float32),
        seed_R=column([sequence.group.seed for sequence in sequences], np.uint64),
        index_R=column([sequence.index for sequence in sequences], np.uint64),
        position_R=position_R,
        truncated=truncated,
        top_k_S=column([min(p.top_k, vocab_size) or vocab_size for p in kept], np.int64),
        top_p_S=column([p.top_p for p in kept], np.float32),
        min_p_S=column([p.min_p for p in kept], np.float32),
        may_be_adjusted=candidates,
        adjusted=adjusted,
        top=top,
    )


def draw_for(device: torch.device) -> DrawTokens:
    """Return what draws on this device: the kernel on a GPU, our C on a CPU, the reference where that is not there."""
    if device.type == "cuda":
        return draw_tokens
    kernels = cpu_kernels()
    return draw_tokens_reference if kernels is None else partial(_draw_on_cpu, kernels)


def _draw_on_cpu(
    kernels: CpuKernels, logits_RV: Tensor, *keys: Tensor, **cuts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `draw_tokens` does; rows that are truncated are drawn by the reference."""
    if cuts or logits_RV.dtype != torch.float32 or logits_RV.stride(-1) != 1 or logits_RV.shape[1] > MAX_VOCAB:
        return draw_tokens_reference(logits_RV, *keys, **cuts)
    return kernels.draw(logits_RV, *keys)


def sample(logits_LV: Tensor, inputs: SamplingInputs, draw: DrawTokens = draw_tokens_reference) -> Samples:
    """Return what the rows draw. `logits_LV` is fp32 and not changed. Several draws may name one row."""
    logits_RV = logits_LV if inputs.takes_all_rows else logits_LV[inputs.logits_row_R]
    adjusted_RV, failures = _adjusted(logits_RV, inputs)
    keys = (inputs.temperature_R, inputs.seed_R, inputs.index_R, inputs.position_R)
    token_R, logprob_R, sampling_logprob_R = draw(adjusted_RV, *keys)
    if inputs.truncated:
        rows = torch.tensor(inputs.truncated, device=token_R.device)
        cuts = {"top_k_R": inputs.top_k_S, "top_p_R": inputs.top_p_S, "min_p_R": inputs.min_p_S}
        again = draw(adjusted_RV[rows], *(key[rows] for key in keys), **cuts)
        token_R[rows], logprob_R[rows], sampling_logprob_R[rows] = again
    if inputs.adjusted:
        rows = torch.tensor([row for row, _ in inputs.adjusted], device=token_R.device)
        logprob_R[rows] = _full_logp(logits_RV, rows, inputs).gather(1, token_R[rows, None])[:, 0]
    top = _top_by_row(logits_RV, inputs, token_R, logprob_R)
    return Samples(token_R, logprob_R, sampling_logprob_R, top, failures)


def _adjusted(logits_RV: Tensor, inputs: SamplingInputs) -> tuple[Tensor, dict[int, RolloutdError]]:
    """Return the logits that tokens are drawn from, and the rows that failed."""
    if not inputs.adjusted:
        return logits_RV, {}
    numbers = [row for row, _ in inputs.adjusted]
    rows = torch.tensor(numbers, device=logits_RV.device)
    logits_AV = logits_RV[rows]
    failed = adjust(logits_AV, [sequence for _, sequence in inputs.adjusted])
    return logits_RV.index_copy(0, rows, logits_AV), {numbers[i]: error for i, error in failed.items()}


def _full_logp(logits_RV: Tensor, rows: Tensor, inputs: SamplingInputs) -> Tensor:
    """Return the log-softmax of the model's own logits of some rows, at their temperatures; greedy rows at 1."""
    temperature_S1 = inputs.temperature_R[rows, None]
    return torch.log_softmax(logits_RV[rows] / torch.where(temperature_S1 > 0, temperature_S1, 1.0), dim=-1)


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


def _top_by_row(
    logits_RV: Tensor, inputs: SamplingInputs, token_R: Tensor, logprob_R: Tensor
) -> dict[int, TopLogprobs]:
    """Return the most likely tokens of the rows that ask for them.

    Where the drawn token is among them it has one number: that of the whole row, which `logprob_R` gets too.
    """
    found: dict[int, TopLogprobs] = {}
    for k, rows in inputs.top.items():
        at = torch.tensor(rows, device=logits_RV.device)
        logp_SV = _full_logp(logits_RV, at, inputs)
        logprob_R[at] = logp_SV.gather(1, token_R[at, None])[:, 0]
        many = top_logprobs(logp_SV, k)
        for i, row in enumerate(rows):
            cut = slice(i * k, i * k + k)
            found[row] = TopLogprobs(k, many.token_ids[cut], many.logprobs[cut])
    return found


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
