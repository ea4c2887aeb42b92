"""Weight updates over the wire: refusals keep their names and the old version, and no update is left open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rolloutd import LLM, AsyncRolloutClient, RolloutClient, SamplingParams
from rolloutd.errors import ConfigError, DigestMismatch, LoraUnsupported, ManifestMismatch, UpdateConflict
from rolloutd.serve import protocol as wire
from rolloutd.serve import push_steps
from rolloutd.serve.spawn import Daemon, start_daemon
from rolloutd.weights import shared_memory

Named = list[tuple[str, torch.Tensor]]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
PARAMS = SamplingParams(n=2, max_tokens=8, seed=3, ignore_eos=True)
TRANSPORTS = ["inline", "shared_memory"]


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2", tie=True)


@pytest.fixture(scope="module")
def real(own_run_dir: Path, folder: Path) -> Iterator[RolloutClient]:
    """A client of a daemon that serves a real tiny model."""
    with (
        start_daemon({"model": str(folder), "max_num_seqs": 8}) as daemon,
        RolloutClient(daemon.address, timeout=30.0) as client,
    ):
        client.wait_ready(60.0)
        yield client


def changed(folder: Path, seed: int) -> Any:
    """Return the model after a change of every parameter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def parameters(model: Any) -> Named:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def tokens(source: RolloutClient | LLM) -> list[list[int]]:
    return [c.token_ids for output in source.generate(PROMPTS, PARAMS) for c in output.outputs]


def wrong_shape(named: Named) -> Named:
    return [(name, tensor[:1] if i == 3 else tensor) for i, (name, tensor) in enumerate(named)]


def wrong_name(named: Named) -> Named:
    return [*named, ("model.layers.7.mlp.up_proj.weight", named[0][1])]


def missing(named: Named) -> Named:
    return named[:-1]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("spoil", [wrong_shape, wrong_name, missing])
def test_a_wrong_update_is_named_and_the_old_version_serves_on(
    real: RolloutClient, folder: Path, spoil: Callable[[Named], Named], transport: Any
) -> None:
    before, version = tokens(real), real.health().weight_version
    with pytest.raises(ManifestMismatch):
        real.update_weights(spoil(parameters(changed(folder, 1))), transport=transport)
    assert tokens(real) == before
    assert real.health().weight_version == version
    if shared_memory.available():
        assert not list(shared_memory.DIRECTORY.glob("rolloutd-*"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bytes_that_change_on_the_way_are_refused(
    real: RolloutClient, folder: Path, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, version = tokens(real), real.health().weight_version
    honest = push_steps.PushSteps._commit

    def lying(steps: push_steps.PushSteps) -> wire.WeightsCommit:
        commit = honest(steps)
        name = sorted(commit.digests)[0]
        commit.digests[name] ^= 1
        return commit

    monkeypatch.setattr(push_steps.PushSteps, "_commit", lying)
    with pytest.raises(DigestMismatch, match="Push again"):
        real.update_weights(parameters(changed(folder, 2)), transport=transport)
    assert tokens(real) == before
    assert real.health().weight_version == version


def test_a_daemon_that_cannot_open_the_segment_gets_the_bytes_inline(
    real: RolloutClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with a /dev/shm of its own."""
    monkeypatch.setattr(push_steps.Segment, "create", lambda size: Hidden(size))
    named = parameters(changed(folder, 3))
    update = real.update_weights(named)
    assert update.num_tensors == len(named)
    with pytest.raises(ManifestMismatch, match="segment"):
        real.update_weights(named, transport="shared_memory")


class Hidden:
    """A segment that lies where the daemon does not look."""

    def __init__(self, num_bytes: int) -> None:
        self.name = "rolloutd-" + "0" * 32
        self.num_bytes = num_bytes
        self.buffer = memoryview(bytearray(num_bytes))

    def __enter__(self) -> Hidden:
        return self

    def __exit__(self, *error: object) -> None:
        self.buffer.release()


def test_daemon_and_engine_in_process_compute_the_same(real: RolloutClient, folder: Path) -> None:
    model = changed(folder, 4)
    with LLM(str(folder)) as llm:
        here = llm.update_weights(parameters(model))
        there = real.update_weights(dict(parameters(model)))
        assert here.digest == there.digest
        assert tokens(real) == tokens(llm)
        assert real.score([[1, 2, 3]], [[4, 5]]) == [pytest.approx(llm.score([[1, 2, 3]], [[4, 5]])[0], abs=1e-5)]
        text = real.generate("abc", PARAMS)[0]
        assert text.prompt_token_ids == llm.generate("abc", PARAMS)[0].prompt_token_ids
        assert text.outputs[0].text == llm.generate("abc", PARAMS)[0].outputs[0].text


def test_an_adapter_travels_alone(real: RolloutClient, folder: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = changed(folder, 5)
    real.update_weights(parameters(base))
    without = tokens(real)
    peft = get_peft_model(base, config)
    named = {name: tensor.detach() for name, tensor in get_peft_model_state_dict(peft).items()}
    for peft_config in (config, config.to_dict()):  # the object, or its dict
        update = real.update_lora(named, peft_config)
        assert update.num_tensors == len(named)
        assert update.num_bytes == sum(tensor.nbytes for tensor in named.values())
        assert tokens(real) != without
    with pytest.raises(LoraUnsupported, match="dora"):
        real.update_lora(named, {**config.to_dict(), "use_dora": True})
    real.update_weights(parameters(changed(folder, 5)))
    assert tokens(real) == without


def test_versions_only_rise(real: RolloutClient, folder: Path) -> None:
    named = parameters(changed(folder, 6))
    version = real.health().weight_version
    assert real.update_weights(named, version + 5).version == version + 5
    with pytest.raises(ConfigError, match="not above"):
        real.update_weights(named, version + 5)
    assert real.update_weights(named).version == version + 6


# ------------------------------------------------------------------ over the fake engine


def test_an_interrupted_push_is_not_left_open(client: RolloutClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two tensors, and in the middle of a call."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.update_weights(tensors())
    assert client.update_weights({"a": torch.zeros(3)}).version > 0

    honest = client._client.try_control
    for kind in (wire.WeightsBegin, wire.WeightsStage, wire.WeightsCommit):
        with monkeypatch.context() as patch:
            patch.setattr(client, "_do", interrupting(client._do, kind))
            patch.setattr(client._client, "try_control", marked(honest))
            with pytest.raises(KeyboardInterrupt):
                client.update_weights({"a": torch.zeros(3)})
        assert client.update_weights({"a": torch.zeros(3)}).version > 0


def marked(call: Any) -> Any:
    """Return a coroutine function whose coroutines know their message."""

    def begin(message: wire.Message, frames: Any) -> Any:
        return Marked(call(message, frames), message)

    return begin


class Marked:
    def __init__(self, coroutine: Any, message: wire.Message) -> None:
        self.coroutine, self.message = coroutine, message


def interrupting(do: Any, kind: type) -> Any:
    """Return `_do` that is interrupted once its message has been sent."""

    def run(work: Any) -> Any:
        if not isinstance(work, Marked):
            return do(work)
        answer = do(work.coroutine)
        if isinstance(work.message, kind):
            raise KeyboardInterrupt
        return answer

    return run


def test_a_cancelled_async_push_is_not_left_open(daemon: Daemon) -> None:
    async def run() -> int:
        async with AsyncRolloutClient(daemon.address) as client:

            def tensors() -> Iterator[tuple[str, torch.Tensor]]:
                yield "a", torch.zeros(20_000_000)  # more than a bucket: some of it is on the way
                pushing.cancel()
                yield "b", torch.zeros(20_000_000)

            pushing = asyncio.create_task(client.update_weights(tensors()))
            with pytest.raises(asyncio.CancelledError):
                await pushing
            before = (await client.health()).weight_version
            return (await client.update_weights({"a": torch.zeros(3)})).version - before

    assert asyncio.run(run()) == 1


def test_one_writer_at_a_time(daemon: Daemon, client: RolloutClient) -> None:
    with RolloutClient(daemon.address) as other:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield "a", torch.zeros(3)
            with pytest.raises(UpdateConflict, match="is open"):
                client.update_weights({"b": torch.zeros(3)})
            yield "c", torch.zeros(3)

        update = other.update_weights(tensors())
    assert update.num_tensors == 2
    assert client.update_weights({"b": torch.zeros(3)}).version == update.version + 1
