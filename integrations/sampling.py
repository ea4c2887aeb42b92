"""The trainer's sampling options as `SamplingParams`, and a seed for every group of every call."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rolloutd.errors import ConfigError, MaxModelLen, RequestError, did_you_mean
from rolloutd.sampling_params import MAX_N, SamplingParams

log = logging.getLogger(__name__)

_GENERATION_KWARGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "min_tokens",
    "stop",
    "include_stop_str_in_output",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "bad_token_ids",
    "bad_words",
    "logprobs",
)
_REFUSED = {
    "n": "The number of completions is num_generations of the config.",
    "best_of": "The number of completions is num_generations of the config.",
    "seed": "Seeds follow from the config's seed; equal ones would make clones of a group.",
    "max_new_tokens": "Use max_completion_length of the config.",
    "prompt_logprobs": "The trainer does not read them.",
    "logits_processors": "Functions do not travel to the daemon; say the same with logit_bias or allowed_token_ids.",
}


@dataclass(frozen=True)
class Sampling:
    """Options that all requests of a run share."""

    options: Mapping[str, Any]
    """Keywords of `SamplingParams`, without n, seed and max_tokens."""
    max_tokens: int
    run_seed: int

    @classmethod
    def of(cls, trainer: Any, eos_token_ids: Iterable[int]) -> Sampling:
        """Read a trainer's options; `ConfigError` names what cannot be sampled here or not be trained on."""
        kwargs = dict(getattr(trainer.args, "generation_kwargs", None) or {})
        _check_names(kwargs)
        max_tokens = int(kwargs.pop("max_tokens", trainer.max_completion_length))
        if max_tokens > trainer.max_completion_length:
            raise ConfigError(
                f"generation_kwargs max_tokens={max_tokens} > max_completion_length={trainer.max_completion_length}. "
                "Raise max_completion_length instead."
            )
        temperature = kwargs.pop("temperature", trainer.temperature)
        if temperature != trainer.temperature:
            raise ConfigError(
                f"generation_kwargs temperature={temperature} differs from temperature={trainer.temperature}, at "
                "which the trainer recomputes log-probabilities. Set temperature of the config."
            )
        kwargs.pop("logprobs", None)
        stop_ids = [] if kwargs.pop("ignore_eos", False) else list(eos_token_ids)
        stop_ids += SamplingParams(stop_token_ids=kwargs.pop("stop_token_ids", ())).stop_token_ids
        options = {
            "temperature": float(temperature),
            "top_p": _or(trainer.top_p, 1.0),
            "top_k": _or(trainer.top_k, 0),
            "min_p": _or(trainer.min_p, 0.0),
            "repetition_penalty": _or(trainer.repetition_penalty, 1.0),
            **kwargs,
            "stop_token_ids": tuple(dict.fromkeys(stop_ids)),
            "ignore_eos": True,  # the trainer's stop ids decide, not those of the served checkpoint
        }
        try:
            params = SamplingParams(**options, max_tokens=max_tokens)
        except RequestError as error:
            raise ConfigError(f"the trainer's sampling options cannot be used: {error.message}") from None
        if trainer.accelerator.is_main_process:
            _warn(params)
        return cls(options, max_tokens, int(trainer.args.seed))

    def params(self, *, n: int, seed: int, prompt_len: int, max_model_len: int) -> SamplingParams:
        """Return the parameters of one group; `MaxModelLen` where the prompt leaves no room for a token."""
        room = max_model_len - prompt_len
        if room < 1:
            raise MaxModelLen(
                f"a prompt of {prompt_len} tokens fills the daemon's context of {max_model_len}. Shorten the "
                f"prompts, or raise rollout_server_max_model_len above {prompt_len}."
            )
        return SamplingParams(**self.options, n=n, seed=seed, max_tokens=min(self.max_tokens, room))


def _check_names(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name in _REFUSED:
            raise ConfigError(f"generation_kwargs[{name!r}] cannot be set with use_rollout_server. {_REFUSED[name]}")
        if name not in _GENERATION_KWARGS:
            raise ConfigError(
                f"generation_kwargs[{name!r}] is not supported by rolloutd.{did_you_mean(name, _GENERATION_KWARGS)} "
                f"Supported: {', '.join(_GENERATION_KWARGS)}."
            )
        if name == "logprobs" and value not in (None, 0, 1):
            raise ConfigError(f"generation_kwargs['logprobs']={value!r}: only the sampled token's is returned. Use 1.")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _warn(params: SamplingParams) -> None:
    if params.penalises:
        log.warning(
            "repetition, presence and frequency penalties change the sampler only; the trainer's log-probabilities "
            "know nothing of them. Prefer repetition_penalty=1.0"
        )
    if params.logit_bias or params.allowed_token_ids or params.bad_token_ids or params.bad_words:
        log.warning(
            "logit_bias, allowed_token_ids, bad_token_ids and bad_words change the sampler only; the trainer's "
            "log-probabilities know nothing of them"
        )
    if params.stop:
        log.warning("stop strings end a completion without an end-of-sequence id; the trainer counts it as truncated")
    if params.min_tokens:
        log.warning("min_tokens keeps stop ids from being drawn; the trainer's log-probabilities know nothing of it")


@dataclass(frozen=True, slots=True)
class Group:
    """Equal prompts of one call: one request with n samples."""

    prompt: tuple[int, ...]
    positions: tuple[int, ...]
    """Where in the call the prompt stood; sample i answers position i."""


def group_prompts(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Return groups of equal content in the order of their first prompt, at most 1024 samples each."""
    positions: dict[tuple[int, ...], list[int]] = {}
    for at, prompt in enumerate(prompts):
        positions.setdefault(tuple(int(token) for token in prompt), []).append(at)
    return [
        Group(prompt, tuple(places[start : start + MAX_N]))
        for prompt, places in positions.items()
        for start in range(0, len(places), MAX_N)
    ]


def group_seed(*, run_seed: int, weight_version: int, call: int, rank: int, index: int) -> int:
    """Return a 64-bit seed, a function of all five: no two groups of a run share one."""
    key = f"{run_seed} {weight_version} {call} {rank} {index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
