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
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from rolloutd import LLM
from rolloutd.integrations.trainer_weights import Adapter, adapter_tensors, base_model_of, base_tensors, drain
from rolloutd.weights.names import canonical_name
from tests.digests import digest_of_state

KINDS = "ddp", "fsdp1", "fsdp2", "zero2", "zero3"


def shard(model: nn.Module, kind: str) -> nn.Module:
    """Return the model on both ranks: whole, or split as accelerate does it, by FSDP a unit per layer."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind.startswith("zero"):
        return zero(model, int(kind[-1]))
    layers = base_model_of(model).model.layers
    if kind == "fsdp1":
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def zero(model: nn.Module, stage: int) -> nn.Module:
    """Return the model in DeepSpeed's engine."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # as large models: all split
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    engine: nn.Module = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    return engine


def state_of(kind: str) -> SimpleNamespace:
    """Return what accelerate says of a run that splits its model so."""
    fsdp = SimpleNamespace(fsdp_version=int(kind[-1])) if kind.startswith("fsdp") else None
    deepspeed = SimpleNamespace(zero_stage=int(kind[-1])) if kind.startswith("zero") else None
    return SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=fsdp)


def same(tensors: Iterator[tuple[str, Tensor]], expected: dict[str, Tensor]) -> bool:
    """Return whether the tensors are exactly the expected ones, each once."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        assert name not in found, name
        found[name] = tensor.clone()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def check(folder: str, kind: str, *, lora: bool) -> list[bool]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    adapter = None
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
        adapter = Adapter.of(model)
    state = {canonical_name(name): p.detach().clone() for name, p in model.named_parameters()}
    base = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    model = shard(model, kind)
    accelerator = SimpleNamespace(state=state_of(kind), device=torch.device("cpu"))
    if kind == "zero3":
        assert not any(parameter.numel() for parameter in model.parameters()), "each rank holds a part of each"
    results = [same(base_tensors(model, accelerator), base)]
    if adapter is not None:
        matrices = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        results.append(bool(matrices) and same(adapter_tensors(model, accelerator, adapter), matrices))
    else:
        results.append(served_whole(folder, base_tensors(model, accelerator), state))
    return results


def served_whole(folder: str, tensors: Iterator[tuple[str, Tensor]], state: dict[str, Tensor]) -> bool:
    """Push from rank 0 while both gather; return whether what serves has the digest of the full state dict."""
    if dist.get_rank():
        drain(tensors)
        return True
    with LLM(folder) as llm:
        update = llm.update_weights(tensors)
        served = llm.stats().weight_digest
    return served == update.digest == digest_of_state(state)


def main() -> None:
    dist.init_process_group("gloo")
    for folder in sys.argv[1:]:
        for kind in KINDS:
            for lora in (False, True):
                line = f"{kind} lora={lora} {check(folder, kind, lora=lora)}\n"
                sys.stdout.write(line)  # one write: lines of two ranks do not mix
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
