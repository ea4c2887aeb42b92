"""LoRA adapters: which kinds can be served exactly, their scaling, and their pairs of matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rolloutd.errors import LoraUnsupported, ManifestMismatch, did_you_mean

from .manifest import LoraSpec
from .names import split_lora_name


@dataclass(frozen=True, slots=True)
class LoraPair:
    """y += scaling * B (A x): A is [r, in], B is [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float


_REMEDY = "Train without it, or merge the adapter and push full weights with update_weights."

_UNSUPPORTED = {
    "use_dora": "its magnitudes rescale the layer's whole output",
    "use_qalora": "it pools the input of A",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it is active from an invocation on only",
    "arrow_config": "it routes tokens between adapters",
    "kasa_config": "it truncates the base and has a third factor",
    "monteclora_config": "it samples its matrices",
    "lora_bias": "B has a bias",
    "modules_to_save": "it replaces whole modules",
    "target_parameters": "it adapts parameters that are no linear layer",
    "trainable_token_indices": "it replaces rows of the embedding",
    "layer_replication": "it changes the number of layers",
}
"""Options of PEFT's LoraConfig under which the adapter is more, or other, than pairs on linear layers. What only
changes initialisation or the backward pass (PiSSA, EVA, VeLoRA, ...) is served, given the trainer's base weights."""

_UNSUPPORTED_TENSORS = {
    "lora_magnitude_vector": "use_dora",
    "lora_embedding_A": "an embedding in target_modules",
    "lora_embedding_B": "an embedding in target_modules",
    "modules_to_save": "modules_to_save",
    "original_module": "modules_to_save",
    "trainable_tokens_delta": "trainable_token_indices",
    "lora_diag": "kasa_config",
    "lora_monteclora_sampler": "monteclora_config",
}
"""Component of a parameter's name -> the option that put it there."""


def check_peft_config(config: Mapping[str, Any]) -> None:
    """Raise `LoraUnsupported`, naming the option, for an adapter that is more than pairs on linear layers.

    `config` is PEFT's `LoraConfig.to_dict()`, enums and sets included, or the same from an adapter_config.json.
    """
    peft_type = str(getattr(config.get("peft_type"), "value", config.get("peft_type") or "LORA"))
    if peft_type.upper() != "LORA":
        raise LoraUnsupported(f"peft_type={peft_type} is not supported; only LORA is. {_REMEDY}")
    for option, reason in _UNSUPPORTED.items():
        if config.get(option):
            raise LoraUnsupported(f"{option}={_shown(config[option])} is not supported: {reason}. {_REMEDY}")
    bias = config.get("bias") or "none"
    if bias != "none":
        raise LoraUnsupported(
            f"bias={bias!r} is not supported: it trains the base's biases. Use bias='none'. {_REMEDY}"
        )
    targets = config.get("target_modules") or ()
    for module in ("model.embed_tokens", "lm_head"):
        if _targets(targets, module):
            raise LoraUnsupported(
                f"target_modules={_shown(targets)} takes in {module}; embeddings and head are not supported. {_REMEDY}"
            )


def _targets(targets: str | Iterable[str], module: str) -> bool:
    """PEFT's rule for target_modules: a string is a regular expression for the path, a list holds ends of paths."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _shown(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def scaling_from_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return each module's factor: alpha / r, or alpha / sqrt(r) with rslora; alpha may differ by `alpha_pattern`.

    `ranks` maps module paths to the rank of their A matrix, which `rank_pattern` may have set. Raises
    `ManifestMismatch` for a rank below 1.
    """
    default_alpha = float(config.get("lora_alpha", 8))  # 8 is LoraConfig's default
    patterns = dict(config.get("alpha_pattern") or {})
    result = {}
    for path, rank in ranks.items():
        if rank < 1:
            raise ManifestMismatch(f"{path}: lora_A has {rank} rows. Gather sharded parameters before sending them.")
        alpha = float(next((value for key, value in patterns.items() if _matches(key, path)), default_alpha))
        result[path] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return result


def _matches(pattern: str, path: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: the pattern is a regular expression for the end of the path."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def pair_up(
    tensors: Mapping[str, Tensor], spec: LoraSpec, targets: Mapping[str, tuple[int, int]]
) -> dict[str, LoraPair]:
    """Return module path -> pair. `targets` maps every path that may have one to its (out, in).

    Raises `ManifestMismatch` for half a pair, an unknown path, shapes that do not fit, and scaling that does not match.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        split = split_lora_name(name)
        if split is None:
            raise _unsupported_tensor(name)
        sides.setdefault(split[0], {})[split[1]] = tensor
    if not sides:
        raise ManifestMismatch("the adapter holds no lora_A and lora_B matrices. Send the trainable LoRA parameters.")
    needless = sorted(set(spec.scaling) - set(sides))
    if needless:
        raise ManifestMismatch(
            f"scaling names {needless[0]!r}, for which no matrices came. Pass scaling for the modules that are sent."
        )
    return {path: _pair(path, pair, spec, targets) for path, pair in sides.items()}


def _unsupported_tensor(name: str) -> LoraUnsupported:
    option = next((_UNSUPPORTED_TENSORS[part] for part in name.split(".") if part in _UNSUPPORTED_TENSORS), None)
    if option is None and name.endswith(".lora_B.bias"):
        option = "lora_bias"
    if option is None:
        return LoraUnsupported(f"{name!r} is no lora_A or lora_B matrix. {_REMEDY}")
    return LoraUnsupported(f"{name!r} comes from {option}, which is not supported. {_REMEDY}")


def _pair(path: str, pair: Mapping[str, Tensor], spec: LoraSpec, targets: Mapping[str, tuple[int, int]]) -> LoraPair:
    if path not in targets:
        raise ManifestMismatch(
            f"the model has no linear layer {path!r}.{did_you_mean(path, targets)} "
            "Names must be the trainer's Hugging Face parameter names."
        )
    if len(pair) != 2:
        have, lack = ("A", "B") if "A" in pair else ("B", "A")
        raise ManifestMismatch(f"{path}: lora_{have} came without lora_{lack}. Send both, also a frozen one.")
    if path not in spec.scaling:
        raise ManifestMismatch(f"{path}: its scaling is missing. Pass scaling for every module, or none.")
    factor = float(spec.scaling[path])
    if not math.isfinite(factor):
        raise ManifestMismatch(f"{path}: its scaling is {factor}. Pass a finite factor, such as lora_alpha / r.")
    a, b, (rows, columns) = pair["A"], pair["B"], targets[path]
    fits = (
        a.ndim == b.ndim == 2
        and a.shape[0] > 0
        and a.shape[1] == columns
        and b.shape[0] == rows
        and a.shape[0] == b.shape[1]
    )
    if not fits:
        raise ManifestMismatch(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit; "
            f"expected [r, {columns}] and [{rows}, r]. Push an adapter of the served model."
        )
    return LoraPair(a, b, factor)
