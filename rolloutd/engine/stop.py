"""When a sequence ends: stop ids, stop strings over token boundaries, lengths."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from rolloutd.outputs import FinishReason

from .sequence import Sequence, StopText

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[Ids[int]], str]
"""Token ids to text, special tokens left out."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended, and its text where a stop string cut it."""

    reason: FinishReason
    stop_reason: int | str | None = None
    text: str | None = None


def check_stop(sequence: Sequence, decode: Decode | None) -> Finish | None:
    """Return why `sequence` ends with its newest token, or None; stop ids precede strings and length."""
    params = sequence.group.params
    may_stop = sequence.num_output >= params.min_tokens
    if may_stop and sequence.token_ids[-1] in sequence.group.stop_token_ids:
        return Finish("stop", sequence.token_ids[-1])
    if params.stop and decode is not None:
        hit = _find_stop_string(sequence, decode)
        if hit is not None and may_stop:
            return hit
    if sequence.num_output >= params.max_tokens:
        return Finish("length")
    return None


def check_new_tokens(sequence: Sequence, token_ids: list[int], decode: Decode | None) -> tuple[Finish | None, int]:
    """Append tokens up to the one that ends `sequence`; return why it ends, or None, and how many were appended.

    The caller has seen to it that only the last of them can be a stop token or reach a length.
    """
    if not (sequence.group.params.stop and decode is not None):
        sequence.token_ids += token_ids
        return check_stop(sequence, decode), len(token_ids)
    for i, token_id in enumerate(token_ids, start=1):
        sequence.token_ids.append(token_id)
        finish = check_stop(sequence, decode)
        if finish is not None:
            return finish, i
    return None, len(token_ids)


def _find_stop_string(sequence: Sequence, decode: Decode) -> Finish | None:
    """Return the end at the first stop string that the newest token completed, the shorter of two that begin together.

    Each one is sought from where it would reach into new text, so that one which came before `min_tokens` stays unseen.
    """
    params = sequence.group.params
    if sequence.text is None:
        sequence.text = StopText()
    state = sequence.text
    text = _decoded(state, sequence, decode)
    searched, state.num_searched = state.num_searched, len(text)
    hits = [(at, stop) for stop in params.stop if (at := text.find(stop, max(0, searched - len(stop) + 1))) >= 0]
    if not hits:
        return None
    at, stop = min(hits)
    return Finish("stop", stop, text[: at + len(stop) if params.include_stop_str_in_output else at])


def _decoded(state: StopText, sequence: Sequence, decode: Decode) -> str:
    """Return the output's text without the bytes of an unfinished character at its end; only new tokens are decoded.

    Those bytes decode to replacement characters, which the token that completes the character changes, so tokens stay
    unread until the text ends with a whole character. Other text does not change with what follows.
    """
    start = len(sequence.group.prompt_token_ids) + state.prefix
    known = decode(sequence.token_ids[start : start + state.read - state.prefix])
    new = decode(sequence.token_ids[start:])[len(known) :]
    whole = new.rstrip(REPLACEMENT)
    if new and len(whole) == len(new):
        state.text += new
        state.prefix, state.read = state.read, sequence.num_output
        return state.text
    return state.text + whole
