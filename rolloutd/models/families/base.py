"""What every family reads alike from a Hugging Face config, and what none of them supports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rolloutd.errors import ModelUnsupported
from rolloutd.models.description import Activation, DecoderConfig, RopeConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def describe(architecture: str, hf: Any, **switches: Any) -> DecoderConfig:
    """Return the description of a plain decoder with the family's own fields over it."""
    if getattr(hf, "quantization_config", None) is not None:
        raise ModelUnsupported(f"{architecture} with quantized weights; use the unquantized checkpoint.")
    fields = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        "head_dim": head_dim(hf),
        "intermediate_size": hf.intermediate_size,
        "rms_norm_eps": hf.rms_norm_eps,
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        "max_position_embeddings": hf.max_position_embeddings,
        "windows": (None,) * hf.num_hidden_layers,
        "rope_of_layer": (0,) * hf.num_hidden_layers,
        "attention_scale": head_dim(hf) ** -0.5,
    }
    if "activation" not in switches:
        fields["activation"] = activation(architecture, hf, "hidden_act")
    if "ropes" not in switches:
        fields["ropes"] = (rope(architecture, hf),)
    return DecoderConfig(architecture=architecture, **{**fields, **switches})


def head_dim(hf: Any) -> int:
    """Return the size of a head."""
    size: int = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return size


def activation(architecture: str, hf: Any, option: str) -> Activation:
    """Return the activation that the config's `option` names; `ModelUnsupported` for others."""
    name = getattr(hf, option, "silu")
    if name not in _ACTIVATIONS:
        raise ModelUnsupported(f"{architecture} with {option}={name!r}; supported: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def refuse(architecture: str, hf: Any, *options: str) -> None:
    """Raise `ModelUnsupported` where one of the options is switched on."""
    for option in options:
        if getattr(hf, option, None):
            raise ModelUnsupported(f"{architecture} with {option}={getattr(hf, option)!r} is not supported.")


def rope(
    architecture: str,
    hf: Any,
    *,
    layer_type: str | None = None,
    types: Sequence[str] = ROPE_TYPES,
    partial: bool = False,
) -> RopeConfig:
    """Return the rotary embedding of the model, or of one kind of its layers; `ModelUnsupported` for other kinds."""
    parameters = dict(getattr(hf, "rope_parameters", None) or {})
    if layer_type is not None:
        parameters = dict(parameters[layer_type])
    rope_type = str(parameters.get("rope_type", parameters.get("type", "default")))
    if rope_type not in types:
        raise ModelUnsupported(f"{architecture} with rope_type={rope_type!r}; supported: {', '.join(types)}.")
    factor = parameters.get("partial_rotary_factor", 1.0)
    if factor != 1.0 and not partial:
        raise ModelUnsupported(f"{architecture} with partial_rotary_factor={factor}; only 1.0 is supported.")
    changes_at = {
        "dynamic": hf.max_position_embeddings,
        "longrope": parameters.get("original_max_position_embeddings"),
    }
    return RopeConfig(
        rope_type=rope_type,
        theta=float(parameters.get("rope_theta", getattr(hf, "rope_theta", 10000.0))),
        rotary_dim=int(head_dim(hf) * factor),
        max_positions=changes_at.get(rope_type),
        layer_type=layer_type,
        hf_config=hf,
    )


def ropes_by_type(architecture: str, hf: Any) -> dict[str, Any]:
    """Return `ropes` and `rope_of_layer` of a model whose sliding and full layers rotate differently."""
    kinds = sorted(set(hf.layer_types))
    return {
        "ropes": tuple(rope(architecture, hf, layer_type=kind) for kind in kinds),
        "rope_of_layer": tuple(kinds.index(kind) for kind in hf.layer_types),
    }


def same_window(hf: Any) -> tuple[int | None, ...]:
    """Return the attention span of each layer where `sliding_window` holds for all of them."""
    window: int | None = getattr(hf, "sliding_window", None) or None
    num_layers: int = hf.num_hidden_layers
    return (window,) * num_layers


def windows_by_type(architecture: str, hf: Any) -> tuple[int | None, ...]:
    """Return the attention span of each layer by `layer_types`; `ModelUnsupported` for types that are neither."""
    windows: list[int | None] = []
    for kind in hf.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelUnsupported(f"{architecture} with layer type {kind!r}; supported: full and sliding_attention.")
        window = hf.sliding_window if kind == "sliding_attention" else None
        if kind == "sliding_attention" and not window:
            raise ModelUnsupported(f"{architecture} with sliding layers, but sliding_window={window}. Set it.")
        windows.append(window)
    if len(windows) != hf.num_hidden_layers:
        raise ModelUnsupported(
            f"{architecture} with {len(windows)} layer_types for {hf.num_hidden_layers} layers. Correct config.json."
        )
    return tuple(windows)
