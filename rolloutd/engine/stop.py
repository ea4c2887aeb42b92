"""When a sequence ends: stop ids, stop strings over token boundaries, lengths."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from rolloutd.outputs import FinishReason

from .sequence import Sequence, StopText

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


def _find_stop_string(sequence: Sequence, decode: Decode) -> Finish | None:
    """Decode what is new and search it, together with as much old text as a stop string can reach back."""
    stops = sequence.group.params.stop
    if sequence.text is None:
        sequence.text = StopText()
    state = sequence.text
    output = sequence.token_ids[len(sequence.group.prompt_token_ids) :]
    searched = len(state.text)
    _extend(state, output, decode)
    start = max(0, searched - max(map(len, stops)) + 1)
    hits = [(at, stop) for stop in stops if (at := state.text.find(stop, start)) >= 0]
    if not hits:
        return None
    at, stop = min(hits)
    return Finish("stop", stop, state.text[:at])


def _extend(state: StopText, output: list[int], decode: Decode) -> None:
    """Append the text of new tokens; bytes of an unfinished character wait for the token that completes it."""
    before = decode(output[state.prefix : state.read])
    now = decode(output[state.prefix :])
    if len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
        state.text += now[len(before) :]
        state.prefix, state.read = state.read, len(output)
