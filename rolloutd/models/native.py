"""A model whose decoder is ours: `DecoderConfig`, packed weights and `decoder.forward` behind the `Model` protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.kv_cache import KVCache, KVLayer
from rolloutd.runtime.ops import Ops
from rolloutd.weights.cores import landing_cores
from rolloutd.weights.lora import LoraPair
from rolloutd.weights.name_map import EMBEDDING, HEAD, NameMap
from rolloutd.weights.packing import DecoderWeights, Packer, Precision, relocated, with_adapter

from . import decoder
from .description import DecoderConfig
from .model import FinishedBy, HeadMatrix, Packing
from .rotary import RotaryTable


class NativeModel:
    """One of the families in `families/`."""

    def __init__(
        self,
        config: DecoderConfig,
        precision: Precision,
        ops: Ops,
        max_model_len: int,
        device: torch.device,
        max_lora_rank: int = 0,
    ) -> None:
        self.config = config
        self._max_lora_rank = max_lora_rank
        self._precision = precision
        self._ops = ops
        self._device = device
        self._names = NameMap(config)
        self._rotary = tuple(RotaryTable.build(rope, max_model_len, device) for rope in config.ropes)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_activations(self) -> int:
        c = self.config
        attention = 2 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim  # before and after RoPE
        mlp, mixture = 2 * c.intermediate_size, 0
        if c.moe is not None:
            outputs = c.moe.num_chosen * c.hidden_size  # of the experts, and weighed
            mixture = 2 * outputs + 2 * max(c.moe.expert_size, c.moe.shared_size or 0)
        return 4 * c.hidden_size + max(attention, mlp, mixture)

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        layer = KVLayer(self.config.num_kv_heads, self.config.head_dim, self.config.head_dim)
        return (layer,) * self.config.num_layers

    @property
    def lora_targets(self) -> Mapping[str, tuple[int, int]]:
        return self._names.lora_targets

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ManifestMismatch` unless the model has a parameter of this name and shape."""
        self._names.check(name, shape)

    def check_complete(self, names: Collection[str]) -> None:
        """Raise `ManifestMismatch` naming what these tensors lack of a whole version."""
        self._names.check_complete(names)

    @property
    def keeps_spare(self) -> bool:
        return self._device.type == "cpu"

    def packing(self, spare: DecoderWeights | None = None) -> Packing[DecoderWeights]:
        """Return new weights that are still to be filled, in the memory of `spare`, which nobody reads any more."""
        packer = Packer(
            self.config,
            self._names,
            self._precision,
            self._device,
            max_lora_rank=self._max_lora_rank,
            ready=lambda linear: self._ops.prepare([linear], (), landing_cores()),
            spare=None if spare is None else spare.packed,
        )
        return FinishedBy(packer, self._prepared)

    def parameter(self, weights: DecoderWeights, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return the rows of a packed tensor that a parameter is; None where they are of another dtype."""
        is_tied = self.config.tie_word_embeddings
        placement = self._names.placement(EMBEDDING if name == HEAD and is_tied else name)
        if placement is None:
            return None
        targets = [HEAD, EMBEDDING] if is_tied and placement.target == EMBEDDING else [placement.target]
        for target in targets:
            if weights.packed[target].dtype == dtype:
                rows = weights.packed[target][placement.start : placement.start + placement.rows]
                return rows.reshape(placement.shape)
        return None

    def with_adapter(self, base: DecoderWeights, pairs: Mapping[str, LoraPair], *, merge: bool) -> DecoderWeights:
        """Return `base` with an adapter beside its matrices or merged into copies of them."""
        return self._prepared(with_adapter(self.config, self._names, base, pairs, self._precision, merge=merge))

    def relocated(self, weights: DecoderWeights, move: Callable[[Tensor], Tensor]) -> DecoderWeights:
        """Return the same weights in other memory; ready to compute with, where that is the device's."""
        moved = relocated(self.config, weights, move)
        return self._prepared(moved) if moved.head.device.type == self._device.type else moved

    def _prepared(self, weights: DecoderWeights) -> DecoderWeights:
        self._ops.prepare(weights.linears(), self.kv_layers)
        return weights

    def install(self, weights: DecoderWeights) -> None:
        """Write adapters below the matrices that they are appended to."""
        for appended in weights.appended():
            appended.install()

    def forward(self, weights: DecoderWeights, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """Return the hidden state before the head, of all rows or of `inputs.last_rows`."""
        return decoder.forward(self.config, self._ops, weights, self._rotary, inputs, cache)

    def logits(self, weights: DecoderWeights, hidden_RE: Tensor) -> Tensor:
        """Return logits [R, V] in the head's dtype."""
        return decoder.logits(self.config, self._ops, weights, hidden_RE)

    def head(self, weights: DecoderWeights) -> HeadMatrix:
        """Return the head."""
        return HeadMatrix(weights.head, self.config.logits_divisor, self.config.logits_softcap)
