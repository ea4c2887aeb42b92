"""Updates that come together in host memory, or over what serves: whole, or named, and never a second copy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rolloutd import LLM, RolloutClient, SamplingParams
from rolloutd.engine.sequence import Request
from rolloutd.errors import ManifestMismatch, RolloutdError, WeightsLost
from rolloutd.serve.spawn import start_daemon

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
PARAMS = SamplingParams(n=2, max_tokens=6, seed=3, ignore_eos=True)

Named = list[tuple[str, torch.Tensor]]


@pytest.fixture
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2", tie=True)


def stepped(folder: Path, seed: int) -> Named:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return [(n, p.detach() + 0.05 * torch.randn(p.shape, generator=generator)) for n, p in model.named_parameters()]


def tokens(source: LLM | RolloutClient) -> list[list[int]]:
    return [c.token_ids for output in source.generate(PROMPTS, PARAMS) for c in output.outputs]


def addresses(llm: LLM) -> dict[str, int]:
    """Return where the parameters of the base lie."""
    store: Any = llm.engine._weights
    tensors = {n: store._model.parameter(store._base, n, torch.float32) for n, _ in stepped(Path(llm.config.model), 0)}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("model_impl", ["native", "transformers"])
@pytest.mark.parametrize("staging", ["host", "none"])
def test_an_update_is_written_over_the_weights(folder: Path, staging: str, model_impl: str) -> None:
    with (
        LLM(str(folder), weight_staging=staging, model_impl=model_impl) as llm,
        LLM(str(folder), model_impl=model_impl) as plain,
    ):
        before = addresses(llm)
        assert len(before) == len(stepped(folder, 0))
        for seed in range(3):
            update = llm.update_weights(stepped(folder, seed))
            assert update.digest == plain.update_weights(stepped(folder, seed)).digest
            assert tokens(llm) == tokens(plain)
            assert addresses(llm) == before
        assert addresses(plain) != before


def lora(folder: Path) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model_state_dict(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)), config


@pytest.mark.parametrize("staging", ["host", "none"])
def test_adapters_follow_weights_that_were_written_over(folder: Path, staging: str) -> None:
    adapter, config = lora(folder)
    with LLM(str(folder), weight_staging=staging) as llm, LLM(str(folder)) as plain:
        for one in (llm, plain):
            one.update_lora(adapter, config, adapter="kept")
            one.generate(PROMPTS, PARAMS, adapter="kept")
            one.update_weights(stepped(folder, 1))
            one.update_lora(adapter, config, mode="merged")
            one.update_weights(stepped(folder, 2))
        assert tokens(llm) == tokens(plain)
        kept = [one.generate(PROMPTS, PARAMS, adapter="kept") for one in (llm, plain)]
        assert [[c.token_ids for c in o.outputs] for o in kept[0]] == [
            [c.token_ids for c in o.outputs] for o in kept[1]
        ]


def broken(named: Named) -> Named:
    return [(name, tensor[..., :-1] if i == 5 else tensor) for i, (name, tensor) in enumerate(named)]


def test_host_staging_survives_a_failure(folder: Path) -> None:
    with LLM(str(folder), weight_staging="host") as llm:
        llm.update_weights(stepped(folder, 1))
        before = tokens(llm)
        for wrong in (broken(stepped(folder, 2)), stepped(folder, 2)[:-1]):
            with pytest.raises(ManifestMismatch):
                llm.update_weights(wrong)
            assert tokens(llm) == before


def test_without_staging_nothing_serves_after_a_failure(folder: Path) -> None:
    adapter, config = lora(folder)
    with LLM(str(folder), weight_staging="none") as llm, LLM(str(folder)) as plain:
        before = tokens(llm)
        with pytest.raises(ManifestMismatch):
            llm.update_weights([("model.norm", torch.ones(3))])
        assert tokens(llm) == before, "nothing had landed"
        for wrong in (broken(stepped(folder, 2)), stepped(folder, 2)[:-1]):
            with pytest.raises(ManifestMismatch):
                llm.update_weights(wrong)
            for call in (lambda: tokens(llm), lambda: llm.update_lora(adapter, config)):
                with pytest.raises(WeightsLost, match="Push again with update_weights"):
                    call()
            llm.update_weights(stepped(folder, 3))
            plain.update_weights(stepped(folder, 3))
            assert tokens(llm) == tokens(plain)
        llm.update_lora(adapter, config)


@pytest.mark.parametrize("fails", [False, True])
def test_what_runs_waits_for_the_commit_or_fails_by_name(folder: Path, fails: bool) -> None:
    with LLM(str(folder), weight_staging="none") as llm:
        engine = llm.engine
        for name in ("r", "s"):
            engine.add_request(Request(name, (1, 2, 3), SamplingParams(max_tokens=8, seed=1, ignore_eos=True)))
        engine.add_request(Request("base", (1, 2, 3), SamplingParams(max_tokens=8, seed=1), adapter="base"))
        for _ in range(3):
            engine.step()
        steps = engine.stats().num_steps

        def named() -> Any:
            for name, tensor in stepped(folder, 1):
                yield name, tensor
                assert engine.step() == []
                assert not engine.can_step() or engine.stats().num_steps == steps
            if fails:
                raise RuntimeError("the trainer failed")

        if fails:
            with pytest.raises(RuntimeError, match="the trainer failed"):
                llm.update_weights(named())
            assert not engine.has_unfinished()
            failures: dict[str, RolloutdError] = engine.take_failures()
            assert failures.keys() == {"r", "s", "base"}
            assert all(isinstance(error, WeightsLost) for error in failures.values())
            assert engine.take_failures() == {}
            engine.check_invariants()
            return
        llm.update_weights(named())
        done = {}
        while engine.has_unfinished():
            done |= {one.request_id: one.completion for one in engine.step()}
        assert done["r"].weight_versions == [0] * 3 + [1] * 5
        assert set(done["base"].weight_versions) == {1}


def generate(client: RolloutClient, lost: list[Exception]) -> None:
    """Run for long; keep the error that ends it."""
    try:
        client.generate([[1, 2]], SamplingParams(max_tokens=900, ignore_eos=True, n=8))
    except RolloutdError as error:
        lost.append(error)


def test_through_a_daemon(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with (
        start_daemon({"model": str(folder), "weight_staging": "none"}) as daemon,
        RolloutClient(daemon.address, timeout=30.0) as client,
        LLM(str(folder)) as llm,
    ):
        client.wait_ready(60.0)
        for transport in ("shared_memory", "inline"):
            lost: list[Exception] = []
            thread = threading.Thread(target=generate, args=(client, lost))
            thread.start()
            deadline = time.monotonic() + 20.0
            while client.stats().num_running == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(ManifestMismatch):
                client.update_weights(broken(stepped(folder, 1)), transport=transport)  # type: ignore[arg-type]
            thread.join(10.0)
            assert not thread.is_alive(), "what ran is told at once"
            assert [type(error) for error in lost] == [WeightsLost]
            with pytest.raises(WeightsLost):
                tokens(client)
            client.update_weights(stepped(folder, 2), transport=transport)  # type: ignore[arg-type]
            llm.update_weights(stepped(folder, 2))
            assert tokens(client) == tokens(llm)
