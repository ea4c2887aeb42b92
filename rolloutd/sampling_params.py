"""How one request is sampled. The names are vLLM's, so that existing scripts read the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

LogitsProcessor: TypeAlias = "Callable[[list[int], Tensor], Tensor]"
"""(ids of the output so far, its next token's logits [V], fp32) -> the logits to go on with, of the same shape. It may
write into the tensor that it is given."""

MAX_N = 1024
"""Most samples of one prompt. Integers from outside are capped before anything is multiplied by them."""
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_LEN = 1024
MAX_TOKENS = 1 << 24
MAX_BEAM_WIDTH = 256
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_LISTED_TOKENS = 16384
"""Entries of allowed_token_ids and of bad_token_ids."""
MAX_BAD_WORDS = 256
MAX_LOGITS_PROCESSORS = 16
_LAST_ID = (1 << 31) - 1
_LENGTHS = {
    "stop": MAX_STOP_STRINGS,
    "stop_token_ids": MAX_STOP_STRINGS,
    "bad_words": MAX_BAD_WORDS,
    "allowed_token_ids": MAX_LISTED_TOKENS,
    "bad_token_ids": MAX_LISTED_TOKENS,
    "logits_processors": MAX_LOGITS_PROCESSORS,
}
_NOT_WITH_BEAMS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "stop",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "bad_token_ids",
    "bad_words",
    "logits_processors",
    "prompt_logprobs",
    "group_token_budget",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Validated sampling options of one request; errors are `RequestError`s that name the field."""

    n: int = 1
    """Completions of the prompt, 1 to 1024. They share one prefill."""
    temperature: float = 1.0
    """Divides the logits. 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities add up to at least this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen so far (Keskar et al. 2019, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that is in the output, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once for each occurrence in the output, -2 to 2."""
    max_tokens: int = 16
    """Most tokens of a completion. 0 only together with `prompt_logprobs`."""
    min_tokens: int = 0
    """Stop tokens cannot be drawn, and stop strings do not count, before this many tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the text is cut before the first one, the tokens are kept. Special tokens have no
    text, and the bytes of a character that is not complete match nothing."""
    include_stop_str_in_output: bool = False
    """Cut the text after the stop string, not before it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Do not stop at the model's own end-of-sequence ids."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id -> what is added to its logit, -100 to 100; up to 1,024 tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these can be drawn."""
    bad_token_ids: tuple[int, ...] = ()
    """These can never be drawn. They win over `allowed_token_ids`."""
    bad_words: tuple[str, ...] = ()
    """Strings that the tokens of a completion never spell, at the start of a word or inside it: the last token of a
    word's own tokenisation cannot be drawn where those before it stand. Another way to spell the word is not seen."""
    logits_processors: tuple[LogitsProcessor, ...] = ()
    """Functions from (output ids, logits) to logits, called in order after penalties and bias. What is forbidden stays
    so whatever they return. `LLM` only: functions do not travel to a daemon."""
    seed: int | None = None
    """Same seed, same prompt, same logits: same tokens. None draws one per request from the engine's seed."""
    beam_width: int = 0
    """Beams of a beam search, which returns the n best completions; 0 samples instead."""
    length_penalty: float = 1.0
    """Of a beam search: the score is the sum of log-probabilities / length ** length_penalty."""
    early_stopping: bool = False
    """Of a beam search: end with the first beam_width complete ones, not when no better one can come."""
    group_token_budget: int | None = None
    """Most tokens of all n completions together; what is unfinished then ends as `length`."""
    logprobs: int | None = None
    """The sampled token's log-probabilities are always returned; None, 0 and 1 all mean just that. 2 to 20 also returns
    so many of the most likely tokens, as `top_logprobs`."""
    prompt_logprobs: int | None = None
    """0 or 1: also return the log-probability of every prompt token. 2 to 20: and so many of the most likely tokens."""

    def __post_init__(self) -> None:
        _set = object.__setattr__
        _set(self, "stop", _as_tuple("stop", self.stop, str))
        _set(self, "bad_words", _as_tuple("bad_words", self.bad_words, str))
        _set(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids, int))
        _set(self, "bad_token_ids", _as_set("bad_token_ids", self.bad_token_ids))
        if self.allowed_token_ids is not None:
            _set(self, "allowed_token_ids", _as_set("allowed_token_ids", self.allowed_token_ids))
        _set(self, "logits_processors", _as_functions(self.logits_processors))
        _set(self, "logit_bias", _as_bias(self.logit_bias))
        if self.top_k == -1:
            _set(self, "top_k", 0)
        self._check_integers()
        self._check_floats()
        self._check_lists()
        self._check_tokens()
        self._check_beams()

    def _check_integers(self) -> None:
        _integer("n", self.n, 1, MAX_N, "Split larger groups over several requests.")
        _integer("top_k", self.top_k, 0, MAX_TOKENS, "0 or -1 keeps all tokens.")
        lowest = 0 if self.prompt_logprobs is not None else 1
        _integer("max_tokens", self.max_tokens, lowest, MAX_TOKENS, "Ask for at least one token.")
        if self.max_tokens == 0 and self.n != 1:
            raise RequestError(f"n={self.n} with max_tokens=0 scores the same prompt {self.n} times. Use n=1.")
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens, "It cannot exceed max_tokens.")
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1, "Use a 64-bit integer.")
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS, "It counts the most likely tokens.")
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS, "It counts the most likely tokens.")
        if self.group_token_budget is not None:
            _integer("group_token_budget", self.group_token_budget, 1, MAX_TOKENS * MAX_N, "None sets no limit.")
        for name in ("ignore_eos", "early_stopping", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} is not a bool. Use True or False.")

    def _check_floats(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0, "0 is greedy, 1 is the model's own distribution.")
        if 0.0 < self.temperature < 1e-4:
            raise RequestError(
                f"temperature={self.temperature} overflows the logits. Use 0 for greedy, or 1e-4 and up."
            )
        _number("top_p", self.top_p, 0.0, 1.0, "1 keeps all tokens.")
        if self.top_p == 0.0:
            raise RequestError("top_p=0.0 keeps no token. Use temperature=0 for greedy, or a value in (0, 1].")
        _number("min_p", self.min_p, 0.0, 1.0, "0 keeps all tokens.")
        _number("repetition_penalty", self.repetition_penalty, 1e-2, 100.0, "1 is off.")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, "0 is off.")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "0 is off.")

    def _check_lists(self) -> None:
        for name, most in _LENGTHS.items():
            value = getattr(self, name)
            if value is not None and len(value) > most:
                raise RequestError(f"{name} has {len(value)} entries; at most {most} are allowed. Pass fewer.")
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not 0 < len(text) <= MAX_STOP_STRING_LEN:
                    raise RequestError(
                        f"{name} holds a string of {len(text)} characters; 1 to {MAX_STOP_STRING_LEN} are allowed."
                    )
        for text in self.bad_words:
            if not text.strip():
                raise RequestError(f"bad_words holds {text!r}, which is no word. Use bad_token_ids for white space.")

    def _check_tokens(self) -> None:
        for name in ("stop_token_ids", "bad_token_ids", "allowed_token_ids"):
            token_ids = getattr(self, name)
            for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
                _integer(name, token_id, 0, _LAST_ID, "Pass token ids.")
        if self.allowed_token_ids is None:
            return
        if not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: no token could be drawn. None allows all.")
        if set(self.allowed_token_ids) <= set(self.bad_token_ids):
            raise RequestError("bad_token_ids holds all of allowed_token_ids: no token could be drawn. Allow another.")

    def _check_beams(self) -> None:
        _integer("beam_width", self.beam_width, 0, MAX_BEAM_WIDTH, "0 samples instead of searching.")
        _number("length_penalty", self.length_penalty, -10.0, 10.0, "1 divides by the length, 0 is off.")
        if not self.beam_width:
            return
        if self.n > self.beam_width:
            raise RequestError(f"n={self.n} > beam_width={self.beam_width}. A search returns at most its beams.")
        if self.num_top_logprobs:
            raise RequestError(f"logprobs={self.logprobs} does not go with beam_width={self.beam_width}. Use 1.")
        if self.num_top_logprobs:
            raise RequestError(f"logprobs={self.logprobs} does not go with beam_width={self.beam_width}. Use 1.")
        for name in _NOT_WITH_BEAMS:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise RequestError(
                    f"{name}={getattr(self, name)!r} does not go with beam_width={self.beam_width}: a beam search "
                    f"follows the model's own distribution. Leave {name} out."
                )

    @property
    def truncates(self) -> bool:
        """True where the sampling distribution keeps only part of the vocabulary."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def penalises(self) -> bool:
        """True where the logits depend on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def all_stop_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Return the request's own stop ids and, unless it ignores them, the model's end-of-sequence ids."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)

    @property
    def num_top_logprobs(self) -> int:
        """Most likely tokens to return with each sampled one: 0, or 2 and more."""
        return _several(self.logprobs)

    @property
    def num_prompt_top_logprobs(self) -> int:
        """Most likely tokens to return with each one of the prompt: 0, or 2 and more."""
        return _several(self.prompt_logprobs)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters named in `values`; an unknown name is an error with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(
                    f"unknown sampling parameter {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, as plain values that `from_dict` takes back.

        Logits processors have no plain form: a `RequestError`.
        """
        if self.logits_processors:
            raise RequestError(
                "logits_processors are functions and do not travel to a daemon. Use LLM, or say the same with "
                "logit_bias, allowed_token_ids or bad_token_ids."
            )
        values: dict[str, Any] = {}
        for name, one in type(self).__dataclass_fields__.items():
            value = getattr(self, name)
            if value != one.default:
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


def _several(count: int | None) -> int:
    return count if count is not None and count > 1 else 0


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, kind) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            if not isinstance(item, kind) or isinstance(item, bool):
                raise RequestError(f"{name} holds {short(item)}; every entry must be {kind.__name__}.")
        return tuple(value)
    raise RequestError(f"{name}={short(value)} is not a {kind.__name__} or a list of them.")


def _as_set(name: str, value: Any) -> tuple[int, ...]:
    """Return distinct ids in order."""
    return tuple(sorted(set(_as_tuple(name, value, int))))


def _as_functions(value: Any) -> tuple[LogitsProcessor, ...]:
    many = () if value is None else (value,) if callable(value) else value
    if not isinstance(many, (list, tuple)):
        raise RequestError(f"logits_processors={short(value)} is not a function or a list of them.")
    for item in many:
        if not callable(item):
            raise RequestError(f"logits_processors holds {short(item)}, which cannot be called. Pass functions.")
    return tuple(many)


def _as_bias(value: Any) -> dict[int, float] | None:
    """Return a copy with integer keys, in order of the ids; None for an empty one. JSON's keys are decimal strings."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias={short(value)} is not a mapping from token ids to numbers.")
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed. Pass fewer.")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 12 else key
        _integer("logit_bias of token", token_id, 0, _LAST_ID, "Pass token ids.")
        _number(f"logit_bias[{token_id}]", amount, -100.0, 100.0, "0 changes nothing.")
        bias[token_id] = float(amount)
    return dict(sorted(bias.items())) or None


def _integer(name: str, value: Any, low: int, high: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name}={value!r} is not an integer. {remedy}")
    if not low <= value <= high:
        raise RequestError(f"{name}={value} is outside {low} to {high}. {remedy}")


def _number(name: str, value: Any, low: float, high: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name}={value!r} is not a number. {remedy}")
    if not math.isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name}={value} is outside {low:g} to {high:g}. {remedy}")
