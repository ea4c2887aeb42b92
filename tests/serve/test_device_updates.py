"""Updates by way of a GPU's memory: a real daemon, with a CPU in the GPU's place at both ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rolloutd import LLM, RolloutClient, SamplingParams
from rolloutd.errors import ConfigError, DigestMismatch, InternalError, ManifestMismatch
from rolloutd.serve import protocol as wire
from rolloutd.serve import push_steps
from rolloutd.serve.buckets import DeviceBucket
from rolloutd.serve.spawn import Daemon, start_daemon
from rolloutd.weights.collective import Channel
from rolloutd.weights.device_memory import DeviceSegment
from tests.cpu_as_gpu import FACTORY, cpu_as_gpu

Named = list[tuple[str, torch.Tensor]]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
PARAMS = SamplingParams(n=2, max_tokens=4, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2", tie=True)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)


@pytest.fixture(scope="module")
def daemon(own_run_dir: Path, folder: Path) -> Iterator[Daemon]:
    """A daemon on such a GPU; `client` talks to it."""
    with start_daemon({"model": str(folder), "max_num_seqs": 8}, factory=FACTORY) as daemon:
        with RolloutClient(daemon.address) as first:
            first.wait_ready(60.0)
        yield daemon


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def changed(model: Any, seed: int, dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(seed)
    parameters = model.named_parameters()
    return [(n, (p.detach() + 0.05 * torch.randn(p.shape, generator=generator)).to(dtype)) for n, p in parameters]


def tokens(source: RolloutClient | LLM) -> list[list[int]]:
    return [c.token_ids for output in source.generate(PROMPTS, PARAMS) for c in output.outputs]


def expected(folder: Path, named: Named) -> tuple[list[list[int]], str]:
    """Return the tokens of an engine that got the same by itself, and the digest."""
    with LLM(str(folder)) as llm:
        digest = llm.update_weights(named).digest
        return tokens(llm), digest


@pytest.mark.parametrize("part_bytes", [1 << 10, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("transport", "way"),
    [
        ("auto", "cuda_ipc reason=trainer and daemon are on GPUs of this host"),
        ("nccl", "nccl reason=asked for"),
    ],
)
def test_they_arrive_and_serve(
    client: RolloutClient,
    folder: Path,
    model: Any,
    dtype: torch.dtype,
    part_bytes: int,
    transport: Any,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tensors that are cut and tensors that come whole; in the engine's dtype and in one that is cast."""
    monkeypatch.setattr(push_steps, "DEVICE_BYTES", push_steps.PARTS * part_bytes)
    caplog.set_level("INFO", logger="rolloutd")
    named = changed(model, 1, dtype)
    for round_number in range(3):
        update = client.update_weights(iter(named) if round_number else named, transport=transport)
        assert (tokens(client), update.digest) == expected(folder, named)
        assert client.stats().weight_digest == update.digest
        assert update.num_bytes == sum(tensor.nbytes for _, tensor in named)
    assert f"weights travel by={way}" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("transport", ["auto", "nccl"])
def test_an_update_that_fails_leaves_the_old_version(client: RolloutClient, model: Any, transport: Any) -> None:
    before, version = tokens(client), client.health().weight_version
    named = changed(model, 2)
    for wrong in (named[:-1], [*named, ("model.layers.7.mlp.up_proj.weight", named[0][1])]):
        with pytest.raises(ManifestMismatch):
            client.update_weights(wrong, transport=transport)
    assert (tokens(client), client.health().weight_version) == (before, version)
    assert client.update_weights(named, transport=transport).version > version, "nothing was left open"


def test_a_bit_that_flips_between_two_gpus_is_found(
    client: RolloutClient, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, honest = tokens(client), Channel.send

    def flipping(channel: Channel, data: Any) -> None:
        data[0] ^= 16
        honest(channel, data)

    monkeypatch.setattr(Channel, "send", flipping)
    with pytest.raises(DigestMismatch):
        client.update_weights(changed(model, 3), transport="nccl")
    assert tokens(client) == before


def test_a_daemon_without_nccl_says_so(
    own_run_dir: Path, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Channel.host.__func__.__kwdefaults__, "timeout_s", 2.0)  # type: ignore[attr-defined]
    with (
        start_daemon({"model": str(folder), "max_num_seqs": 8}) as daemon,
        RolloutClient(daemon.address, timeout=30.0) as client,
    ):
        before = tokens(client)
        with pytest.raises(ConfigError, match="'nccl' needs a torch with nccl at both ends"):
            client.update_weights(changed(model, 3), transport="nccl")
        assert tokens(client) == before
        assert client.update_weights(changed(model, 3)).version == 1


def test_a_bit_that_flips_in_the_gpus_memory_is_found(
    client: RolloutClient, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, honest = tokens(client), DeviceBucket.message

    def flipping(bucket: DeviceBucket) -> tuple[wire.WeightsStage, list[wire.Frame]]:
        if bucket.items:
            bucket._segment.buffer[bucket.items[0].at] ^= 16
        return honest(bucket)

    monkeypatch.setattr(DeviceBucket, "message", flipping)
    with pytest.raises(DigestMismatch):
        client.update_weights(changed(model, 3))
    assert tokens(client) == before


def test_a_daemon_that_cannot_map_it_gets_the_weights_another_way(
    own_run_dir: Path, folder: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As one in a container of its own, or on another GPU."""
    named = changed(model, 4)
    with (
        start_daemon({"model": str(folder), "max_num_seqs": 8}) as elsewhere,
        RolloutClient(elsewhere.address, timeout=30.0) as client,
    ):
        update = client.update_weights(named)
        assert (tokens(client), update.digest) == expected(folder, named)
        client.update_weights(named)
        warning = "weights cannot travel by=cuda_ipc, they go by=shared_memory reason=the weights lie on GPU"
        assert caplog.text.count(warning) == 1, "it is not tried again"
        with pytest.raises(ManifestMismatch, match="lie on GPU"):
            client.update_weights(named, transport="cuda_ipc")
        assert client.update_weights(named).version == update.version + 2


def test_a_daemon_whose_driver_fails_gets_the_weights_another_way(
    own_run_dir: Path, folder: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By an error that nobody foresaw; asked for, it is an error."""
    named = changed(model, 8)
    options = {"model": str(folder), "max_num_seqs": 8}
    with (
        start_daemon(options, factory=f"{FACTORY}_that_fails") as daemon,
        RolloutClient(daemon.address, timeout=30.0) as client,
    ):
        assert client.update_weights(named).digest == expected(folder, named)[1]
        assert "weights cannot travel by=cuda_ipc, they go by=shared_memory" in caplog.text
        with pytest.raises(InternalError):
            client.update_weights(named, transport="cuda_ipc")


def test_a_gpu_without_room_for_the_segment(
    client: RolloutClient,
    folder: Path,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(num_bytes: int, device: torch.device) -> DeviceSegment:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.\nMore of it.")

    monkeypatch.setattr(DeviceSegment, "create", full)
    named = changed(model, 5)
    assert client.update_weights(named).digest == expected(folder, named)[1]
    assert (
        "reason=no memory for transport='cuda_ipc' (CUDA out of memory. Tried to allocate 256.00 MiB.)" in caplog.text
    )
    with pytest.raises(ConfigError, match="no memory for transport='cuda_ipc'"):
        client.update_weights(named, transport="cuda_ipc")


def test_what_it_needs_is_named(client: RolloutClient, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named = changed(model, 6)
    with pytest.raises(ConfigError, match="needs tensors on a GPU"):
        client.update_weights(named, transport="cuda_ipc", delta=True)
    with pytest.raises(ConfigError, match="needs tensors on a GPU"):
        client.update_weights([], transport="cuda_ipc")
    with pytest.raises(ConfigError, match="transport='nccl' needs tensors on a GPU"):
        client.update_weights(named, transport="nccl", delta=True)
    assert client.update_weights(named, delta=True).num_bytes, "auto goes another way with a delta"
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="needs tensors on a GPU"):
        client.update_weights(named, transport="cuda_ipc")


@pytest.mark.parametrize("staging", ["host", "none"])
def test_other_stagings(own_run_dir: Path, folder: Path, model: Any, staging: str) -> None:
    named = changed(model, 7)
    options = {"model": str(folder), "max_num_seqs": 8, "weight_staging": staging}
    with start_daemon(options, factory=FACTORY) as daemon, RolloutClient(daemon.address, timeout=30.0) as client:
        for _ in range(2):
            update = client.update_weights(named, transport="cuda_ipc")
            assert (tokens(client), update.digest) == expected(folder, named)


def test_an_adapter_goes_as_before_unless_it_is_asked_for(client: RolloutClient, model: Any) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapter = get_peft_model_state_dict(get_peft_model(model, config))
    client.update_lora(adapter, config)
    found = tokens(client)
    client.update_lora(adapter, config, transport="cuda_ipc")
    assert tokens(client) == found


@pytest.mark.gpu
def test_a_gpu_in_its_own_place(
    own_run_dir: Path, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    caplog.set_level("INFO", logger="rolloutd")
    named = changed(model, 9)
    on_gpu = [(name, tensor.cuda()) for name, tensor in named]
    options = {"model": str(folder), "max_num_seqs": 8, "device": "cuda", "kv_cache_bytes": 64 << 20}
    with start_daemon(options) as daemon, RolloutClient(daemon.address, timeout=120.0) as client:
        client.wait_ready(300.0)
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            assert client.update_weights(on_gpu).digest == expected(folder, named)[1]
        assert torch.cuda.memory_allocated() == before
        assert client.generate(PROMPTS, PARAMS)
    assert "weights travel by=cuda_ipc" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
