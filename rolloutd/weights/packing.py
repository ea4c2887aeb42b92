"""Hugging Face parameter names to packed parameters: the one name map, for checkpoints and for trainers.

Query, key and value matrices are rows of one matrix, so are gate and up: one product instead of three, or two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rolloutd.errors import ManifestMismatch, did_you_mean

from .lora import LoraPair

if TYPE_CHECKING:
    from rolloutd.models.config import DecoderConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Precision:
    """Where numbers are rounded: dtypes of matrix products, of what stands between them, and of the output head.

    A head that is tied to the embedding is kept at its own precision, the embedding at the residual's: a trainer that
    casts its head to fp32 trains the shared matrix in fp32 and rounds what the embedding gives.
    """

    matrix: torch.dtype
    residual: torch.dtype
    head: torch.dtype


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one Hugging Face tensor goes: rows `start : start + shape[0]` of the packed tensor `target`."""

    target: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraSlice:
    """An adapter pair whose product is added to the output columns `start : stop` of a packed linear map."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Linear:
    """A packed linear map y = x W^T + b, and adapters on slices of y."""

    weight: Tensor
    bias: Tensor | None
    lora: tuple[LoraSlice, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All parameters of one weight version; replaced as a whole, never written after it was built."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor, adapters included."""
        yield self.embedding
        for layer in self.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                yield linear.weight
                if linear.bias is not None:
                    yield linear.bias
                for pair in linear.lora:
                    yield from (pair.a, pair.b)
            norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
            yield from (norm for norm in norms if norm is not None)
        yield self.final_norm
        if self.head is not self.embedding:
            yield self.head

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())


class NameMap:
    """Which Hugging Face tensors a model has, their shapes, and where each one is packed."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config

    @cached_property
    def placements(self) -> dict[str, Placement]:
        """Every required tensor; a tied head is not among them."""
        c = self._config
        result = {EMBEDDING: Placement(EMBEDDING, 0, (c.vocab_size, c.hidden_size))}
        result["model.norm.weight"] = Placement("model.norm.weight", 0, (c.hidden_size,))
        if not c.tie_word_embeddings:
            result[HEAD] = Placement(HEAD, 0, (c.vocab_size, c.hidden_size))
        for i in range(c.num_layers):
            layer = f"model.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                result[f"{layer}.{norm}.weight"] = Placement(f"{layer}.{norm}.weight", 0, (c.hidden_size,))
            if c.qk_norm:
                for norm in ("q_norm", "k_norm"):
                    name = f"{layer}.self_attn.{norm}.weight"
                    result[name] = Placement(name, 0, (c.head_dim,))
            for path, (target, start, rows, columns, has_bias) in self._linears(layer).items():
                result[f"{path}.weight"] = Placement(f"{target}.weight", start, (rows, columns))
                if has_bias:
                    result[f"{path}.bias"] = Placement(f"{target}.bias", start, (rows,))
        return result

    def _linears(self, layer: str) -> dict[str, tuple[str, int, int, int, bool]]:
        """Return, for each linear map of a layer: packed name, first row, rows, columns, whether it has a bias."""
        c = self._config
        q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv, gate_up = f"{attention}.qkv", f"{mlp}.gate_up"
        e, f = c.hidden_size, c.intermediate_size
        return {
            f"{attention}.q_proj": (qkv, 0, q_rows, e, c.qkv_bias),
            f"{attention}.k_proj": (qkv, q_rows, kv_rows, e, c.qkv_bias),
            f"{attention}.v_proj": (qkv, q_rows + kv_rows, kv_rows, e, c.qkv_bias),
            f"{attention}.o_proj": (f"{attention}.o", 0, e, q_rows, c.o_bias),
            f"{mlp}.gate_proj": (gate_up, 0, f, e, c.mlp_bias),
            f"{mlp}.up_proj": (gate_up, f, f, e, c.mlp_bias),
            f"{mlp}.down_proj": (f"{mlp}.down", 0, e, f, c.mlp_bias),
        }

    @cached_property
    def lora_targets(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every linear map that an adapter may sit on."""
        layers = (f"model.layers.{i}" for i in range(self._config.num_layers))
        return {path: (rows, cols) for layer in layers for path, (_, _, rows, cols, _) in self._linears(layer).items()}

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ManifestMismatch` unless the model has a tensor of this name and shape."""
        if name == HEAD and self._config.tie_word_embeddings:
            expected: tuple[int, ...] = (self._config.vocab_size, self._config.hidden_size)
        elif name in self.placements:
            expected = self.placements[name].shape
        else:
            raise ManifestMismatch(
                f"the model has no tensor {name!r}.{did_you_mean(name, self.placements)} "
                "Names must be the trainer's Hugging Face parameter names."
            )
        if shape != expected:
            raise ManifestMismatch(
                f"{name} has shape {list(shape)}, the model's is {list(expected)}. Push the served model's weights."
            )

    def check_complete(self, names: Iterable[str]) -> None:
        """Raise `ManifestMismatch` naming what is missing."""
        missing = sorted(set(self.placements) - set(names))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ManifestMismatch(
                f"{len(missing)} of {len(self.placements)} tensors are missing: {', '.join(missing[:3])}{more}. "
                "A full update carries every parameter; use update_lora for an adapter."
            )


def pack(
    config: DecoderConfig, tensors: Iterable[tuple[str, Tensor]], precision: Precision, device: torch.device
) -> DecoderWeights:
    """Return new packed weights from named tensors, cast and moved; all of them must come, each once or more."""
    names = NameMap(config)
    buffers = _Buffers(names, precision, device)
    seen: set[str] = set()
    for name, tensor in tensors:
        names.check(name, tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise ManifestMismatch(f"{name} has dtype {tensor.dtype}. Weights must be float32, bfloat16 or float16.")
        seen.add(name)
        if name in names.placements:  # a tied head may come too; the embedding stands for it
            buffers.write(names.placements[name], tensor)
    names.check_complete(seen)
    return buffers.weights(config)


class _Buffers:
    """Packed tensors being filled."""

    def __init__(self, names: NameMap, precision: Precision, device: torch.device) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for placement in names.placements.values():
            rows = max(shapes.get(placement.target, (0,))[0], placement.start + placement.shape[0])
            shapes[placement.target] = (rows, *placement.shape[1:])
        self._precision = precision
        self._tied = HEAD not in names.placements
        self._tensors = {
            target: torch.empty(shape, dtype=self._dtype(target, shape), device=device)
            for target, shape in shapes.items()
        }

    def _dtype(self, target: str, shape: tuple[int, ...]) -> torch.dtype:
        if target == HEAD:
            return self._precision.head
        if target == EMBEDDING and self._tied:
            return torch.promote_types(self._precision.residual, self._precision.head)
        is_norm = len(shape) == 1 and "norm" in target
        return self._precision.residual if is_norm or target == EMBEDDING else self._precision.matrix

    def write(self, placement: Placement, tensor: Tensor) -> None:
        rows = slice(placement.start, placement.start + placement.shape[0])
        self._tensors[placement.target][rows].copy_(tensor)

    def _linear(self, target: str) -> Linear:
        return Linear(self._tensors[f"{target}.weight"], self._tensors.get(f"{target}.bias"))

    def weights(self, config: DecoderConfig) -> DecoderWeights:
        t = self._tensors
        embedding = t[EMBEDDING]
        head = t.get(HEAD)
        layers = []
        for i in range(config.num_layers):
            layer = f"model.layers.{i}"
            layers.append(
                LayerWeights(
                    attention_norm=t[f"{layer}.input_layernorm.weight"],
                    qkv=self._linear(f"{layer}.self_attn.qkv"),
                    q_norm=t.get(f"{layer}.self_attn.q_norm.weight"),
                    k_norm=t.get(f"{layer}.self_attn.k_norm.weight"),
                    o=self._linear(f"{layer}.self_attn.o"),
                    mlp_norm=t[f"{layer}.post_attention_layernorm.weight"],
                    gate_up=self._linear(f"{layer}.mlp.gate_up"),
                    down=self._linear(f"{layer}.mlp.down"),
                )
            )
        return DecoderWeights(
            embedding=embedding.to(self._precision.residual),
            layers=tuple(layers),
            final_norm=t["model.norm.weight"],
            head=embedding.to(self._precision.head) if head is None else head,
        )


_PACKED_MODULES = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}


def with_adapter(
    config: DecoderConfig, base: DecoderWeights, pairs: Mapping[str, LoraPair], precision: Precision, *, merge: bool
) -> DecoderWeights:
    """Return `base` with an adapter beside its matrices, or (`merge`) added into copies of them. `base` stays as it is.

    Unmerged, y = W x + b + scaling * B (A x), as PEFT computes it; merged, W' = W + scaling * B A is rounded once to
    W's dtype.
    """
    names = NameMap(config)
    slices: dict[str, list[LoraSlice]] = {}
    for path, pair in pairs.items():
        placement = names.placements[f"{path}.weight"]
        # Under autocast adapters multiply in the matrix dtype; in a pure bf16 model PEFT keeps them in their own.
        dtype = precision.matrix if precision.residual == torch.float32 else pair.a.dtype
        a, b = (tensor.to(device=base.head.device, dtype=dtype) for tensor in (pair.a, pair.b))
        cut = LoraSlice(placement.start, placement.start + placement.shape[0], a, b, pair.scaling)
        slices.setdefault(placement.target.removesuffix(".weight"), []).append(cut)
    attach = _merged if merge else _beside
    layers = []
    for i, layer in enumerate(base.layers):
        changed: dict[str, Any] = {}
        for name, parent in _PACKED_MODULES.items():
            cuts = slices.get(f"model.layers.{i}.{parent}.{name}")
            if cuts:
                changed[name] = attach(getattr(layer, name), tuple(cuts))
        layers.append(replace(layer, **changed) if changed else layer)
    return replace(base, layers=tuple(layers))


def _beside(linear: Linear, cuts: tuple[LoraSlice, ...]) -> Linear:
    return replace(linear, lora=cuts)


def _merged(linear: Linear, cuts: tuple[LoraSlice, ...]) -> Linear:
    weight = linear.weight.clone()
    for cut in cuts:
        delta = cut.scaling * (cut.b.float() @ cut.a.float())
        weight[cut.start : cut.stop].copy_(weight[cut.start : cut.stop].float() + delta)
    return replace(linear, weight=weight)
