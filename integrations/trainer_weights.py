"""The trainer's parameters as named full tensors, whatever shards them: read one at a time, never written."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rolloutd.errors import ConfigError, LoraUnsupported, RolloutdError
from rolloutd.outputs import ModelInfo
from rolloutd.weights.loader import Checkpoint, resolve
from rolloutd.weights.lora import check_peft_config
from rolloutd.weights.names import canonical_name
from rolloutd.weights.tensors import digest_of, spec_of

log = logging.getLogger(__name__)

Sharding = Literal["none", "zero3", "fsdp1", "fsdp2"]
Wanted = Callable[[str], bool]
"""Whether a raw parameter name is to be gathered. The same answer on all ranks: gathering is a collective."""

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_REMEDY = "Train without it, or train full weights."


def sharding_of(accelerator: Any) -> Sharding:
    """Return how the run splits its parameters over the ranks."""
    state = accelerator.state
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        return "zero3"
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is None:
        return "none"
    return "fsdp2" if getattr(fsdp, "fsdp_version", 1) == 2 else "fsdp1"


def peft_model_of(model: nn.Module) -> Any | None:
    """Return the PEFT model inside wrappers, or None where there is no adapter."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def base_model_of(model: nn.Module) -> Any:
    """Return the transformers model inside wrappers and PEFT."""
    peft_model = peft_model_of(model)
    if peft_model is not None:
        return peft_model.get_base_model()
    return next((module for module in model.modules() if hasattr(module, "config")), model)


# ------------------------------------------------------------------ gathering


def walk(model: nn.Module, accelerator: Any, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    """Yield (raw name, full tensor) of each wanted parameter once, in one order on all ranks.

    A collective where parameters are sharded: every rank runs it to its end. A tensor is valid until the next one is
    asked for.
    """
    match sharding_of(accelerator):
        case "fsdp1":
            yield from _walk_fsdp1(model, wanted)
        case "fsdp2":
            yield from _walk_fsdp2(model, accelerator.device, wanted)
        case "zero3":
            yield from _walk_zero3(model, wanted)
        case "none":
            for name, parameter in model.named_parameters():
                if wanted(name):
                    yield name, _dequantized(parameter)


def _dequantized(parameter: nn.Parameter) -> Tensor:
    """Return a parameter as its layer computes with it: 4-bit ones (QLoRA) as the numbers that they stand for."""
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    full: Tensor = dequantize_bnb_weight(parameter)
    return full.detach()


def _walk_zero3(model: nn.Module, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    import deepspeed

    for name, parameter in model.named_parameters():
        if wanted(name):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()


def _walk_fsdp2(model: nn.Module, device: torch.device, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not wanted(name):
            continue
        tensor: Any = parameter.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.to(device).full_tensor()  # an offloaded shard cannot be gathered from the CPU
        yield name, tensor


def _walk_fsdp1(root: nn.Module, wanted: Wanted) -> Iterator[tuple[str, Tensor]]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False):
        pass  # before its first forward pass a unit must learn from the root that it is none
    yield from _walk_fsdp1_units(root, "", wanted, set())


def _walk_fsdp1_units(module: nn.Module, prefix: str, wanted: Wanted, seen: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Children first, so that a parent, the root included, adds what no child unit holds."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for child_name, child in module.named_children():
        yield from _walk_fsdp1_units(child, f"{prefix}{child_name}.", wanted, seen)
    if not isinstance(module, FullyShardedDataParallel):
        return
    with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
        for name, parameter in module.named_parameters():
            key = canonical_name(prefix + name)
            if key not in seen:
                seen.add(key)
                if wanted(prefix + name):
                    yield prefix + name, parameter.detach()


# ------------------------------------------------------------------------ what


@dataclass(frozen=True)
class Adapter:
    """The one LoRA adapter that is trained."""

    name: str
    peft_config: Mapping[str, Any]
    scaling: Mapping[str, float]
    """Canonical module path -> factor of B(A(x)), read from PEFT's layers."""

    @classmethod
    def of(cls, model: nn.Module) -> Adapter | None:
        """Return a model's adapter, None without PEFT; `LoraUnsupported` names what cannot be served."""
        peft_model = peft_model_of(model)
        if peft_model is None:
            return None
        active = peft_model.active_adapters
        names = [active] if isinstance(active, str) else list(active)
        if len(names) != 1:
            raise LoraUnsupported(f"{len(names)} adapters are active ({', '.join(names)}). Train one at a time.")
        config = peft_model.peft_config[names[0]].to_dict()
        check_peft_config(config)
        adapter = cls(names[0], config, _scaling(peft_model, names[0]))
        adapter._check_layers(peft_model)
        return adapter

    def is_matrix(self, raw_name: str) -> bool:
        """Whether a raw parameter name is an A or B matrix of this adapter."""
        return re.search(rf"\.lora_[AB]\.{re.escape(self.name)}\.weight$", raw_name) is not None

    def _check_layers(self, peft_model: nn.Module) -> None:
        for path, module in peft_model.named_modules():
            if isinstance(module, LoraLayer):
                if self.name in module.lora_variant:
                    kind = type(module.lora_variant[self.name]).__name__
                    raise LoraUnsupported(f"{canonical_name(path)} uses {kind}, which is not supported. {_REMEDY}")
                if module.merged:
                    raise LoraUnsupported(f"{canonical_name(path)} is merged. Call unmerge_adapter() before training.")
        others = [n for n, p in peft_model.named_parameters() if p.requires_grad and not self.is_matrix(n)]
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise LoraUnsupported(
                f"parameters outside the adapter are trained: {', '.join(others[:3])}{more}. Only lora_A and lora_B "
                f"matrices travel. {_REMEDY}"
            )


def _scaling(peft_model: nn.Module, adapter: str) -> dict[str, float]:
    # Only LoRA layers: attention modules of transformers also have a float called `scaling`.
    return {
        canonical_name(path): float(module.scaling[adapter])
        for path, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def largest_rank(model: nn.Module) -> int:
    """Return the largest rank of a model's LoRA adapters, 0 without any."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return max((int(rank) for layer in layers for rank in layer.r.values()), default=0)


def adapter_tensors(model: nn.Module, accelerator: Any, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapter's matrices, in their own dtype; a collective like `walk`."""
    for name, tensor in walk(model, accelerator, adapter.is_matrix):
        yield canonical_name(name), tensor


def base_tensors(model: nn.Module, accelerator: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter that is no adapter's, tied ones once; a collective like `walk`."""
    for name, tensor in walk(model, accelerator, lambda raw: ".lora_" not in raw):
        yield canonical_name(name), tensor


def cast_for(info: ModelInfo, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that the daemon stores it in, so that no byte travels in vain.

    Under autocast norms and embeddings are fp32: only inputs of matrix products are rounded there. An embedding comes
    at the head's precision too, since it is the head where the two are tied.
    """
    if info.model_impl == "transformers":  # whose names do not tell what is rounded where: the engine rounds
        return tensor.float() if "float32" in (info.dtype, info.head_dtype) or info.numerics == "autocast" else tensor
    is_residual = name == _EMBEDDING or (tensor.ndim == 1 and "norm" in name)
    if info.numerics == "autocast" and is_residual:
        return tensor.float()
    is_head = name in (_EMBEDDING, _HEAD)
    return tensor.to(getattr(torch, info.head_dtype if is_head else info.dtype))


def drain(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Take part in the gathers that are left."""
    for _ in tensors:
        pass


# ------------------------------------------------------------------------ base


def is_quantized(model: nn.Module) -> bool:
    """Whether the trainer holds its base in 4 or 8 bits."""
    base = base_model_of(model)
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))


def is_dequantized(model: nn.Module, accelerator: Any) -> bool:
    """Whether `base_tensors` gives a quantized base as its layers compute with it: in 4 bits and without sharding."""
    return bool(getattr(base_model_of(model), "is_loaded_in_4bit", False)) and sharding_of(accelerator) == "none"


def checkpoint_digests(info: ModelInfo) -> dict[str, int] | None:
    """Return name -> digest of the served checkpoint's tensors as the daemon stores them; None if it is not here."""
    try:
        checkpoint = Checkpoint(resolve(info.model, None))
        loaded = checkpoint.tensors(torch.float32 if info.numerics == "autocast" else getattr(torch, info.dtype))
        return {name: _digest(info, name, tensor) for name, tensor in loaded}
    except (RolloutdError, OSError) as error:
        log.info("base weights cannot be compared: %s", error)
        return None


def _digest(info: ModelInfo, name: str, tensor: Tensor) -> int:
    stored = cast_for(info, name, tensor)
    return digest_of(spec_of(name, stored), stored)


def first_difference(info: ModelInfo, digests: Mapping[str, int], tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    """Return the first of the trainer's tensors that the checkpoint does not hold bit for bit, None if all agree."""
    found = None
    for name, tensor in tensors:
        if found is None and digests.get(name) != _digest(info, name, tensor):
            found = name
    return found


def save_base(model: nn.Module, accelerator: Any, tokenizer: Any, folder: Path) -> None:
    """Write the trainer's base model, without adapter, and its tokenizer to `folder` on rank 0; a collective."""
    is_main = bool(accelerator.is_main_process)
    state = {}
    for name, tensor in base_tensors(model, accelerator):
        if is_main:
            state[name] = tensor.to("cpu", copy=True)
    if not is_main:
        return
    if is_quantized(model):
        raise ConfigError(
            "the base is quantized and its checkpoint cannot be found. Load the model by the path or hub id of an "
            "unquantized checkpoint, which the daemon can load too."
        )
    base = base_model_of(model)
    with _architecture_named(base):
        base.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


@contextmanager
def _architecture_named(base: Any) -> Iterator[None]:
    """Name the model's class in its config while it is saved; a model made from a config does not."""
    before = base.config.architectures
    base.config.architectures = [type(base).__name__]
    try:
        yield
    finally:
        base.config.architectures = before
