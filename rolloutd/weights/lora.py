"""LoRA adapters: which kinds can be served exactly, their scaling, and their pairs of matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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


_REMEDY = "Train without it, or push full weights with update_weights."


def check_peft_config(config: Mapping[str, Any]) -> None:
    """Raise `LoraUnsupported`, naming the option, for an adapter that is more than pairs on linear layers."""
    peft_type = str(getattr(config.get("peft_type"), "value", config.get("peft_type") or "LORA"))
    if peft_type.upper() != "LORA":
        raise LoraUnsupported(f"peft_type={peft_type} is not supported; only LORA is. {_REMEDY}")
    for option in ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens"):
        if config.get(option):
            raise LoraUnsupported(f"{option}={config[option]!r} is not supported. {_REMEDY}")
    for option in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        if config.get(option):
            value = config[option]
            shown = sorted(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else value
            raise LoraUnsupported(f"{option}={shown!r} is not supported. {_REMEDY}")
    if config.get("bias", "none") != "none":
        raise LoraUnsupported(f"bias={config['bias']!r} is not supported; use bias='none'. {_REMEDY}")
    targets = config.get("target_modules")
    names = {targets} if isinstance(targets, str) else set(targets or ())
    for name in sorted(names):
        if name.split(".")[-1] in ("lm_head", "embed_tokens"):
            raise LoraUnsupported(f"target_modules names {name!r}; embeddings and head are not supported. {_REMEDY}")


def scaling_from_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return each module's factor: alpha / r, or alpha / sqrt(r) with rslora; alpha may differ by `alpha_pattern`.

    `ranks` maps module paths to the rank of their A matrix, which `rank_pattern` may have set.
    """
    default_alpha = float(config.get("lora_alpha", 8))
    patterns = dict(config.get("alpha_pattern") or {})
    result = {}
    for path, rank in ranks.items():
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
            raise LoraUnsupported(f"{name!r} is no lora_A or lora_B matrix. {_REMEDY}")
        sides.setdefault(split[0], {})[split[1]] = tensor
    if not sides:
        raise ManifestMismatch("the adapter holds no lora_A and lora_B matrices. Send the trainable LoRA parameters.")
    needless = sorted(set(spec.scaling) - set(sides))
    if needless:
        raise ManifestMismatch(f"scaling names {needless[0]!r}, for which no matrices came.")
    return {path: _pair(path, pair, spec, targets) for path, pair in sides.items()}


def _pair(path: str, pair: Mapping[str, Tensor], spec: LoraSpec, targets: Mapping[str, tuple[int, int]]) -> LoraPair:
    if path not in targets:
        raise ManifestMismatch(f"the model has no linear layer {path!r}.{did_you_mean(path, targets)}")
    if len(pair) != 2:
        have, lack = ("A", "B") if "A" in pair else ("B", "A")
        raise ManifestMismatch(f"{path}: lora_{have} came without lora_{lack}. Send both.")
    if path not in spec.scaling:
        raise ManifestMismatch(f"{path}: its scaling is missing. Pass scaling for every module, or none.")
    a, b, (rows, columns) = pair["A"], pair["B"], targets[path]
    fits = a.ndim == b.ndim == 2 and a.shape[1] == columns and b.shape[0] == rows and a.shape[0] == b.shape[1]
    if not fits:
        raise ManifestMismatch(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit; "
            f"expected [r, {columns}] and [{rows}, r]."
        )
    return LoraPair(a, b, float(spec.scaling[path]))
