"""`rolloutd check`: its statistics, its copy of the trainer's forward, prompts, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl.trainer.utils as trl_utils
from transformers import AutoModelForCausalLM

from rolloutd import LLM, EngineConfig
from rolloutd.check import (
    BUILT_IN_PROMPTS,
    Gap,
    Sample,
    TrainerForward,
    TrainerMode,
    check,
    is_dropped,
    random_prompts,
    read_prompts,
    trainer_mode,
)
from rolloutd.cli.main import main
from rolloutd.config import CheckConfig
from rolloutd.errors import ConfigError

Factory = Callable[..., Path]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"hidden": 128, "head_dim": 32, "layers": 2}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models of this size gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(count: int = 10) -> list[Sample]:
    prompts = random_prompts(512, count, 40, seed=0)
    return [Sample(prompt, ids) for prompt, ids in zip(prompts, random_prompts(512, count, 12, seed=1), strict=True)]


# ------------------------------------------------------------------- statistics


def test_a_gap_by_hand() -> None:
    gap = Gap.between([[-1.0, -2.0], [-3.0]], [[-1.5, -1.0], [-3.0]])
    d = [-0.5, 1.0, 0.0]
    assert gap.mean == pytest.approx(0.5)
    assert gap.max == pytest.approx(1.0)
    assert gap.p99 == pytest.approx(np.quantile(np.abs(d), 0.99))
    assert gap.kl == pytest.approx(sum(math.exp(x) - 1 - x for x in d) / 3)
    assert gap.dropped == 0


@pytest.mark.parametrize("ratio", [1e-6, 0.5, 1.0, 2.999, 3.001, 50.0])
def test_a_completion_is_dropped_as_trl_drops_it(ratio: float) -> None:
    """grpo_trainer.py: `(ratio < -inf) | (ratio > 3.0)` of exp(sum of trainer - sampler)."""
    per_token = torch.full((1, 7), math.log(ratio) / 7)
    trl_ratio = torch.exp(per_token.sum(dim=-1, keepdim=True))
    assert is_dropped(float(per_token.sum())) == bool(((trl_ratio < -math.inf) | (trl_ratio > 3.0)).item())
    gap = Gap.between([[-5.0] * 7, [-1.0]], [(per_token[0] - 5.0).tolist(), [-1.0]])
    assert gap.dropped == int(ratio > 3.0)


def test_kl_estimates_the_divergence_of_the_sampler_from_the_trainer() -> None:
    rng = np.random.default_rng(0)
    sampler, trainer = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.2, 0.3])
    drawn = rng.choice(3, size=200_000, p=sampler)
    gap = Gap.between([np.log(sampler)[drawn].tolist()], [np.log(trainer)[drawn].tolist()])
    forward = float((sampler * np.log(sampler / trainer)).sum())
    reverse = float((trainer * np.log(trainer / sampler)).sum())
    assert gap.kl == pytest.approx(forward, rel=0.02)
    assert gap.kl != pytest.approx(reverse, rel=0.1)


# ---------------------------------------------------------------------- trainer


@pytest.mark.skipif(not hasattr(trl_utils, "add_fused_lm_head"), reason="this TRL computes the head otherwise")
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("cast_head", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_the_forward_is_trls(mode: TrainerMode, cast_head: bool, tie: bool, tiny_model: Factory) -> None:
    """Against the head that TRL puts on the model, over batches padded as TRL pads them."""
    folder, temperature, batch = tiny_model("qwen2", **SMALL, tie=tie), 0.7, samples(8)
    ours = TrainerForward.load(folder, mode, CPU, cast_head=cast_head).logprobs(batch, temperature)

    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    trl_utils.add_fused_lm_head(model, temperature=temperature, cast_lm_head_to_fp32=cast_head)
    prompt_len, completion_len = max(len(s.prompt) for s in batch), max(len(s.completion) for s in batch)
    ids = torch.zeros(len(batch), prompt_len + completion_len, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(batch):
        ids[row, prompt_len - len(s.prompt) : prompt_len + len(s.completion)] = torch.tensor(s.prompt + s.completion)
        mask[row, prompt_len - len(s.prompt) : prompt_len + len(s.completion)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt_len] = -100
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        theirs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    for row, s in enumerate(batch):
        theirs_row = theirs[row, -completion_len:][: len(s.completion)].tolist()
        assert ours[row] == pytest.approx(theirs_row, abs=1e-5)


def test_padding_and_batches_change_no_number_in_fp32(tiny_model: Factory) -> None:
    trainer, batch = TrainerForward.load(tiny_model("llama"), "fp32", CPU), samples(11)
    unpadded = trainer.logprobs(batch, 1.3, padded=False)
    assert [len(row) for row in unpadded] == [len(s.completion) for s in batch]
    for size in (1, 3, 8):
        assert Gap.between(unpadded, trainer.logprobs(batch, 1.3, batch_size=size)).max < 2e-5


# ------------------------------------------------------------------------- head


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_an_fp32_head_follows_a_trainer_that_casts_its_own(mode: TrainerMode, tie: bool, tiny_model: Factory) -> None:
    folder, batch = tiny_model("qwen2", **SMALL, tie=tie), samples(8)
    trainer = TrainerForward.load(folder, mode, CPU, cast_head=True).logprobs(batch, 1.0, padded=False)
    gaps = {}
    for head in ("auto", "float32"):
        with LLM(str(folder), numerics=mode, head_dtype=head) as llm:
            assert llm.info.head_dtype == ("float32" if head == "float32" else "bfloat16")
            ours = llm.score([s.prompt for s in batch], [s.completion for s in batch])
        gaps[head] = Gap.between(ours, trainer).mean
    assert gaps["float32"] < 0.3 * gaps["auto"]


@pytest.mark.parametrize("tie", [False, True])
def test_a_pushed_head_keeps_its_fp32_bits(tie: bool, tiny_model: Factory) -> None:
    """A trainer that casts a tied head trains the shared matrix in fp32, and rounds what the embedding gives."""
    folder = tiny_model("qwen2", tie=tie)
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    pushed = {name: tensor * 1.001 for name, tensor in state.items() if not (tie and name == "lm_head.weight")}
    with LLM(str(folder), numerics="bf16", head_dtype="float32") as llm:
        loaded = llm.engine._runner.weights
        assert torch.equal(loaded.head, loaded.head.bfloat16().float()), "a checkpoint is read as the trainer reads it"
        llm.update_weights(pushed.items())
        weights = llm.engine._runner.weights
    embedding = pushed["model.embed_tokens.weight"]
    assert torch.equal(weights.embedding, embedding.bfloat16())
    assert torch.equal(weights.head, embedding if tie else pushed["lm_head.weight"])


# ------------------------------------------------------------------ the command


def test_check_finds_fp32_near_and_a_wrong_mode_far(tiny_model: Factory) -> None:
    folder = str(tiny_model("qwen2"))
    options: dict[str, Any] = {"num_prompts": 10, "max_tokens": 6, "temperature": 0.8}
    near = check(EngineConfig(model=folder, numerics="fp32"), CheckConfig(**options))
    assert near.ours.max < 2e-5
    assert near.ours_scored.max < 2e-5
    assert (near.num_sequences, near.trainer_dtype, near.cast_lm_head_to_fp32) == (10, "fp32", False)
    assert "the trainer's own" in near.verdict()
    far = check(EngineConfig(model=folder, numerics="fp32"), CheckConfig(**options, trainer_dtype="bf16"))
    assert far.ours.mean > 100 * near.ours.mean
    head = check(EngineConfig(model=folder, head_dtype="float32"), CheckConfig(**options))
    assert head.cast_lm_head_to_fp32


def test_the_verdict_compares_means(tiny_model: Factory) -> None:
    report = check(EngineConfig(model=str(tiny_model("qwen2"))), CheckConfig(num_prompts=2, max_tokens=2))
    zero, one, two = (Gap(mean=mean, p99=0.0, max=0.0, kl=0.0, dropped=0) for mean in (0.0, 1.0, 2.0))

    def verdict(ours: Gap, batch: Gap, padding: Gap) -> str:
        values = {name: getattr(report, name) for name in report.__slots__}
        return type(report)(**{**values, "ours": ours, "trainer_batch": batch, "trainer_padding": padding}).verdict()

    assert verdict(one, two, zero).startswith("within the trainer's own noise")
    assert verdict(two, zero, one).startswith("2.0 times")
    assert verdict(one, zero, zero).startswith("more than")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["check", *arguments])
    return int(end.value.code or 0)


def test_the_command_prints_and_exits(tiny_model: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--model", str(tiny_model("qwen2")), "--num-prompts", "2", "--max-tokens", "3")
    assert run(*small, "--max-mean", "1e-4") == 0
    out = capsys.readouterr().out
    for words in ("rolloutd - trainer, padded batches", "trainer - trainer, padded - unpadded", "verdict ", "dropped"):
        assert words in out
    assert run(*small, "--json", "--trainer-dtype", "bf16", "--max-mean", "1e-9") == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["trainer_dtype"] == "bf16"
    assert report["ours"]["mean"] > 1e-9
    assert "is above --max-mean" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", "/no/such/file"), "prompts='/no/such/file' cannot be read"),
        (("--num-prompts", "0"), "num_prompts=0 is outside"),
        (("--temperature", "0"), "temperature=0.0 is outside"),
        (("--block-size", "0"), "block_size=0 is outside"),
    ],
)
def test_mistakes_of_the_command_are_named(
    arguments: tuple[str, ...], words: str, tiny_model: Factory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", str(tiny_model("qwen2")), *arguments) == 2
    assert words in capsys.readouterr().err


def test_numerics_without_a_trainers_mode_are_named() -> None:
    assert trainer_mode(CheckConfig(), "autocast") == "autocast"
    assert trainer_mode(CheckConfig(trainer_dtype="fp32"), "fp16") == "fp32"
    with pytest.raises(ConfigError, match=r"fp16.*--trainer-dtype"):
        trainer_mode(CheckConfig(), "fp16")


def test_prompts_of_a_file(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("one\n\ntwo \n")
    assert read_prompts(text) == ["one", "two "]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "one", "answer": 3}\n"two"\n{"prompt": [1, 2]}\n[3]\n')
    assert read_prompts(lines) == ["one", "two", [1, 2], [3]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompt. Write one"),
        ("{", "line 1 of .*p.jsonl is not valid JSON"),
        ('"a"\n{"text": "b"}', "line 2 of .*p.jsonl holds no prompt"),
        ('{"prompt": [{"role": "user", "content": "hi"}]}', "chat template"),
        ("[true]", "line 1"),
        ('{"prompt": ""}', "line 1"),
    ],
)
def test_lines_without_a_prompt_are_named(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_prompts(file)


def test_a_model_without_a_tokenizer_gets_random_ids(tiny_model: Factory, tmp_path: Path) -> None:
    folder = tiny_model("qwen2")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    engine = EngineConfig(model=str(tmp_path), max_model_len=32)
    assert check(engine, CheckConfig(num_prompts=3, max_tokens=4)).num_sequences == 3
    with pytest.raises(ConfigError, match="max_tokens=32 leaves no room"):
        check(engine, CheckConfig(max_tokens=32))
    assert len(set(map(len, BUILT_IN_PROMPTS))) > 5, "of many lengths, so that padding shows"
