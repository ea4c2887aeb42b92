"""What leaves the engine: completions, weight updates, and facts about the model and its load."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: a stop token or string; `length`: max_tokens or the context is full; `abort`: cancelled."""


NO_TOKEN = -1
"""In flat arrays of top log-probabilities: no such token."""


@dataclass(frozen=True, slots=True)
class TopLogprobs(Sequence[list[tuple[int, float]]]):
    """The k most likely tokens of several positions. `top[t]` lists position t's (token id, log p), likeliest first.

    Both arrays are flat, k entries a position. A position without a prediction (the first of a prompt) has an empty
    list, one over a vocabulary smaller than k a shorter one. `dict(top[t])` finds a token's log p.
    """

    k: int
    token_ids: array[int]
    """int32; `NO_TOKEN` where there is none."""
    logprobs: array[float]
    """float32, in nats."""

    @classmethod
    def empty(cls, k: int, *, num_positions: int = 0) -> TopLogprobs:
        """Return positions without a prediction."""
        return cls(k, array("i", [NO_TOKEN]) * (k * num_positions), array("f", [float("-inf")]) * (k * num_positions))

    def extend(self, other: TopLogprobs, *, skip: int = 0) -> None:
        """Append the positions of `other` after its first `skip`."""
        assert other.k == self.k, "all positions hold the same number of tokens"
        self.token_ids.extend(other.token_ids[skip * self.k :])
        self.logprobs.extend(other.logprobs[skip * self.k :])

    def __len__(self) -> int:
        return len(self.token_ids) // self.k

    @overload
    def __getitem__(self, at: int) -> list[tuple[int, float]]: ...

    @overload
    def __getitem__(self, at: slice) -> list[list[tuple[int, float]]]: ...

    def __getitem__(self, at: int | slice) -> list[tuple[int, float]] | list[list[tuple[int, float]]]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        start = range(len(self))[at] * self.k
        pairs = zip(self.token_ids[start : start + self.k], self.logprobs[start : start + self.k], strict=True)
        return [(token_id, logprob) for token_id, logprob in pairs if token_id != NO_TOKEN]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sampled completion. The four per-token lists have equal length."""

    index: int
    """Which of the request's n samples, from 0."""
    token_ids: list[int]
    """Sampled ids; an end-of-sequence or stop token, where one was sampled, is the last."""
    text: str
    """The ids decoded without special tokens, cut before a stop string (after it with `include_stop_str_in_output`);
    empty where there is no tokenizer."""
    logprobs: list[float]
    """log p of each token under the full-vocabulary softmax at the sampling temperature (1 where greedy), in nats."""
    sampling_logprobs: list[float]
    """log p of each token under the distribution it was drawn from, in nats: after penalties, bias, processors, allowed
    and forbidden tokens, temperature, top-k, top-p and min-p."""
    finish_reason: FinishReason
    stop_reason: int | str | None
    """The stop token id or stop string that ended it, None for other ends."""
    weight_versions: list[int]
    """The weight version that sampled each token."""
    beam_score: float | None = None
    """Of a beam search: sum of log-probabilities / length ** length_penalty."""
    top_logprobs: TopLogprobs | None = None
    """The most likely tokens at each position, in the distribution that `logprobs` speak of; only where the parameter
    `logprobs` is 2 or more."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The final answer to one request: its n completions in the order of their index."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[float] | None
    """log p of each prompt token given those before it (the first is NaN), where `prompt_logprobs` was asked for."""
    prompt_top_logprobs: TopLogprobs | None = None
    """The most likely tokens at each position of the prompt; only where `prompt_logprobs` is 2 or more."""


@dataclass(frozen=True, slots=True)
class FinishedCompletion:
    """A completion as it leaves the engine, the moment it ends."""

    request_id: str
    completion: CompletionOutput
    is_last: bool
    """True for the last completion of its request."""
    prompt_logprobs: list[float] | None
    prompt_top_logprobs: TopLogprobs | None = None


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """A committed update."""

    version: int
    """The weight version that now serves."""
    digest: str
    """16 hex digits over the sorted (name, tensor digest) pairs that were sent."""
    num_tensors: int
    num_bytes: int
    """Bytes that travelled."""
    seconds: float
    """From the first byte to the flip, as seen by the caller."""
    parity: float | None = None
    """Mean |log p - the trainer's log p| that the update's probe found, in nats; None without a probe."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a client must know of the model that is served."""

    model: str
    architecture: str
    model_impl: str
    """Whose code computes the decoder: native or transformers."""
    dtype: str
    """Storage of the matrices: float32, bfloat16 or float16."""
    numerics: str
    """Where values are rounded: fp32, bf16, fp16 or autocast."""
    head_dtype: str
    """Where logits are computed, and how the head is stored."""
    device: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    weight_bytes: int
    kv_cache_bytes: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the start (totals) and the load of this moment."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    prefill_tokens: int = 0
    """Prompt (and recomputed) tokens that went through the model."""
    decode_tokens: int = 0
    """Tokens computed one at a time for a sequence."""
    sampled_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache or from a sibling's prefill."""
    prefix_queries: int = 0
    """Tokens that were looked up in the prefix cache."""
    prefix_hits: int = 0
    """Tokens of those that were found."""
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    """Blocks that hold reusable prefixes and belong to no live sequence."""
    block_copies: int = 0
    peak_blocks_used: int = 0
    weight_version: int = 0
    weight_digest: str = ""
    """Of the update that serves, as it was answered; empty while the checkpoint serves."""
    num_updates: int = 0
    update_bytes: int = 0
    num_adapters: int = 0
    """That are kept beside the policy."""
    step_s: float = 0.0
    """Seconds in steps: of the time in which there was work, what is left is messages and updates."""
    longest_pause_s: float = 0.0
    """Between two steps with work to do, since the last update began: how long it kept tokens waiting."""
    num_out_of_memory: int = 0
    """Steps that the device had no memory for; each was tried again as several smaller ones."""
