"""Packed parameters: how named tensors become the weights that a decoder reads, and how an adapter joins them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rolloutd.errors import ManifestMismatch

from .appended import AppendedLora, LoraSlice, append, cloned, reused, round_rank
from .lora import LoraPair
from .name_map import EMBEDDING, FINAL_NORM, HEAD, NameMap

if TYPE_CHECKING:
    from rolloutd.models.description import DecoderConfig


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
class Linear:
    """A packed linear map y = x W^T + b, and adapters on slices of y."""

    weight: Tensor
    bias: Tensor | None
    lora: tuple[LoraSlice, ...] = ()
    appended: AppendedLora | None = None
    """The same adapters, for ops that compute them in the map's own product."""


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP."""

    gate_up: Linear
    down: Linear

    def linears(self) -> Iterator[Linear]:
        yield from (self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of MLPs, and the one that every token goes through, if there is one."""

    router: Linear
    experts: tuple[Mlp, ...]
    shared: Mlp | None
    shared_gate: Linear | None

    def linears(self) -> Iterator[Linear]:
        yield self.router
        for expert in self.experts:
            yield from expert.linears()
        if self.shared is not None and self.shared_gate is not None:
            yield from (*self.shared.linears(), self.shared_gate)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; a norm is None where the family has none in its place."""

    attention_norm: Tensor | None
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_attention_norm: Tensor | None
    mlp_norm: Tensor | None
    mlp: Mlp | Experts
    post_mlp_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All parameters of one weight version; replaced as a whole, never written after it was built."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor
    packed: Mapping[str, Tensor]
    """The tensors that all of the above are, or are views of."""
    adapters: Mapping[str, tuple[LoraSlice, ...]] = field(default_factory=dict)
    """Packed linear map -> the adapters on it."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor once, adapters included."""
        yield from {id(tensor): tensor for tensor in self.packed.values()}.values()
        for slices in self.adapters.values():
            for cut in slices:
                yield from (cut.a, cut.b)

    def linears(self) -> Iterator[Linear]:
        """Yield every linear map that is computed, each expert's by itself."""
        yield Linear(self.head, None)
        for layer in self.layers:
            yield from (layer.qkv, layer.o, *layer.mlp.linears())

    def appended(self) -> Iterator[AppendedLora]:
        """Yield the adapters that lie below their weights."""
        yield from (linear.appended for linear in self.linears() if linear.appended is not None)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())


class Packer:
    """Packs a new version tensor by tensor, cast and moved, as the tensors come; each once or more, all in the end.

    Below the matrices that adapters sit on there are rows free for adapters of `max_lora_rank`. `ready` is told each
    packed linear map once all of it has come. `spare` are the packed tensors of a version that is no more, to be
    written over: on a CPU fresh memory costs more than the copy into it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        names: NameMap,
        precision: Precision,
        device: torch.device,
        *,
        max_lora_rank: int = 0,
        ready: Callable[[Linear], None] | None = None,
        spare: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._config, self._names, self._precision = config, names, precision
        self._packed = _buffers(config, names, precision, device, round_rank(max_lora_rank), spare or {})
        self._seen: set[str] = set()
        self._ready = ready
        self._missing = Counter(placement.target for placement in names.placements.values())
        """Packed tensor -> how many tensors of it have not come."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to its place."""
        self._names.check(name, tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise ManifestMismatch(f"{name} has dtype {tensor.dtype}. Weights must be float32, bfloat16 or float16.")
        rows = self._rows(name)
        if rows is not None:
            rows.copy_(tensor.reshape(rows.shape))
        self.placed(name)

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> Tensor | None:
        """Return where the bytes of a tensor go, if they may be written there as they are; `placed` says they were."""
        self._names.check(name, shape)
        rows = self._rows(name)
        return rows if rows is not None and (rows.device.type, rows.dtype) == (device_type, dtype) else None

    def _rows(self, name: str) -> Tensor | None:
        placement = self._names.placement(name)
        if placement is None:  # a tied head, for which the embedding stands
            return None
        return self._packed[placement.target][placement.start : placement.start + placement.rows]

    def placed(self, name: str) -> None:
        """Take note that a tensor lies at its place."""
        if name not in self._seen and name in self._names.placements:
            self._complete(self._names.placements[name].target)
        self._seen.add(name)

    def keep(self, name: str, tensor: Tensor) -> bool:
        """Take note that a tensor lies at its place already; False, and nothing noted, where it does not."""
        self._names.check(name, tuple(tensor.shape))
        rows = self._rows(name)
        if rows is None or (rows.data_ptr(), rows.dtype) != (tensor.data_ptr(), tensor.dtype):
            return False
        self.placed(name)
        return True

    def _complete(self, target: str) -> None:
        self._missing[target] -= 1
        path, _, kind = target.rpartition(".")
        is_map = target != EMBEDDING or self._embedding_is_head()
        is_linear = kind == "weight" and self._packed[target].dim() == 2 and is_map
        is_linear = is_linear and ".experts." not in target  # each expert is a map of its own
        if self._ready is not None and is_linear and not self._missing[target]:
            self._ready(Linear(self._packed[target], self._packed.get(f"{path}.bias")))

    def _embedding_is_head(self) -> bool:
        """Whether the head will be this very tensor."""
        return HEAD not in self._packed and self._packed[EMBEDDING].dtype == self._precision.head

    def finish(self) -> DecoderWeights:
        """Return the weights; `ManifestMismatch` names what never came."""
        self._names.check_complete(self._seen)
        packed, embedding = self._packed, self._packed[EMBEDDING]
        packed.setdefault(HEAD, embedding.to(self._precision.head))
        packed[EMBEDDING] = embedding.to(self._precision.residual)
        return _assemble(self._config, packed, {})


def _buffers(
    config: DecoderConfig,
    names: NameMap,
    precision: Precision,
    device: torch.device,
    rank: int,
    spare: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return packed tensors, to be filled, with rows for adapters of a rank below them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for placement in names.placements.values():
        rows = max(shapes.get(placement.target, (0,))[0], placement.start + placement.rows)
        shapes[placement.target] = (rows, *placement.shape[1:][-1:])
    packed = {}
    for target, shape in shapes.items():
        # Phi-3's projections are one map to PEFT: they have one adapter.
        parts = _part_starts(config, target.rpartition(".")[0], shape[0])
        num_adapters = min(len(parts), 1) if config.fused_projections else len(parts)
        fresh = shape, rank * num_adapters, _dtype(target, shape, precision), device
        packed[target] = reused(spare.get(target), *fresh)
    if HEAD not in packed:  # what comes for the embedding is the head as well
        both = torch.promote_types(precision.residual, precision.head)
        packed[EMBEDDING] = packed[EMBEDDING].to(both)
    return packed


def _dtype(target: str, shape: tuple[int, ...], precision: Precision) -> torch.dtype:
    if target == HEAD:
        return precision.head
    is_norm = len(shape) == 1 and "norm" in target
    # Autocast does not reach the grouped product of transformers' experts: it stays in the parameters' own dtype.
    in_residual = is_norm or target == EMBEDDING or ".experts." in target
    return precision.residual if in_residual else precision.matrix


def _part_starts(config: DecoderConfig, target: str, num_rows: int) -> tuple[int, ...]:
    """Return the columns at which the parts of a packed map begin that adapters are appended to; () for other maps."""
    kind = target.rpartition(".")[2]
    if ".experts." in target or not target.startswith("model.layers."):
        return ()
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    starts = {"qkv": (0, q_size, q_size + kv_size), "gate_up": (0, num_rows // 2), "o": (0,), "down": (0,)}
    return starts.get(kind, ())


@dataclass(frozen=True, slots=True)
class _Assembly:
    """Packed tensors and adapters by name, as the parts of a decoder that they are."""

    config: DecoderConfig
    packed: Mapping[str, Tensor]
    adapters: Mapping[str, tuple[LoraSlice, ...]]

    def linear(self, target: str) -> Linear:
        weight, bias = self.packed[f"{target}.weight"], self.packed.get(f"{target}.bias")
        slices = self.adapters.get(target, ())
        starts = _part_starts(self.config, target, weight.shape[0])
        return Linear(weight, bias, slices, append(weight, bias, slices, starts) if slices and starts else None)

    def mlp(self, path: str) -> Mlp:
        return Mlp(self.linear(f"{path}.gate_up"), self.linear(f"{path}.down"))

    def experts(self, path: str) -> tuple[Mlp, ...]:
        moe = self.config.moe
        assert moe is not None
        gate_up = torch.split(self.packed[f"{path}.gate_up.weight"], 2 * moe.expert_size)
        down = torch.split(self.packed[f"{path}.down.weight"], self.config.hidden_size)
        return tuple(Mlp(Linear(a, None), Linear(b, None)) for a, b in zip(gate_up, down, strict=True))

    def mixture(self, path: str) -> Experts:
        moe = self.config.moe
        shared = moe is not None and moe.shared_size is not None
        return Experts(
            router=self.linear(f"{path}.router"),
            experts=self.experts(f"{path}.experts"),
            shared=self.mlp(f"{path}.shared_expert") if shared else None,
            shared_gate=self.linear(f"{path}.shared_expert_gate") if shared else None,
        )

    def layer(self, i: int) -> LayerWeights:
        path, norms, moe = f"model.layers.{i}", self.config.norms, self.config.moe

        def norm(name: str | None) -> Tensor | None:
            return None if name is None else self.packed.get(f"{path}.{name}.weight")

        mixed = moe is not None and moe.layers[i]
        return LayerWeights(
            attention_norm=norm(norms.attention),
            qkv=self.linear(f"{path}.self_attn.qkv"),
            q_norm=norm("self_attn.q_norm"),
            k_norm=norm("self_attn.k_norm"),
            o=self.linear(f"{path}.self_attn.o"),
            post_attention_norm=norm(norms.post_attention),
            mlp_norm=norm(norms.mlp),
            mlp=self.mixture(f"{path}.mlp") if mixed else self.mlp(f"{path}.mlp"),
            post_mlp_norm=norm(norms.post_mlp),
        )


def _assemble(
    config: DecoderConfig, packed: Mapping[str, Tensor], adapters: Mapping[str, tuple[LoraSlice, ...]]
) -> DecoderWeights:
    parts = _Assembly(config, packed, adapters)
    layers = tuple(parts.layer(i) for i in range(config.num_layers))
    return DecoderWeights(packed[EMBEDDING], layers, packed[FINAL_NORM], packed[HEAD], packed, adapters)


def with_adapter(
    config: DecoderConfig,
    names: NameMap,
    base: DecoderWeights,
    pairs: Mapping[str, LoraPair],
    precision: Precision,
    *,
    merge: bool,
) -> DecoderWeights:
    """Return `base` with an adapter beside its matrices, or (`merge`) added into copies of them. `base` stays as it is.

    Unmerged, y = W x + b + scaling * B (A x), as PEFT computes it; merged, W' = W + scaling * B A is rounded once to
    W's dtype.
    """
    slices: dict[str, tuple[LoraSlice, ...]] = {}
    for path, pair in pairs.items():
        placement = names.placements[f"{path}.weight"]
        # Under autocast adapters multiply in the matrix dtype; in a pure bf16 model PEFT keeps them in their own.
        dtype = precision.matrix if precision.residual == torch.float32 else pair.a.dtype
        a, b = (tensor.to(device=base.head.device, dtype=dtype) for tensor in (pair.a, pair.b))
        cut = LoraSlice(placement.start, placement.start + placement.rows, a, b, pair.scaling)
        target = placement.target.removesuffix(".weight")
        slices[target] = (*slices.get(target, ()), cut)
    if not merge:
        return _assemble(config, base.packed, slices)
    merged = {f"{target}.weight": _merged(base.packed[f"{target}.weight"], cuts) for target, cuts in slices.items()}
    return _assemble(config, {**base.packed, **merged}, {})


def relocated(config: DecoderConfig, weights: DecoderWeights, move: Callable[[Tensor], Tensor]) -> DecoderWeights:
    """Return the same weights in other memory."""
    packed = {name: move(tensor) for name, tensor in weights.packed.items()}
    adapters = {
        path: tuple(replace(cut, a=move(cut.a), b=move(cut.b)) for cut in cuts)
        for path, cuts in weights.adapters.items()
    }
    return _assemble(config, packed, adapters)


def _merged(weight: Tensor, cuts: tuple[LoraSlice, ...]) -> Tensor:
    weight = cloned(weight)
    for cut in cuts:
        delta = cut.scaling * (cut.b.float() @ cut.a.float())
        weight[cut.start : cut.stop].copy_(weight[cut.start : cut.stop].float() + delta)
    return weight
