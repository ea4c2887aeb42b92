"""Two-digit addition: a verifiable task, a tokenizer with one token a digit, and a small model that gets it half right.

Shared by the examples; not a script. A problem is the text `47+38=`, its answer `85` and the end token. The model is a
Qwen2 of 0.8M parameters, trained for about a minute on demonstrations of which some are wrong on purpose, so that
reinforcement learning has something to put right.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, END = "<pad>", "<end>"
CHARACTERS = "0123456789+="
MAX_COMPLETION = 4
"""Tokens: up to three digits and the end."""
_SPLIT_SEED = 20_27


@dataclass(frozen=True)
class Problem:
    """One addition."""

    prompt: str
    answer: str


def problem(a: int, b: int) -> Problem:
    """Return the problem a + b."""
    return Problem(f"{a}+{b}=", str(a + b))


def split(num_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Return training problems and held-out ones, the same on every call.

    A sum and its mirror (47+38, 38+47) have one answer, so a pair of numbers is on one side only, in both orders.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random.Random(_SPLIT_SEED).shuffle(pairs)
    held_out: list[Problem] = []
    while len(held_out) < num_held_out:
        held_out += _orders(*pairs.pop())
    train = [one for pair in pairs for one in _orders(*pair)]
    random.Random(_SPLIT_SEED).shuffle(train)
    return train, held_out[:num_held_out]


def _orders(a: int, b: int) -> list[Problem]:
    return [problem(a, b)] if a == b else [problem(a, b), problem(b, a)]


def is_right(completion: str, answer: str) -> bool:
    """Return whether a decoded completion is the answer and nothing else."""
    return completion == answer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a character."""
    vocabulary = {token: i for i, token in enumerate([PAD, END, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, padding_side="left", model_max_length=64
    )


@dataclass(frozen=True)
class Recipe:
    """How the starting model is made; a cache is keyed by it."""

    steps: int = 800
    batch_size: int = 64
    learning_rate: float = 2e-3
    wrong_share: float = 0.35
    hidden: int = 128
    layers: int = 4
    seed: int = 0
    split_seed: int = _SPLIT_SEED
    """Names the split in the key; `split` knows only this one."""


def prepare(cache: Path, recipe: Recipe) -> Path:
    """Return the folder of a model trained by `recipe`, from the cache if it is there."""
    key = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"arithmetic-{key}"
    if not (folder / "config.json").is_file():
        draft = folder.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        pretrain(draft, recipe)
        draft.replace(folder)
    return folder


def pretrain(folder: Path, recipe: Recipe) -> None:
    """Train on demonstrations, `wrong_share` of them wrong, and save model and tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(_config(recipe, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    warm_up = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / recipe.steps))
    )
    train, _ = split(300)
    rng = random.Random(recipe.seed)
    started = time.perf_counter()
    for _ in tqdm(range(recipe.steps), desc="pretrain", disable=None):
        ids, labels = _batch(rng.choices(train, k=recipe.batch_size), recipe.wrong_share, tokenizer, rng)
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    if not sys.stderr.isatty():
        print(f"pretrain: {recipe.steps} steps in {time.perf_counter() - started:.0f} s", flush=True)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=4 * recipe.hidden,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batch(
    problems: list[Problem], wrong_share: float, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels [batch, length], padded on the right; prompts are not trained on."""
    rows, labels = [], []
    for one in problems:
        answer = one.answer if rng.random() >= wrong_share else _wrong(one.answer, rng)
        prompt, completion = tokenizer(one.prompt)["input_ids"], tokenizer(answer)["input_ids"]
        rows.append([*prompt, *completion, tokenizer.eos_token_id])
        labels.append([*[-100] * len(prompt), *completion, tokenizer.eos_token_id])
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    return ids, torch.tensor([row + [-100] * (width - len(row)) for row in labels])


def _wrong(answer: str, rng: random.Random) -> str:
    """Return a near miss: one digit changed."""
    at = rng.randrange(len(answer))
    digit = rng.choice([d for d in "0123456789" if d != answer[at] and (at or d != "0")])
    return answer[:at] + digit + answer[at + 1 :]
