"""What a decoder of the Llama family is: one frozen description, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rolloutd.errors import ModelUnsupported

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: how positions turn into angles."""

    rope_type: str
    theta: float
    hf_config: Any
    """The Hugging Face config, from which transformers' own functions compute scaled frequencies."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only model with RMSNorm, RoPE, grouped-query attention and a SiLU-gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each query and key head before RoPE (Qwen3)."""
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back attention reaches, itself included; None reaches all."""
    max_position_embeddings: int
    rope: RopeConfig


def check_architecture(architectures: list[str] | None, model: str, model_impl: str = "auto") -> str:
    """Return the architecture; `ModelUnsupported` where there is none, or none that `model_impl` allows.

    What is not native passes under `auto` and `transformers`: whether it runs is seen when it is loaded.
    """
    name = architectures[0] if architectures else None
    if name is None:
        raise ModelUnsupported(f"{model!r} is a model whose config.json names no architecture. Add `architectures`.")
    if model_impl == "native" and name not in SUPPORTED_ARCHITECTURES:
        raise ModelUnsupported(
            f"{model!r} is a {name}, which is not native, and model_impl='native'. "
            f"Native: {', '.join(SUPPORTED_ARCHITECTURES)}. Use --model-impl auto for transformers' own code."
        )
    return name


def decoder_config(architecture: str, hf: Any) -> DecoderConfig:
    """Return the description of a supported model; an option that would change its numbers unnoticed is an error."""
    _refuse_unknown_options(architecture, hf)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    attention_bias = bool(getattr(hf, "attention_bias", False))
    return DecoderConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=hf.intermediate_size,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        o_bias=architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(getattr(hf, "mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(architecture, hf),
        max_position_embeddings=hf.max_position_embeddings,
        rope=_rope(hf),
    )


def _refuse_unknown_options(architecture: str, hf: Any) -> None:
    activation = getattr(hf, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelUnsupported(f"{architecture} with hidden_act={activation!r}; only silu is supported.")
    if getattr(hf, "quantization_config", None) is not None:
        raise ModelUnsupported(f"{architecture} with quantized weights; use the unquantized checkpoint.")


def _windows(architecture: str, hf: Any) -> tuple[int | None, ...]:
    """Return the attention span of each layer, by the rules of transformers' own config classes."""
    num_layers: int = hf.num_hidden_layers
    window: int | None = getattr(hf, "sliding_window", None)
    if architecture == "LlamaForCausalLM" or not window:
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    layer_types = getattr(hf, "layer_types", None)
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if not getattr(hf, "use_sliding_window", False):
        return (None,) * num_layers
    return tuple(window if i >= hf.max_window_layers else None for i in range(num_layers))


def _rope(hf: Any) -> RopeConfig:
    parameters = dict(getattr(hf, "rope_parameters", None) or {})
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelUnsupported(f"rope_type={rope_type!r}; supported: {', '.join(ROPE_TYPES)}.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelUnsupported(f"partial_rotary_factor={parameters['partial_rotary_factor']}; only 1.0 is supported.")
    theta = parameters.get("rope_theta", getattr(hf, "rope_theta", 10000.0))
    return RopeConfig(rope_type=rope_type, theta=float(theta), hf_config=hf)
