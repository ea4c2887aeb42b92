"""Logits as requests want them: penalties, bias, the caller's processors, then what is forbidden.

Each step over many rows is a few tensor operations: rows of one `TokenRules` go together, and what differs from row to
row is gathered into flat lists of (row, token). Shapes: A adjusted rows, V vocabulary, G rows of one group, F such
pairs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from rolloutd.engine.sequence import Sequence, TokenRules
from rolloutd.errors import RequestError, RolloutdError

NEVER = float("-inf")


def may_be_adjusted(sequence: Sequence) -> bool:
    """Return whether `is_adjusted` may hold at some token of a sequence."""
    return _is_always_adjusted(sequence) or sequence.group.params.min_tokens > 0


def is_adjusted(sequence: Sequence) -> bool:
    """Return whether the next token's logits are not the model's own."""
    return _is_always_adjusted(sequence) or _may_not_stop(sequence)


def _is_always_adjusted(sequence: Sequence) -> bool:
    params = sequence.group.params
    return params.penalises or sequence.group.rules is not None or bool(params.logits_processors)


def adjust(logits_AV: Tensor, sequences: Many[Sequence]) -> dict[int, RolloutdError]:
    """Change the rows in place; return those that nothing can be drawn from, by number, with the reason.

    Their logits become 0, so that the rows around them can be drawn in one go. What is forbidden is so whatever a
    processor returns.
    """
    _penalise(logits_AV, sequences)
    rows_of_rules = _rows_of_rules(sequences, logits_AV.device)
    for rules, rows_G1 in rows_of_rules:
        if rules.bias:
            logits_AV[rows_G1, _ids(rules.bias_ids, logits_AV)] += _values(rules.bias, logits_AV)
    failures = _process(logits_AV, sequences)
    for rules, rows_G1 in rows_of_rules:
        _forbid(logits_AV, rows_G1, rules)
    _forbid_pairs(logits_AV, sequences)
    dead_A = logits_AV.amax(-1).isneginf()
    for row in dead_A.nonzero()[:, 0].tolist():
        failures.setdefault(row, _nothing_left(sequences[row]))
    if failures:
        logits_AV[list(failures)] = 0.0
    return failures


def _may_not_stop(sequence: Sequence) -> bool:
    return sequence.num_output < sequence.group.params.min_tokens and bool(sequence.group.stop_token_ids)


def _penalise(logits_AV: Tensor, sequences: Many[Sequence]) -> None:
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []
    counted: list[tuple[int, np.ndarray, np.ndarray]] = []
    for row, sequence in enumerate(sequences):
        params = sequence.group.params
        if params.repetition_penalty != 1.0:
            ids = np.array(sorted(set(sequence.token_ids)), np.int64)
            seen.append((row, ids, np.full(len(ids), params.repetition_penalty)))
        if (params.presence_penalty or params.frequency_penalty) and sequence.num_output:
            ids, counts = np.unique(np.array(sequence.output_token_ids, np.int64), return_counts=True)
            counted.append((row, ids, params.presence_penalty + params.frequency_penalty * counts))
    if seen:
        rows_F, ids_F, penalty_F = _flat(seen, logits_AV)
        values_F = logits_AV[rows_F, ids_F]
        logits_AV[rows_F, ids_F] = torch.where(values_F > 0, values_F / penalty_F, values_F * penalty_F)
    if counted:
        rows_F, ids_F, amount_F = _flat(counted, logits_AV)
        logits_AV[rows_F, ids_F] -= amount_F


def _flat(parts: list[tuple[int, np.ndarray, np.ndarray]], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, token and value of each entry; no (row, token) comes twice."""
    rows = np.repeat([row for row, _, _ in parts], [len(ids) for _, ids, _ in parts])
    ids = np.concatenate([ids for _, ids, _ in parts])
    values = np.concatenate([values for _, _, values in parts]).astype(np.float32)
    return (
        torch.from_numpy(rows).to(like.device),
        torch.from_numpy(ids).to(like.device),
        torch.from_numpy(values).to(like.device),
    )


def _rows_of_rules(sequences: Many[Sequence], device: torch.device) -> list[tuple[TokenRules, Tensor]]:
    """Return each set of rules with its rows, [G, 1]."""
    rows: dict[TokenRules, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if sequence.group.rules is not None:
            rows.setdefault(sequence.group.rules, []).append(row)
    return [(rules, torch.tensor(many, device=device)[:, None]) for rules, many in rows.items()]


def _ids(flat: array[int], like: Tensor) -> Tensor:
    return torch.from_numpy(np.frombuffer(flat, np.int64)).to(like.device)


def _values(flat: array[float], like: Tensor) -> Tensor:
    return torch.from_numpy(np.frombuffer(flat, np.float32)).to(like.device)


def _process(logits_AV: Tensor, sequences: Many[Sequence]) -> dict[int, RolloutdError]:
    """Put what the processors return in place of their rows; return the rows where they failed."""
    failures: dict[int, RolloutdError] = {}
    for row, sequence in enumerate(sequences):
        if not sequence.group.params.logits_processors:
            continue
        try:
            logits_AV[row] = _processed(logits_AV[row].clone(), sequence)
        except RequestError as error:
            failures[row] = error
    return failures


def _processed(logits_V: Tensor, sequence: Sequence) -> Tensor:
    for i, processor in enumerate(sequence.group.params.logits_processors):
        name = f"logits_processors[{i}] ({getattr(processor, '__name__', type(processor).__name__)})"
        where = f"of request {sequence.group.request_id!r}, after {sequence.num_output} tokens,"
        try:
            result = processor(sequence.output_token_ids, logits_V)
        except Exception as error:  # the caller's own code: whatever it raises ends this request, not the step
            raise RequestError(f"{name} {where} raised {type(error).__name__}: {error}") from error
        fault = _fault(result, logits_V)
        if fault:
            raise RequestError(f"{name} {where} returned {fault}. Return fp32 logits of the shape that came in.")
        logits_V = result
    return logits_V


def _fault(result: object, logits_V: Tensor) -> str:
    """Return what is wrong with a processor's answer, or nothing."""
    if not isinstance(result, Tensor):
        return f"a {type(result).__name__}, not a tensor"
    if result.shape != logits_V.shape or result.dtype != logits_V.dtype or result.device != logits_V.device:
        return f"{result.dtype} {list(result.shape)} on {result.device}, not {logits_V.dtype} {list(logits_V.shape)}"
    highest = result.amax().item()  # NaN if there is one
    if highest != highest:
        return "NaN"
    return {float("inf"): "+inf", NEVER: "-inf for every token"}.get(highest, "")


def _forbid(logits_AV: Tensor, rows_G1: Tensor, rules: TokenRules) -> None:
    if rules.allowed is not None:
        allowed = _ids(rules.allowed, logits_AV)
        kept = logits_AV[rows_G1, allowed]
        logits_AV[rows_G1[:, 0]] = NEVER
        logits_AV[rows_G1, allowed] = kept
    if rules.banned:
        logits_AV[rows_G1, _ids(rules.banned, logits_AV)] = NEVER


def _forbid_pairs(logits_AV: Tensor, sequences: Many[Sequence]) -> None:
    """Forbid stop tokens where it is too early for them, and the last tokens of bad words that have begun."""
    rows: list[int] = []
    ids: list[int] = []
    for row, sequence in enumerate(sequences):
        forbidden = _last_tokens_of_words(sequence)
        if _may_not_stop(sequence):
            forbidden += [token_id for token_id in sequence.group.stop_token_ids if token_id < logits_AV.shape[1]]
        rows += [row] * len(forbidden)
        ids += forbidden
    if rows:
        at = torch.tensor([rows, ids], device=logits_AV.device)
        logits_AV[at[0], at[1]] = NEVER


def _last_tokens_of_words(sequence: Sequence) -> list[int]:
    rules = sequence.group.rules
    if rules is None or not rules.bad_words:
        return []
    longest = max(map(len, rules.bad_words)) - 1
    end = tuple(sequence.token_ids[-min(longest, sequence.num_output) :]) if sequence.num_output else ()
    return [word[-1] for word in rules.bad_words if end[max(0, len(end) - len(word) + 1) :] == word[:-1]]


def _nothing_left(sequence: Sequence) -> RequestError:
    return RequestError(
        f"request {sequence.group.request_id!r} has no token left to draw after {sequence.num_output} tokens: "
        "allowed_token_ids, bad_token_ids, bad_words, min_tokens and logits_processors forbid all. Forbid fewer."
    )
