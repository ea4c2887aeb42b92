"""How far the engine's log-probabilities are from a trainer's own forward, and how far that is from itself.

The trainer is transformers' model in one of TRL's three modes, on batches laid out as TRL lays them out.
Shapes: B sequences of a batch, T tokens of a padded row, C tokens of the longest completion, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import CheckConfig, EngineConfig
from .errors import ConfigError
from .llm import LLM
from .sampling_params import SamplingParams
from .version import __version__
from .weights.loader import resolve

TrainerMode = Literal["fp32", "bf16", "autocast"]
Logprobs = list[list[float]]
"""log p of each completion token, a list per completion."""

MASK_ABOVE = 3.0
"""TRL's `vllm_importance_sampling_clip_max`: its mode `sequence_mask` drops a completion whose probability under the
trainer is more than this many times that under the sampler. There is no lower bound (`..._clip_min` is None)."""
TRAINER_BATCH = 8
"""Rows of a trainer's forward; TRL's default `per_device_train_batch_size`."""
LONGEST_RANDOM_PROMPT = 64

BUILT_IN_PROMPTS = (
    "Count to ten:",
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May? Let us think step by step.",
    "Übersetze ins Deutsche: The weather is fine today.",
    "Q: What is 17 * 23?\nA:",
    "Once upon a time, in a village at the foot of a mountain that nobody had ever climbed, there lived an old clock "
    "maker who had lost the sense of time. Every morning he opened his shop, and every morning",
    "SELECT name, COUNT(*) FROM",
    "The derivative of x^3 sin(x) with respect to x is",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what was sampled for it, as token ids."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True, slots=True)
class Gap:
    """How one set of log-probabilities differs from another of the same tokens, in nats."""

    mean: float
    """Of |difference| over all tokens, as are the next two."""
    p99: float
    max: float
    kl: float
    """Estimate of KL(first || second) per token, where the tokens are the first's samples: the mean of exp(d) - 1 - d,
    d = log p of the second - log p of the first (k3 of Schulman, "Approximating KL Divergence", 2020)."""
    dropped: int
    """Completions that TRL's `sequence_mask` would drop if the first sampled and the second trained."""

    @classmethod
    def between(cls, sampler: Logprobs, trainer: Logprobs) -> Gap:
        """Return the gap; both hold the same completions."""
        per_sequence = [
            np.subtract(np.array(b, np.float64), np.array(a, np.float64)) for a, b in zip(sampler, trainer, strict=True)
        ]
        d = np.concatenate(per_sequence)
        size = np.abs(d)
        dropped = sum(is_dropped(float(row.sum())) for row in per_sequence)
        kl = float(np.mean(np.expm1(d) - d))
        return cls(float(size.mean()), float(np.quantile(size, 0.99)), float(size.max()), kl, dropped)


def is_dropped(difference: float) -> bool:
    """Return whether `sequence_mask` drops a completion, from the sum of log p (trainer) - log p (sampler)."""
    return difference > math.log(MASK_ABOVE)


class TrainerForward:
    """transformers' model as a TRL trainer computes with it, without gradients."""

    def __init__(self, model: Any, mode: TrainerMode, device: torch.device, *, cast_head: bool) -> None:
        self._model = model
        self._mode = mode
        self._device = device
        if cast_head:
            _cast_head(model, device)

    @classmethod
    def load(cls, folder: Path, mode: TrainerMode, device: torch.device, *, cast_head: bool = False) -> TrainerForward:
        """Return the model of a folder; `cast_head` is TRL's `cast_lm_head_to_fp32`."""
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        return cls(model, mode, device, cast_head=cast_head)

    @torch.no_grad()
    def logprobs(
        self, samples: Sequence[Sample], temperature: float, *, batch_size: int = TRAINER_BATCH, padded: bool = True
    ) -> Logprobs:
        """Return log p of each completion token under the softmax at `temperature`.

        Padded: prompts on the left and completions on the right, to the longest of all samples, as TRL pads a
        generation batch before it cuts it. Not padded: one by one.
        """
        if not padded:
            return [self._batch([sample], temperature, *_widths([sample]))[0] for sample in samples]
        widths = _widths(samples)
        result = []
        for at in range(0, len(samples), batch_size):
            result += self._batch(samples[at : at + batch_size], temperature, *widths)
        return result

    def _batch(
        self, samples: Sequence[Sample], temperature: float, prompt_width: int, completion_width: int
    ) -> Logprobs:
        ids_BT = torch.zeros((len(samples), prompt_width + completion_width), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, sample in enumerate(samples):
            start, end = prompt_width - len(sample.prompt), prompt_width + len(sample.completion)
            ids_BT[row, start:end] = torch.tensor([*sample.prompt, *sample.completion])
            mask_BT[row, start:end] = 1
        ids_BT, mask_BT = ids_BT.to(self._device), mask_BT.to(self._device)
        with self._autocast():
            logits_BCV = self._model(
                input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=completion_width + 1
            ).logits[:, -completion_width - 1 : -1]
        logp_BCV = torch.log_softmax(logits_BCV.float() / temperature, dim=-1)
        logp_BC = logp_BCV.gather(-1, ids_BT[:, prompt_width:, None])[..., 0].tolist()
        return [row[: len(sample.completion)] for row, sample in zip(logp_BC, samples, strict=True)]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._mode != "autocast":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)


def _widths(samples: Sequence[Sample]) -> tuple[int, int]:
    return max(len(sample.prompt) for sample in samples), max(len(sample.completion) for sample in samples)


def _cast_head(model: Any, device: torch.device) -> None:
    """Compute the head in fp32 and outside autocast, from the weights as they are (TRL: `add_fused_lm_head`)."""
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())

    head.forward = forward


# ------------------------------------------------------------------ the command


@dataclass(frozen=True, slots=True)
class Report:
    """What `rolloutd check` found."""

    model: str
    architecture: str
    device: str
    numerics: str
    head_dtype: str
    trainer_dtype: TrainerMode
    cast_lm_head_to_fp32: bool
    temperature: float
    num_sequences: int
    num_tokens: int
    versions: dict[str, str]
    ours: Gap
    """Sampled log-probabilities against the trainer's in padded batches of 8: what TRL compares."""
    ours_unpadded: Gap
    """The same against the trainer one by one, unpadded."""
    ours_scored: Gap
    """Sampled against `score`: our decoding against our own prefill."""
    trainer_batch: Gap
    """The trainer against itself: rows of a batch of 8 against the same rows one by one."""
    trainer_padding: Gap
    """The trainer against itself: one by one, padded against unpadded."""

    @property
    def own_noise(self) -> float:
        """The larger of the trainer's two mean distances from itself."""
        return max(self.trainer_batch.mean, self.trainer_padding.mean)

    def verdict(self) -> str:
        """Return one line: our distance beside the trainer's own."""
        ours, own = self.ours.mean, self.own_noise
        figures = f"mean |difference| {ours:.1e}, the trainer's own {own:.1e}"
        if ours <= own:
            return f"within the trainer's own noise: {figures}"
        times = f"{ours / own:.1f} times" if own > 0 else "more than"
        return f"{times} the trainer's own noise: {figures}"

    def lines(self) -> list[str]:
        """Return the report as text."""
        head = "fp32 head" if self.cast_lm_head_to_fp32 else "head as the rest"
        rows = (
            ("rolloutd - trainer, padded batches", self.ours),
            ("rolloutd - trainer, unpadded", self.ours_unpadded),
            ("rolloutd - rolloutd, sampled - scored", self.ours_scored),
            ("trainer - trainer, batch of 8 - of 1", self.trainer_batch),
            ("trainer - trainer, padded - unpadded", self.trainer_padding),
        )
        versions = "  ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"model     {self.model}  {self.architecture}  on {self.device}  {versions}",
            f"rolloutd  {self.numerics}, {self.head_dtype} head",
            f"trainer   {self.trainer_dtype}, {head}: transformers' forward, batches laid out as TRL's",
            f"samples   {self.num_sequences} completions, {self.num_tokens} tokens, temperature {self.temperature:g}",
            "",
            f"{'|difference| of log p, nats':<38}{'mean':>9}{'p99':>9}{'max':>9}{'KL':>9}  dropped",
            *(_row(name, gap) for name, gap in rows),
            "",
            "KL: mean of exp(d) - 1 - d, d = log p(second) - log p(first), estimates KL(first || second) per token.",
            f"dropped: completions with exp(sum of d) > {MASK_ABOVE:g}, masked by TRL's default, sequence_mask.",
            "",
            f"verdict   {self.verdict()}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict()}


def _row(name: str, gap: Gap) -> str:
    figures = "".join(f"{value:9.1e}" for value in (gap.mean, gap.p99, gap.max, gap.kl))
    return f"{name:<38}{figures}  {gap.dropped:>7}"


def check(engine: EngineConfig, options: CheckConfig) -> Report:
    """Sample with the engine, compute the same log-probabilities as a trainer would, and return how far apart they are.

    The engine is closed before the trainer's model is loaded: only one of them is in memory at a time.
    """
    with LLM(**engine.to_dict()) as llm:
        info = llm.info
        prompts = _prompts(llm, options, engine.seed)
        params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
        outputs = llm.generate(prompts, params)
        samples = [Sample(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]
        sampled = [output.outputs[0].logprobs for output in outputs]
        scored = llm.score(
            [sample.prompt for sample in samples], [sample.completion for sample in samples], options.temperature
        )
    device = torch.device(info.device)
    _free(device)
    mode = trainer_mode(options, info.numerics)
    cast_head = options.cast_lm_head_to_fp32
    if cast_head is None:
        cast_head = engine.head_dtype == "float32"
    folder = resolve(engine.model, engine.revision)
    trainer = TrainerForward.load(folder, mode, device, cast_head=cast_head)
    batched = trainer.logprobs(samples, options.temperature)
    alone = trainer.logprobs(samples, options.temperature, batch_size=1)
    unpadded = trainer.logprobs(samples, options.temperature, padded=False)
    return Report(
        model=engine.model,
        architecture=info.architecture,
        device=info.device,
        numerics=info.numerics,
        head_dtype=info.head_dtype,
        trainer_dtype=mode,
        cast_lm_head_to_fp32=cast_head,
        temperature=options.temperature,
        num_sequences=len(samples),
        num_tokens=sum(len(sample.completion) for sample in samples),
        versions=versions(),
        ours=Gap.between(sampled, batched),
        ours_unpadded=Gap.between(sampled, unpadded),
        ours_scored=Gap.between(sampled, scored),
        trainer_batch=Gap.between(batched, alone),
        trainer_padding=Gap.between(alone, unpadded),
    )


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    import transformers

    return {"rolloutd": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def trainer_mode(options: CheckConfig, numerics: str) -> TrainerMode:
    """Return the trainer's mode; `auto` is the engine's own."""
    if options.trainer_dtype != "auto":
        return options.trainer_dtype
    for mode in ("fp32", "bf16", "autocast"):
        if mode == numerics:
            return mode
    raise ConfigError(f"the engine computes in {numerics}, which no mode of the trainer mirrors. Pass --trainer-dtype.")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -------------------------------------------------------------------- prompts


def _prompts(llm: LLM, options: CheckConfig, seed: int) -> list[list[int]]:
    """Return `num_prompts` prompts as ids: of the file, built-in ones, or random ids where there is no tokenizer."""
    if options.prompts is None and llm.engine.tokenizer is None:
        room = llm.info.max_model_len - options.max_tokens
        if room < 1:
            raise ConfigError(
                f"max_tokens={options.max_tokens} leaves no room for a prompt in max_model_len="
                f"{llm.info.max_model_len}. Lower --max-tokens."
            )
        return random_prompts(llm.info.vocab_size, options.num_prompts, min(room, LONGEST_RANDOM_PROMPT), seed)
    given = list(BUILT_IN_PROMPTS) if options.prompts is None else read_prompts(Path(options.prompts))
    ids = [llm.engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    return [ids[i % len(ids)] for i in range(options.num_prompts)]


def random_prompts(vocab_size: int, count: int, longest: int, seed: int) -> list[list[int]]:
    """Return prompts of random ids and of lengths 1 to `longest`."""
    rng = random.Random(seed)  # noqa: S311  (test data, no secret)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def read_prompts(path: Path) -> list[str | list[int]]:
    """Return the prompts of a file, one a line; `ConfigError` names the line that holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={str(path)!r} cannot be read ({error}).") from None
    parse: Callable[[str, str], str | list[int]] = _parse_json if path.suffix == ".jsonl" else lambda line, where: line
    prompts = [parse(line, f"line {i} of {path}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts={str(path)!r} holds no prompt. Write one a line.")
    return prompts


def _parse_json(line: str, where: str) -> str | list[int]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON ({error}).") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if prompt and (isinstance(prompt, str) or is_ids):
        return prompt  # type: ignore[no-any-return]
    raise ConfigError(
        f'{where} holds no prompt. Write {{"prompt": "text"}} or {{"prompt": [ids]}}; conversations must be rendered '
        "with their chat template first."
    )
