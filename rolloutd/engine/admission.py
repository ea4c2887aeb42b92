"""What can never run is refused before it is queued: by the engine, and already by the front, which has no torch."""

from __future__ import annotations

from rolloutd.errors import MaxModelLen, RequestError, RequestExceedsKvPool, StaleWeights, TokenOutOfRange
from rolloutd.outputs import ModelInfo

from .sequence import Request
from .token_rules import check_tokens


def check_request(request: Request, info: ModelInfo) -> None:
    """Raise the named error of a request that can never run on this model."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise RequestError("the prompt is empty. Send at least one token, such as the beginning-of-sequence id.")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise TokenOutOfRange(
            f"token id {bad} is outside the vocabulary, 0 to {info.vocab_size - 1}. Check the tokenizer."
        )
    check_tokens(params, info)
    total = len(prompt) + params.max_tokens
    if total > info.max_model_len:
        room = info.max_model_len - len(prompt)
        remedy = f"Lower max_tokens to {room}, or" if room > 0 else "Shorten the prompt, or"
        raise MaxModelLen(
            f"prompt of {len(prompt)} tokens + max_tokens {params.max_tokens} = {total} > max_model_len "
            f"{info.max_model_len}. {remedy} start with --max-model-len {total}."
        )
    shared = len(prompt) // info.block_size if params.beam_width else 0
    needed = shared + max(1, params.beam_width) * (-(-total // info.block_size) - shared)
    if needed > info.num_blocks:
        what = f"a search with beam_width={params.beam_width}" if params.beam_width else "one sequence"
        raise RequestExceedsKvPool(
            f"{what} needs up to {needed} blocks of {info.block_size} tokens, the pool has {info.num_blocks}. "
            "Lower max_tokens, or raise --kv-cache-bytes or --gpu-memory-utilization."
        )


def check_version(request: Request, version: int) -> None:
    """Raise `StaleWeights` where a request demands newer weights than serve."""
    if request.min_version > version:
        raise StaleWeights(
            f"the request demands weight version {request.min_version} or newer, {version} serves. Push the weights "
            "first: update_weights or update_lora; the TRL adapter does so after a resume."
        )
