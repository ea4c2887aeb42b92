"""Probes: what they take, and what they say of weights that are not the trainer's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rolloutd import LLM, AsyncRolloutClient, ParityProbe, RolloutClient
from rolloutd.check import Sample, TrainerForward
from rolloutd.errors import ConfigError, ParityMismatch
from rolloutd.serve.spawn import start_daemon

PROMPTS, COMPLETIONS = [[5, 6, 7], [8, 9]], [[1, 2, 3, 4], [5, 6]]


def stepped(folder: Path, seed: int) -> Any:
    """Return the model after a step of training, so to say."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def probe_of(model: Any, **options: Any) -> ParityProbe:
    samples = [Sample(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    forward = TrainerForward(model, "fp32", torch.device("cpu"), cast_head=False)
    return ParityProbe(PROMPTS, COMPLETIONS, forward.logprobs(samples, 1.0), **options)


def test_a_probe_wants_a_logprob_for_each_token() -> None:
    with pytest.raises(ConfigError, match="2 prompts, 6 tokens of 2 completions and 4 logprobs of 1"):
        ParityProbe(PROMPTS, COMPLETIONS, [[-1.0] * 4])
    with pytest.raises(ConfigError, match="0 tokens"):
        ParityProbe([], [], [])
    with pytest.raises(ConfigError, match="no finite number"):
        ParityProbe([[1]], [[2]], [[math.nan]])


def test_the_mean_is_what_counts() -> None:
    probe = ParityProbe(PROMPTS, COMPLETIONS, [[-1.0] * 4, [-2.0] * 2], max_mean=0.1)
    assert probe.check([[-1.0] * 4, [-2.0, -2.3]], 3) == pytest.approx(0.05)
    with pytest.raises(ParityMismatch, match=r"version 3 serves.*token 1 of completion 1: -3.* here, -2 there"):
        probe.check([[-1.0] * 4, [-2.0, -3.0]], 3)
    with pytest.raises(ParityMismatch):
        probe.check([[-1.0] * 4, [-2.0, math.nan]], 3)


def test_in_process(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen2", tie=True)
    model, other = stepped(folder, 1), stepped(folder, 2)
    with LLM(str(folder)) as llm:
        update = llm.update_weights(model.named_parameters(), probe=probe_of(model))
        assert update.parity is not None
        assert update.parity < 1e-5
        assert llm.update_weights(model.named_parameters()).parity is None
        with pytest.raises(ParityMismatch, match="version 3 serves"):
            llm.update_weights(other.named_parameters(), probe=probe_of(model))
        assert llm.weight_version == 3


def test_through_a_daemon(tiny_model: Callable[..., Path], own_run_dir: Path) -> None:
    folder = tiny_model("qwen2", tie=True)
    model, other = stepped(folder, 1), stepped(folder, 2)
    with start_daemon({"model": str(folder)}) as daemon:
        with RolloutClient(daemon.address) as client:
            update = client.update_weights(model.named_parameters(), probe=probe_of(model, max_mean=1e-5))
            assert update.parity is not None
            with pytest.raises(ParityMismatch):
                client.update_weights(other.named_parameters(), probe=probe_of(model))

        async def the_same() -> None:
            async with AsyncRolloutClient(daemon.address) as client:
                await client.update_weights(model.named_parameters(), probe=probe_of(model, max_mean=1e-5))
                with pytest.raises(ParityMismatch):
                    await client.update_weights(other.named_parameters(), probe=probe_of(model))

        asyncio.run(the_same())
