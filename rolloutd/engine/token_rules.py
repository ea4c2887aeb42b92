"""A request's bias, allowed and forbidden tokens: checked against the vocabulary, and flat for the runner."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Collection, Iterable

from rolloutd.errors import RequestError, TokenOutOfRange
from rolloutd.outputs import ModelInfo
from rolloutd.sampling_params import SamplingParams

from .sequence import TokenRules

Tokenise = Callable[[str], list[int]]
"""Text to ids, without the special tokens that begin a prompt."""


def check_tokens(params: SamplingParams, info: ModelInfo, single_words: Iterable[int] = ()) -> None:
    """Raise the named error of ids outside the vocabulary, and of options that leave no token to draw."""
    fields = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_token_ids": params.bad_token_ids,
    }
    for name, token_ids in fields.items():
        _check_range(name, token_ids, info.vocab_size)
    allowed: Collection[int] = params.allowed_token_ids or range(info.vocab_size)
    what = "allowed_token_ids" if params.allowed_token_ids else "the vocabulary"
    forbidden = {*params.bad_token_ids, *single_words}
    if all(token_id in forbidden for token_id in allowed):
        raise RequestError(f"bad_token_ids and bad_words forbid all of {what}: no token could be drawn. Forbid fewer.")
    stop_ids = params.all_stop_token_ids(info.eos_token_ids)
    forbidden |= stop_ids
    if params.min_tokens and all(token_id in forbidden for token_id in allowed):
        raise RequestError(
            f"min_tokens={params.min_tokens} forbids stop tokens, and what is left of {what} holds no other: stop "
            f"ids {sorted(stop_ids)[:8]}. Allow a token that does not stop, or use min_tokens=0."
        )


def bad_word_ids(words: Iterable[str], tokenise: Tokenise, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences that spell each word, at the start of a text and with a space before it."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        plain = tuple(tokenise(word.lstrip()))
        spaced = tuple(tokenise(" " + word.lstrip()))
        _check_range(f"bad_words {word!r}", (*plain, *spaced), vocab_size)
        found[plain] = None
        if spaced[-len(plain) :] != plain:  # else whoever writes the space is stopped before the word's last token
            found[spaced] = None
    return tuple(found)


def token_rules(params: SamplingParams, words: tuple[tuple[int, ...], ...]) -> TokenRules | None:
    """Return the rules of a request, None where it has none; equal options share one object."""
    if not (params.logit_bias or params.allowed_token_ids or params.bad_token_ids or words):
        return None
    bias = tuple((params.logit_bias or {}).items())
    return _shared_rules(bias, params.allowed_token_ids, params.bad_token_ids, words)


@functools.lru_cache(maxsize=256)
def _shared_rules(
    bias: tuple[tuple[int, float], ...],
    allowed: tuple[int, ...] | None,
    bad: tuple[int, ...],
    words: tuple[tuple[int, ...], ...],
) -> TokenRules:
    return TokenRules(
        bias_ids=array("q", [token_id for token_id, _ in bias]),
        bias=array("f", [amount for _, amount in bias]),
        allowed=array("q", allowed) if allowed is not None else None,
        banned=array("q", sorted({*bad, *(word[0] for word in words if len(word) == 1)})),
        bad_words=tuple(word for word in words if len(word) > 1),
    )


def _check_range(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    outside = [token_id for token_id in token_ids if token_id >= vocab_size]
    if outside:
        raise TokenOutOfRange(
            f"{name}: token id {outside[0]} is outside the vocabulary, 0 to {vocab_size - 1}. Check the tokenizer."
        )
