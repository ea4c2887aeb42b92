"""A frozen base in the trainer's memory, which a real daemon reads: a CPU in the GPU's place at both ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rolloutd import LLM, RolloutClient, SamplingParams
from rolloutd.errors import ConfigError, InternalError, ManifestMismatch, UpdateConflict
from rolloutd.serve import protocol as wire
from rolloutd.serve.spawn import Daemon, start_daemon
from rolloutd.weights import shared_base
from rolloutd.weights.device_memory import DeviceSegment
from tests.cpu_as_gpu import FACTORY, cpu_as_gpu

NORM = "model.norm.weight"
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
PARAMS = SamplingParams(n=2, max_tokens=4, seed=3, ignore_eos=True)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)


@pytest.fixture(scope="module", params=["qwen2", "gemma3_text", "qwen3_moe", "transformers"])
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path], impl: str) -> Path:
    return tiny_model("qwen2" if impl == "transformers" else impl, tie=impl != "qwen3_moe")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)


@pytest.fixture(scope="module")
def daemon(own_run_dir: Path, folder: Path, impl: str) -> Iterator[Daemon]:
    options = {"model": str(folder), "max_num_seqs": 8, "max_lora_rank": 8}
    if impl == "transformers":
        options["model_impl"] = impl
    with start_daemon(options, factory=FACTORY) as daemon:
        with RolloutClient(daemon.address) as first:
            first.wait_ready(60.0)
        yield daemon


@pytest.fixture
def model(folder: Path) -> Any:
    """A policy under LoRA; its base is not the checkpoint's."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return get_peft_model(base, lora())


def tokens(source: RolloutClient | LLM) -> list[list[int]]:
    return [c.token_ids for output in source.generate(PROMPTS, PARAMS) for c in output.outputs]


def base_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".lora_" not in name}


def norm_of(model: Any) -> torch.Tensor:
    """The last norm's weight, which a CPU too reads where it lies."""
    return next(p for name, p in model.named_parameters() if name.endswith("model.norm.weight"))


def expected(folder: Path, model: Any, *, adapter: bool) -> list[list[int]]:
    """Return the tokens of an engine that holds everything by itself."""
    with LLM(str(folder)) as llm:
        llm.update_weights(base_of(model).items())
        if adapter:
            llm.update_lora(get_peft_model_state_dict(model), lora())
        return tokens(llm)


def test_the_daemon_reads_the_trainers_memory(client: RolloutClient, folder: Path, model: Any) -> None:
    before = {name: tensor.detach().clone() for name, tensor in base_of(model).items()}
    update = client.adopt(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in base_of(model).items())
    assert client.stats().weight_version == update.version
    assert tokens(client) == expected(folder, model, adapter=False)
    client.update_lora(get_peft_model_state_dict(model), lora())
    with_adapter = tokens(client)
    assert with_adapter == expected(folder, model, adapter=True)
    scored = client.score(PROMPTS, [[1, 2], [3]])
    with torch.no_grad():
        norm_of(model).mul_(1.5)
    assert client.score(PROMPTS, [[1, 2], [3]]) != scored, "it is the same memory"
    with torch.no_grad():
        norm_of(model).copy_(before["base_model.model.model.norm.weight"])
    assert client.score(PROMPTS, [[1, 2], [3]]) == scored
    client.release()
    assert all(torch.equal(before[name], tensor) for name, tensor in base_of(model).items())
    with torch.no_grad():
        norm_of(model).zero_()
    assert client.score(PROMPTS, [[1, 2], [3]]) == scored, "each has memory of its own again"
    assert tokens(client) == with_adapter
    client.release()  # nothing happens


def test_a_trainer_goes_on_with_the_same_parameters(client: RolloutClient, folder: Path, model: Any) -> None:
    """An optimizer step on the adapter, gradients through the shared base."""
    kept = dict(model.named_parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    client.adopt(model)
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    for _ in range(2):
        ids = torch.tensor(PROMPTS[:1])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        client.update_lora(get_peft_model_state_dict(model), lora())
        assert tokens(client) == expected(folder, model, adapter=True)
    client.sleep(2)
    client.wake_up()
    assert tokens(client) == expected(folder, model, adapter=True)
    client.release()


def test_a_full_update_is_refused_until_it_is_released(client: RolloutClient, folder: Path, model: Any) -> None:
    client.adopt(model)
    before = tokens(client)
    with pytest.raises(UpdateConflict, match=r"Call release\(\) where it was adopted"):
        client.update_weights(base_of(model).items())
    with pytest.raises(UpdateConflict):
        client.adopt(model)
    assert tokens(client) == before
    client.release()
    client.update_weights(base_of(model).items())
    assert tokens(client) == before


def test_one_trainer_at_a_time(client: RolloutClient, daemon: Daemon, model: Any) -> None:
    """What another one is refused ends nothing of the first one's."""
    client.adopt(model)
    base = shared_base.SharedBase(model)
    with RolloutClient(daemon.address, timeout=30.0) as other, pytest.raises(UpdateConflict, match="Adopt again"):
        other._do(other._client.share(base))
    assert not base._segments
    scored = client.score(PROMPTS, [[1, 2], [3]])
    with torch.no_grad():
        norm_of(model).mul_(1.5)
    assert client.score(PROMPTS, [[1, 2], [3]]) != scored
    client.release()


def test_a_trainer_that_goes_leaves_the_daemon_with_the_weights(
    client: RolloutClient, daemon: Daemon, folder: Path, model: Any
) -> None:
    lost = RolloutClient(daemon.address, timeout=30.0)
    lost.adopt(model)
    lost._client._base = None  # it has no time to release
    lost.close()
    assert tokens(client) == expected(folder, model, adapter=False)
    client.update_weights(base_of(model).items())
    assert tokens(client) == expected(folder, model, adapter=False)


def test_a_daemon_that_dies_takes_nothing_along(own_run_dir: Path, folder: Path, model: Any) -> None:
    before = {name: tensor.detach().clone() for name, tensor in base_of(model).items()}
    with start_daemon({"model": str(folder), "max_num_seqs": 8}, factory=FACTORY) as daemon:
        client = RolloutClient(daemon.address, timeout=30.0)
        client.adopt(model)
        places = {name: p.data_ptr() for name, p in base_of(model).items()}
        os.kill(client.health().engine_pid, signal.SIGKILL)
        os.kill(daemon.pid, signal.SIGKILL)
    assert all(torch.equal(before[name], tensor) for name, tensor in base_of(model).items())
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 8.0
    assert all(torch.equal(before[name], tensor) for name, tensor in base_of(model).items())
    assert all(p.data_ptr() != places[name] for name, p in base_of(model).items()), "in memory of its own"


def test_a_base_that_was_updated_meanwhile_is_not_moved(client: RolloutClient, daemon: Daemon, model: Any) -> None:
    base = shared_base.SharedBase(model)
    client.update_weights(base.tensors())
    honest = base.allocate

    def allocate(sizes: Any) -> Any:
        with RolloutClient(daemon.address, timeout=30.0) as other:
            other.update_weights(base.tensors())
        return honest(sizes)

    base.allocate = allocate  # type: ignore[method-assign]
    with pytest.raises(UpdateConflict, match="updated meanwhile"):
        client._do(client._client.share(base))
    client.adopt(model)
    client.release()


def test_what_it_needs_is_named(client: RolloutClient, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norm_of(model).requires_grad_(True)
    with pytest.raises(ConfigError, match=r"norm\.weight is trained.*Adopt a frozen"):
        client.adopt(model)
    norm_of(model).requires_grad_(False)
    before, places = tokens(client), {name: p.data_ptr() for name, p in base_of(model).items()}
    with pytest.raises(ManifestMismatch, match="is not held in bfloat16"):
        client.adopt(model.to(torch.bfloat16))
    model.float()

    def full(num_bytes: int, device: torch.device) -> DeviceSegment:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    places = {name: p.data_ptr() for name, p in base_of(model).items()}
    with monkeypatch.context() as patch:
        patch.setattr(shared_base.DeviceSegment, "create", full)
        with pytest.raises(ConfigError, match=r"no memory that can be shared with the daemon \(CUDA out of memory"):
            client.adopt(model)
    assert {name: p.data_ptr() for name, p in base_of(model).items()} == places
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="the module lies on cpu"):
        client.adopt(model)
    assert len(before) == len(tokens(client))


def test_hostile_messages_are_refused_by_name(client: RolloutClient, model: Any) -> None:
    client.update_weights(base_of(model).items())
    before = tokens(client)

    def ask(message: wire.Message) -> Any:
        return client._do(client._client.try_control(message, ()))

    for name, dtype, shape in [
        ("x", "float32", [1]),
        (NORM, "float32", [-1]),
        (NORM, "object", [64]),
        (NORM, "", [64]),
    ]:
        answer = ask(wire.BasePlan(parameters=[wire.Parameter(name=name, dtype=dtype, shape=shape)]))
        assert isinstance(answer, ManifestMismatch), answer
    planned = ask(wire.BasePlan(parameters=[]))
    assert planned.places == []
    version = planned.base_version
    memory = wire.DeviceMemory(gpu="cpu", num_bytes=8, allocation=b"/proc/self/nothing", offset=0)
    assert isinstance(ask(wire.BaseToClient(share_id="s", memory=[], base_version=version)), ManifestMismatch)
    assert isinstance(ask(wire.BaseToClient(share_id="s", memory=[memory], base_version=version)), ManifestMismatch)
    empty = wire.DeviceMemory(gpu="cpu", num_bytes=0, allocation=b"", offset=-1)
    assert isinstance(ask(wire.BaseToClient(share_id="s", memory=[empty], base_version=version)), ManifestMismatch)
    assert isinstance(ask(wire.BaseToDaemon(share_id="")), wire.Done)
    assert tokens(client) == before


@pytest.mark.parametrize(
    ("factory", "error"), [({}, ManifestMismatch), ({"factory": f"{FACTORY}_that_fails"}, InternalError)]
)
def test_memory_that_the_daemon_cannot_map_changes_nothing(
    own_run_dir: Path, folder: Path, model: Any, factory: dict[str, str], error: type[Exception]
) -> None:
    places = {name: p.data_ptr() for name, p in base_of(model).items()}
    with (
        start_daemon({"model": str(folder), "max_num_seqs": 8}, **factory) as daemon,
        RolloutClient(daemon.address, timeout=30.0) as client,
    ):
        with pytest.raises(error):
            client.adopt(model)
        assert {name: p.data_ptr() for name, p in base_of(model).items()} == places
        assert tokens(client) == expected(folder, model, adapter=False)
        client.update_weights(base_of(model).items())


@pytest.mark.gpu
def test_a_gpu_in_its_own_place(
    own_run_dir: Path, folder: Path, model: Any, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base exists once: what the daemon had of it is free again."""
    monkeypatch.undo()
    policy = model.cuda()
    options = {"model": str(folder), "model_impl": "transformers" if impl == "transformers" else "auto"}
    options |= {"max_num_seqs": 8, "max_lora_rank": 8, "device": "cuda", "numerics": "fp32", "kv_cache_bytes": 64 << 20}
    with start_daemon(options) as daemon, RolloutClient(daemon.address, timeout=120.0) as client:
        client.wait_ready(300.0)
        client.update_weights(base_of(policy).items())
        client.update_lora(get_peft_model_state_dict(policy), lora())
        scored = client.score(PROMPTS, [[1, 2], [3]])
        client.adopt(policy)
        client.update_lora(get_peft_model_state_dict(policy), lora())
        again = client.score(PROMPTS, [[1, 2], [3]])
        assert again == scored, "the same numbers in other memory"
        drawn, norm = tokens(client), norm_of(policy).detach().clone()
        with torch.no_grad():
            norm_of(policy).mul_(1.5)
        torch.cuda.synchronize()
        assert client.score(PROMPTS, [[1, 2], [3]]) != scored
        with torch.no_grad():
            norm_of(policy).copy_(norm)
        torch.cuda.synchronize()
        client.release()
        assert tokens(client) == drawn
