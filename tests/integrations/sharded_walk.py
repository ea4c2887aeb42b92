"""One of two ranks that shard a model and gather it again; started by test_two_processes.py."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM

from rolloutd.integrations.trainer_weights import Adapter, adapter_tensors, base_model_of, base_tensors
from rolloutd.weights.names import canonical_name


def shard(model: nn.Module, version: int) -> nn.Module:
    """Return the model split over both ranks, a unit per layer, as accelerate splits it."""
    layers = base_model_of(model).model.layers
    if version == 1:
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def same(tensors: Iterator[tuple[str, Tensor]], expected: dict[str, Tensor]) -> bool:
    """Return whether the tensors are exactly the expected ones, each once."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        assert name not in found, name
        found[name] = tensor.clone()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def check(folder: str, version: int, *, lora: bool) -> list[bool]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    adapter = None
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
        adapter = Adapter.of(model)
    state = {canonical_name(name): p.detach().clone() for name, p in model.named_parameters()}
    base = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    model = shard(model, version)
    plugin = SimpleNamespace(fsdp_version=version)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=plugin), device=torch.device("cpu")
    )
    results = [same(base_tensors(model, accelerator), base)]
    if adapter is not None:
        matrices = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        results.append(bool(matrices) and same(adapter_tensors(model, accelerator, adapter), matrices))
    return results


def main() -> None:
    dist.init_process_group("gloo")
    for folder in sys.argv[1:]:
        for version in (1, 2):
            for lora in (False, True):
                line = f"fsdp{version} lora={lora} {check(folder, version, lora=lora)}\n"
                sys.stdout.write(line)  # one write: lines of two ranks do not mix
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
