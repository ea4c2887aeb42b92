"""Hugging Face parameter names to packed parameters: the one name map, for checkpoints and for trainers.

Query, key and value matrices are rows of one matrix, so are gate and up, and the experts of a layer: one product
instead of three, or two. The names that a model must have are those of the trainer's live module. Where checkpoints
name a parameter otherwise, or hold it in pieces (an expert's matrices), those names stand for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rolloutd.errors import ManifestMismatch, did_you_mean

if TYPE_CHECKING:
    from rolloutd.models.description import DecoderConfig, MoeConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one Hugging Face tensor goes: rows `start : start + rows` of the packed tensor `target`."""

    target: str
    start: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Leading dimensions as one: of a tensor of all experts, one expert lies under the other."""
        return self.shape[0] * self.shape[1] if len(self.shape) == 3 else self.shape[0]


@dataclass(frozen=True, slots=True)
class Slot:
    """A linear map of the trainer's module: rows `start : start + rows` of the packed map `target`."""

    target: str
    start: int
    rows: int
    columns: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class Alias:
    """What a checkpoint's name stands for: a required tensor, or a piece of one."""

    name: str
    placement: Placement


class NameMap:
    """Which Hugging Face tensors a model has, their shapes, and where each one is packed."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config

    @cached_property
    def placements(self) -> dict[str, Placement]:
        """Every required tensor by its name in the trainer's module; a tied head is not among them."""
        c = self._config
        result = {EMBEDDING: Placement(EMBEDDING, 0, (c.vocab_size, c.hidden_size))}
        result[FINAL_NORM] = Placement(FINAL_NORM, 0, (c.hidden_size,))
        if not c.tie_word_embeddings:
            result[HEAD] = Placement(HEAD, 0, (c.vocab_size, c.hidden_size))
        for i in range(c.num_layers):
            for name, size in self._norms(i):
                result[name] = Placement(name, 0, (size,))
            for path, slot in self._linears(i).items():
                result[f"{path}.weight"] = Placement(f"{slot.target}.weight", slot.start, (slot.rows, slot.columns))
                if slot.has_bias:
                    result[f"{path}.bias"] = Placement(f"{slot.target}.bias", slot.start, (slot.rows,))
            if c.moe is not None and c.moe.layers[i]:
                result.update(self._experts(c.moe, i))
        return result

    @cached_property
    def aliases(self) -> dict[str, Alias]:
        """Every further name under which checkpoints hold a required tensor, or a piece of one."""
        moe = self._config.moe
        if moe is None:
            return {}
        layers = (i for i in range(self._config.num_layers) if moe.layers[i])
        return {name: alias for i in layers for name, alias in self._pieces(moe, i)}

    @cached_property
    def lora_targets(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out, in) of every linear map that an adapter may sit on."""
        layers = range(self._config.num_layers)
        return {path: (slot.rows, slot.columns) for i in layers for path, slot in self._linears(i).items()}

    def placement(self, name: str) -> Placement | None:
        """Return where a tensor that passed `check` goes; None for a tied head, for which the embedding stands."""
        if name in self.placements:
            return self.placements[name]
        return self.aliases[name].placement if name in self.aliases else None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ManifestMismatch` unless the model has a tensor of this name and shape."""
        if name == HEAD and self._config.tie_word_embeddings:
            expected: tuple[int, ...] = (self._config.vocab_size, self._config.hidden_size)
        else:
            placement = self.placement(name)
            if placement is None:
                raise ManifestMismatch(
                    f"the model has no tensor {name!r}.{did_you_mean(name, self.placements)} "
                    "Names must be the trainer's Hugging Face parameter names."
                )
            expected = placement.shape
        if shape != expected:
            raise ManifestMismatch(
                f"{name} has shape {list(shape)}, the model's is {list(expected)}. Push the served model's weights."
            )

    def check_complete(self, names: Iterable[str]) -> None:
        """Raise `ManifestMismatch` naming what is missing."""
        seen = set(names)
        absent = set(self.placements) - seen
        covered: dict[str, list[str]] = {name: [] for name in absent}
        for piece, alias in self.aliases.items():
            if alias.name in absent:
                covered[alias.name].append(piece)
        missing = []
        for name, pieces in covered.items():
            lacking = [piece for piece in pieces if piece not in seen]
            missing += [name] if len(lacking) == len(pieces) else lacking
        if missing:
            missing.sort()
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ManifestMismatch(
                f"{len(missing)} of {len(self.placements)} tensors are missing: {', '.join(missing[:3])}{more}. "
                "A full update carries every parameter; use update_lora for an adapter."
            )

    def _norms(self, i: int) -> Iterator[tuple[str, int]]:
        """Yield name and size of each norm of a layer."""
        c, layer = self._config, f"model.layers.{i}"
        for norm in (c.norms.attention, c.norms.post_attention, c.norms.mlp, c.norms.post_mlp):
            if norm is not None:
                yield f"{layer}.{norm}.weight", c.hidden_size
        if c.qk_norm is not None:
            whole = c.qk_norm == "projection"
            yield f"{layer}.self_attn.q_norm.weight", c.head_dim * (c.num_heads if whole else 1)
            yield f"{layer}.self_attn.k_norm.weight", c.head_dim * (c.num_kv_heads if whole else 1)

    def _linears(self, i: int) -> dict[str, Slot]:
        """Return the linear maps of a layer by their module's path; experts are none, they are one parameter."""
        c, mlp = self._config, f"model.layers.{i}.mlp"
        slots = self._attention(f"model.layers.{i}.self_attn")
        if c.moe is None or not c.moe.layers[i]:
            return slots | self._mlp(mlp, c.intermediate_size)
        if c.moe.shared_size is not None:
            slots |= self._mlp(f"{mlp}.shared_expert", c.moe.shared_size)
            slots[f"{mlp}.shared_expert_gate"] = Slot(f"{mlp}.shared_expert_gate", 0, 1, c.hidden_size)
        return slots

    def _attention(self, path: str) -> dict[str, Slot]:
        c, qkv = self._config, f"{path}.qkv"
        e, q_rows, kv_rows = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        o = {f"{path}.o_proj": Slot(f"{path}.o", 0, e, q_rows, c.o_bias)}
        if c.fused_projections:
            return {f"{path}.qkv_proj": Slot(qkv, 0, q_rows + 2 * kv_rows, e, c.qkv_bias), **o}
        return {
            f"{path}.q_proj": Slot(qkv, 0, q_rows, e, c.qkv_bias),
            f"{path}.k_proj": Slot(qkv, q_rows, kv_rows, e, c.qkv_bias),
            f"{path}.v_proj": Slot(qkv, q_rows + kv_rows, kv_rows, e, c.qkv_bias),
            **o,
        }

    def _mlp(self, path: str, size: int) -> dict[str, Slot]:
        c, gate_up = self._config, f"{path}.gate_up"
        down = {f"{path}.down_proj": Slot(f"{path}.down", 0, c.hidden_size, size, c.mlp_bias)}
        if c.fused_projections:
            return {f"{path}.gate_up_proj": Slot(gate_up, 0, 2 * size, c.hidden_size, c.mlp_bias), **down}
        return {
            f"{path}.gate_proj": Slot(gate_up, 0, size, c.hidden_size, c.mlp_bias),
            f"{path}.up_proj": Slot(gate_up, size, size, c.hidden_size, c.mlp_bias),
            **down,
        }

    def _experts(self, moe: MoeConfig, i: int) -> dict[str, Placement]:
        """Return router and experts of a layer as the module holds them: three parameters."""
        mlp, x, e, f = f"model.layers.{i}.mlp", moe.num_experts, self._config.hidden_size, moe.expert_size
        return {
            f"{mlp}.gate.weight": Placement(f"{mlp}.router.weight", 0, (x, e)),
            f"{mlp}.experts.gate_up_proj": Placement(f"{mlp}.experts.gate_up.weight", 0, (x, 2 * f, e)),
            f"{mlp}.experts.down_proj": Placement(f"{mlp}.experts.down.weight", 0, (x, e, f)),
        }

    def _pieces(self, moe: MoeConfig, i: int) -> Iterator[tuple[str, Alias]]:
        """Yield router and experts of a layer as checkpoints hold them: three matrices for each expert."""
        whole, e, f = self._experts(moe, i), self._config.hidden_size, moe.expert_size
        router, gate_up, down = whole
        block = f"model.layers.{i}.{moe.names.block}"
        if moe.names.block != "mlp":
            yield f"{block}.gate.weight", Alias(router, whole[router])
        for x in range(moe.num_experts):
            expert = f"{block}.experts.{x}"
            for name, start in ((moe.names.gate, 2 * x * f), (moe.names.up, (2 * x + 1) * f)):
                yield f"{expert}.{name}.weight", Alias(gate_up, Placement(whole[gate_up].target, start, (f, e)))
            yield f"{expert}.{moe.names.down}.weight", Alias(down, Placement(whole[down].target, x * e, (e, f)))
