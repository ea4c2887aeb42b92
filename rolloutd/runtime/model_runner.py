"""Batch -> Handle, one step at a time: the handle is the answer itself."""

from __future__ import annotations

import logging
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from rolloutd.config import EngineConfig
from rolloutd.engine.sequence import Batch, Chunk, Handle, SampledTokens
from rolloutd.errors import ConfigError
from rolloutd.models.model import Model, W
from rolloutd.outputs import TopLogprobs
from rolloutd.weights.packing import Precision

from .inputs import ROW_MULTIPLE, ForwardInputs, build_inputs
from .kv_cache import KVCache
from .memory import out_of_memory, release
from .sampler import (
    PromptScores,
    SamplingInputs,
    beam_candidates,
    draw_for,
    sample,
    sampling_inputs,
    to_sampled_tokens,
    top_logprobs,
)

log = logging.getLogger(__name__)

SCORED_ROWS = 512
"""Prompt positions whose logits are held at once while a prompt is scored."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUMERICS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def resolve_device(config: EngineConfig) -> torch.device:
    """Return the device; `ConfigError` where a GPU is asked for and none is seen."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no GPU. Check the driver and the torch build, or use cpu.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def resolve_precision(config: EngineConfig, checkpoint_dtype: str, device: torch.device) -> Precision:
    """Return the rounding points that dtype and numerics ask for; `ConfigError` where they contradict each other."""
    wanted = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "autocast": "bfloat16"}[config.numerics]
    if config.dtype != "auto" and wanted is not None and config.dtype != wanted:
        raise ConfigError(f"numerics={config.numerics!r} computes in {wanted}, but dtype={config.dtype!r}. Drop one.")
    automatic = "float32" if device.type == "cpu" else checkpoint_dtype
    matrix = _DTYPES[wanted or (config.dtype if config.dtype != "auto" else automatic)]
    if device.type == "cpu" and matrix != torch.float32:
        log.warning("dtype=%s on a CPU: without AVX-512 or AMX it is slower than float32", matrix)
    return Precision(
        matrix=matrix,
        residual=torch.float32 if config.numerics == "autocast" else matrix,
        head=torch.float32 if config.head_dtype == "float32" else matrix,
    )


def numerics_name(precision: Precision) -> str:
    """Return `fp32`, `bf16`, `fp16` or `autocast`."""
    if precision.matrix != precision.residual:
        return "autocast"
    return _NUMERICS[precision.matrix]


class ModelRunner(Generic[W]):
    """Computes what the scheduler decided. Holds the weights that serve, and swaps them only as a whole."""

    max_steps = 1

    def __init__(self, model: Model[W], weights: W, precision: Precision, device: torch.device) -> None:
        self._model = model
        self._precision = precision
        self._device = device
        self._draw = draw_for(device)
        self._cache: KVCache | None = None
        self._drawn: SamplingInputs | None = None
        self._weights = weights

    @property
    def weights(self) -> W:
        """What serves. To set it, between two steps, replaces the version as a whole."""
        return self._weights

    @weights.setter
    def weights(self, weights: W) -> None:
        self._weights = self._placed(weights)
        self._model.install(self._weights)

    def relocate(self, weights: W) -> None:
        """Read the same numbers from other memory."""
        self._forget()
        self._weights = weights
        self._model.install(weights)

    def _forget(self) -> None:
        """Drop what holds addresses of the weights; nothing here does."""

    def _placed(self, weights: W) -> W:
        """Return new weights as they will be read."""
        return weights

    def allocate_cache(self, num_blocks: int, block_size: int) -> int:
        """Create the KV cache and return its bytes."""
        dtype = self._precision.matrix
        self._cache = KVCache.allocate(self._model.kv_layers, num_blocks, block_size, dtype, self._device)
        return self._cache.num_bytes

    def free_cache(self) -> None:
        """Drop the KV cache; `allocate_cache` brings it back, empty."""
        self._cache = None
        release(self._device)

    def run(self, batch: Batch) -> Handle:
        """Return what the batch's draws sampled, in their order; `OutOfMemory` where the device has none for it."""
        try:
            return self._compute(batch)
        except torch.OutOfMemoryError as error:
            named = out_of_memory(f"a step of {batch.num_tokens} tokens", error, self._device)
        raise named

    @torch.inference_mode()
    def _compute(self, batch: Batch) -> Handle:
        cache = self._cache
        assert cache is not None, "the KV cache is asleep"
        cache.copy_blocks([copy.source for copy in batch.copies], [copy.target for copy in batch.copies])
        inputs = build_inputs(batch, cache.block_size, self._device)
        hidden_TE = self._forward(inputs)
        prompt = self._score_prompts(batch, inputs, hidden_TE)
        if not batch.draws:
            return to_sampled_tokens(None, prompt, {})
        return self._sample(batch, inputs, hidden_TE, prompt)

    def _forward(self, inputs: ForwardInputs) -> Tensor:
        """Return the hidden state before the head."""
        assert self._cache is not None
        return self._model.forward(self.weights, inputs, self._cache)

    def _sample(self, batch: Batch, inputs: ForwardInputs, hidden_TE: Tensor, prompt: PromptScores) -> SampledTokens:
        chunk_of_draw = [draw.chunk_index for draw in batch.draws]
        drawn_chunks = sorted(set(chunk_of_draw))
        row_of_chunk = {chunk: row for row, chunk in enumerate(drawn_chunks)}
        rows = inputs.output_row_of_chunk[drawn_chunks]
        takes_first_rows = np.array_equal(rows, np.arange(len(rows)))  # to gather them would copy them
        hidden_LE = hidden_TE[: len(rows)] if takes_first_rows else hidden_TE[torch.from_numpy(rows).to(self._device)]
        logits_LV = self._logits(hidden_LE)
        logits_row = np.array([row_of_chunk[chunk] for chunk in chunk_of_draw], np.int64)
        sizes = len(drawn_chunks), self._model.vocab_size
        drawn = self._drawn = sampling_inputs(batch.draws, logits_row, *sizes, self._device, self._drawn)
        samples = sample(logits_LV, drawn, self._draw)
        return to_sampled_tokens(samples, prompt, beam_candidates(batch.draws, logits_row, logits_LV))

    def _logits(self, hidden_LE: Tensor) -> Tensor:
        """Return fp32 logits of a few rows, computed in a number of rows that keeps their bits."""
        num_rows = hidden_LE.shape[0]
        padding = -num_rows % ROW_MULTIPLE
        if padding:
            hidden_LE = torch.nn.functional.pad(hidden_LE, (0, 0, 0, padding))
        return self._model.logits(self.weights, hidden_LE)[:num_rows].float()

    def _score_prompts(self, batch: Batch, inputs: ForwardInputs, hidden_TE: Tensor) -> PromptScores:
        """Return log p of each prompt token that follows one of a chunk's, where the group asked for it."""
        scores = PromptScores([[] for _ in batch.chunks], {})
        if not any(chunk.sequence.group.scores_prompt for chunk in batch.chunks):
            return scores
        last = inputs.last_row_of_chunk.tolist()
        for i, (chunk, last_row) in enumerate(zip(batch.chunks, last, strict=True)):
            if chunk.sequence.group.scores_prompt:
                scores.logprobs[i], top = self._score(chunk, last_row - chunk.length + 1, hidden_TE)
                if top is not None:
                    scores.top[i] = top
        return scores

    def _score(self, chunk: Chunk, first_row: int, hidden_TE: Tensor) -> tuple[list[float], TopLogprobs | None]:
        group = chunk.sequence.group
        targets = group.prompt_token_ids[chunk.start + 1 : chunk.end + 1]
        temperature = group.params.temperature or 1.0
        num_top = group.params.num_prompt_top_logprobs
        scores: list[float] = []
        top = TopLogprobs.empty(num_top) if num_top else None
        for at in range(0, len(targets), SCORED_ROWS):
            part = torch.tensor(targets[at : at + SCORED_ROWS], device=self._device)
            hidden = hidden_TE[first_row + at : first_row + at + len(part)]
            logp_RV = torch.log_softmax(self._logits(hidden) / temperature, dim=-1)
            scores += logp_RV.gather(1, part[:, None])[:, 0].tolist()
            if top is not None:
                top.extend(top_logprobs(logp_RV, num_top))
        return scores, top
