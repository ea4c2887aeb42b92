"""How near each family's decoder is to transformers, in each mode, beside the trainer's own noise: the measuring part.

`docs/conformance_page.py` writes what this measures to docs/conformance.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from rolloutd import LLM, SamplingParams
from rolloutd.check import Gap, Sample, TrainerForward, TrainerMode
from rolloutd.errors import ModelUnsupported
from tests.conformance.fallback_models import FAMILIES, build_fallback
from tests.tiny_models import build

MODES: tuple[TrainerMode, ...] = get_args(TrainerMode)
SHAPE: dict[str, Any] = {"hidden": 128, "layers": 3, "head_dim": 32, "vocab": 512, "tie": True}
MAX_TOKENS = 16
ALIGNED, ODD = (32, 48, 64, 80, 48, 64), (25, 41, 53, 70, 37, 59)
"""Lengths of prompt and completion together. Of whole KV blocks, a decoding row attends over as many keys as the
trainer's unpadded row; of others over up to 15 masked ones more, and fp32 sums over keys are taken in another order."""
FALLBACKS = (
    "gpt_neox",
    "cohere2",
    "starcoder2",
    "phi",
    "nemotron",
    "glm4",
    "vaultgemma",
    "deepseek_v3",
    "olmoe",
    "granitemoe",
)
"""Kinds that run by transformers' own code. Not among them: those with learned positions (GPT-2, OPT), where TRL's
padding moves a trainer's own numbers by 0.5 nats, or not at all."""


@dataclass(frozen=True)
class Row:
    """One family in one mode; each gap in nats per token."""

    kind: str
    architecture: str
    mode: TrainerMode
    aligned: Gap
    """Decoding against the trainer's unpadded forward, lengths of whole blocks."""
    odd: Gap
    """The same, other lengths."""
    scored: Gap
    """`LLM.score`, a prefill, against the trainer's unpadded forward, all lengths."""
    padded: Gap
    """Decoding against the trainer's forward as TRL batches it: rows of 8, padded; all lengths."""
    trainer_batch: Gap
    """The trainer against itself: rows of a batch of 8 against the same rows alone."""
    trainer_padding: Gap
    """The trainer against itself: padded against unpadded."""

    @property
    def own_noise(self) -> float:
        return max(self.trainer_batch.mean, self.trainer_padding.mean)


FP32_MAX = 2e-5
"""Largest |difference| of any token in fp32."""
MEAN_LIMIT: dict[TrainerMode, float] = {"fp32": 2e-6, "bf16": 5e-3, "autocast": 2e-3}
"""Of `aligned` and `scored`, where nothing but the kernels' order of summation may differ."""
NOISE_FACTOR = 1.5
"""Of `odd` and `padded`: at most this many times the trainer's mean distance from itself."""


def failures(row: Row) -> list[str]:
    """Return what of a row is beyond its limit, one line each."""
    where = f"{row.kind} {row.mode}"
    found = [
        f"{where}: {name} has mean {gap.mean:.1e}, limit {MEAN_LIMIT[row.mode]:.0e}"
        for name, gap in (("aligned", row.aligned), ("scored", row.scored))
        if not gap.mean <= MEAN_LIMIT[row.mode]
    ]
    found += [
        f"{where}: {name} has mean {gap.mean:.1e}, the trainer's own is {row.own_noise:.1e}"
        for name, gap in (("odd", row.odd), ("padded", row.padded))
        if not gap.mean <= NOISE_FACTOR * row.own_noise
    ]
    largest = [gap.max for gap in (row.aligned, row.odd, row.scored, row.padded)]
    if row.mode == "fp32" and not all(value <= FP32_MAX for value in largest):
        found.append(f"{where}: a token differs by one of {largest}, limit {FP32_MAX:.0e}")
    return found


def rows_of(kinds: tuple[str, ...], model: Callable[..., Path]) -> Iterator[Row]:
    """Yield the rows of the kinds that the engine serves; `model(kind, **shape)` returns a folder."""
    for kind in kinds:
        try:
            for mode in MODES:
                yield measure(kind, model(kind, **SHAPE), mode)
        except ModelUnsupported:
            continue


def model_of(folder: Path) -> Callable[..., Path]:
    """Return a builder of models under `folder`, native kinds and others, each once."""

    def model(kind: str, **options: Any) -> Path:
        out_dir = folder / kind
        if out_dir.exists():
            return out_dir
        return build_fallback(kind, out_dir, FAMILIES[kind]) if kind in FALLBACKS else build(kind, out_dir, **options)

    return model


def prompts_of(lengths: tuple[int, ...], *, vocab: int, seed: int) -> list[list[int]]:
    """Return random prompts that leave room for the completion."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length - MAX_TOKENS)] for length in lengths]


def measure(kind: str, folder: Path, mode: TrainerMode) -> Row:
    """Return the row of a model in a folder; `ModelUnsupported` where the engine does not serve it."""
    prompts = prompts_of((*ALIGNED, *ODD), vocab=SHAPE["vocab"], seed=1)
    with LLM(str(folder), numerics=mode, max_model_len=128, max_num_seqs=16) as llm:
        architecture = llm.info.architecture
        outputs = llm.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
        samples = [Sample(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]
        sampled = [output.outputs[0].logprobs for output in outputs]
        scored = llm.score(prompts, [sample.completion for sample in samples])
    trainer = TrainerForward.load(folder, mode, torch.device("cpu"))
    batched = trainer.logprobs(samples, 1.0)
    alone = trainer.logprobs(samples, 1.0, batch_size=1)
    unpadded = trainer.logprobs(samples, 1.0, padded=False)
    cut = len(ALIGNED)
    return Row(
        kind=kind,
        architecture=architecture,
        mode=mode,
        aligned=Gap.between(sampled[:cut], unpadded[:cut]),
        odd=Gap.between(sampled[cut:], unpadded[cut:]),
        scored=Gap.between(scored, unpadded),
        padded=Gap.between(sampled, batched),
        trainer_batch=Gap.between(batched, alone),
        trainer_padding=Gap.between(alone, unpadded),
    )
