"""A model whose decoder is ours: `DecoderConfig`, packed weights and `decoder.forward` behind the `Model` protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.kv_cache import KVCache, KVLayer
from rolloutd.runtime.ops import Ops
from rolloutd.weights.lora import LoraPair
from rolloutd.weights.packing import DecoderWeights, NameMap, Precision, pack, with_adapter

from . import decoder
from .config import DecoderConfig


class NativeModel:
    """One of the families in `config.py`."""

    def __init__(
        self, config: DecoderConfig, precision: Precision, ops: Ops, max_model_len: int, device: torch.device
    ) -> None:
        self.config = config
        self._precision = precision
        self._ops = ops
        self._device = device
        self._names = NameMap(config)
        self._rotary = decoder.RotaryTable.build(config, max_model_len, device)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_activations(self) -> int:
        return 2 * self.config.intermediate_size + 4 * self.config.hidden_size

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

    def pack(self, tensors: Iterable[tuple[str, Tensor]]) -> DecoderWeights:
        """Return new packed weights from Hugging Face names."""
        return self._prepared(pack(self.config, tensors, self._precision, self._device))

    def with_adapter(self, base: DecoderWeights, pairs: Mapping[str, LoraPair], *, merge: bool) -> DecoderWeights:
        """Return `base` with an adapter beside its matrices or merged into copies of them."""
        return self._prepared(with_adapter(self.config, base, pairs, self._precision, merge=merge))

    def _prepared(self, weights: DecoderWeights) -> DecoderWeights:
        self._ops.prepare(tensor for tensor in weights.tensors() if tensor.ndim == 2)
        return weights

    def forward(self, weights: DecoderWeights, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """Return the hidden state before the head, [T, E]."""
        return decoder.forward(self.config, self._ops, weights, self._rotary, inputs, cache)

    def logits(self, weights: DecoderWeights, hidden_RE: Tensor) -> Tensor:
        """Return logits [R, V] in fp32."""
        return decoder.logits(self._ops, weights, hidden_RE)
