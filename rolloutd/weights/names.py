"""Trainer names to Hugging Face names: what DDP, FSDP, checkpointing, torch.compile and PEFT put around them."""

from __future__ import annotations

import re
from typing import Literal

_WRAPPERS = frozenset({"module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "base_layer"})
_PEFT_PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])\.weight$")
_LORA_WITH_ADAPTER = re.compile(r"\.lora_([AB])\.[^.]+\.(weight|bias)$")


def canonical_name(name: str) -> str:
    """Return the name that the bare Hugging Face model gives a parameter (or a module).

    Wrapper components are dropped wherever they stand, PEFT's prefix and its adapter name too:
    `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight` becomes
    `model.layers.0.self_attn.q_proj.lora_A.weight`.
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    name = name.removeprefix(_PEFT_PREFIX)
    return _LORA_WITH_ADAPTER.sub(r".lora_\1.\2", name)


def split_lora_name(canonical: str) -> tuple[str, Literal["A", "B"]] | None:
    """Return module path and side of an adapter matrix's canonical name; None for any other name."""
    match = _LORA.match(canonical)
    if match is None:
        return None
    return match["path"], "A" if match["side"] == "A" else "B"
