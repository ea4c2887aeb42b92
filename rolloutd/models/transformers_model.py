"""transformers' own modelling code over our paged KV cache: the fallback for architectures that have no decoder here.

The module that transformers builds keeps its buffers and gives its parameters away: they live in `ModuleWeights` and
come back for the duration of a call, by `torch.func.functional_call`. It is cut in two at the decoder's output. The
decoder runs over packed tokens; what follows it (head, scaling, capping) is the model's own forward with a `_Stub`
in the decoder's place, which hands the hidden state through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.kv_cache import KVCache, KVLayer
from rolloutd.runtime.ops import Ops
from rolloutd.weights.lora import LoraPair
from rolloutd.weights.packing import Precision

from .model import FinishedBy, Packing
from .module_weights import ModuleNames, ModuleWeights, adapter_dtype, linear_maps, merged
from .paged_interface import AttentionLayer, PagedCall, paged


class _Stub(nn.Module):
    """Stands where the decoder was: its output is what it gets as `input_ids`."""

    def __init__(self, output_type: type[Any]) -> None:
        super().__init__()
        self._output_type = output_type

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._output_type(last_hidden_state=input_ids)


class TransformersModel:
    """A causal LM of transformers, taken apart; see `transformers_loading.py` for how it is made and checked."""

    def __init__(
        self,
        module: nn.Module,
        decoder_path: str,
        layers: tuple[AttentionLayer, ...],
        output_type: type[Any],
        vocab_size: int,
        precision: Precision,
        device: torch.device,
    ) -> None:
        """Take over `module`, a loaded causal LM with a decoder at `decoder_path`: its parameters leave it."""
        self._precision = precision
        self._device = device
        self._ops = Ops()
        self._layers = layers
        self._vocab_size = vocab_size
        self._names = ModuleNames(module)
        self._prefix = f"{decoder_path}."
        self._linears = linear_maps(module, self._prefix)
        self._decoder = module.get_submodule(decoder_path)
        self._decoder_names, self._head_names = self._names.split(self._prefix)
        _forget_parameters(module)
        module.set_submodule(decoder_path, _Stub(output_type))
        self._head = module

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def num_activations(self) -> int:
        widest = max((linear.rows + linear.columns for linear in self._linears.values()), default=0)
        attention = max(layer.kv.num_heads * (layer.kv.key_dim + layer.kv.value_dim) for layer in self._layers)
        return 3 * (widest + attention)

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        return tuple(layer.kv for layer in self._layers)

    @property
    def lora_targets(self) -> Mapping[str, tuple[int, int]]:
        return {path: (linear.rows, linear.columns) for path, linear in self._linears.items()}

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ManifestMismatch` unless the model has a parameter of this name and shape."""
        self._names.check(name, shape)

    def check_complete(self, names: Collection[str]) -> None:
        """Raise `ManifestMismatch` naming what these tensors lack of a whole version."""
        self._names.check_complete({self._names.canonical.get(name, name) for name in names})

    @property
    def keeps_spare(self) -> bool:
        return False

    def packing(self, spare: ModuleWeights | None = None) -> Packing[ModuleWeights]:
        """Return new weights that are still to be filled, in the memory of `spare`, which nobody reads any more.

        Buffers that do not come stay the checkpoint's.
        """
        # A trainer that casts its head to fp32 trains it there, also where it is tied and the embedding rounds it.
        wide = dict.fromkeys(self._head_names.values(), torch.float32) if self._fp32_head else {}
        memory = {} if spare is None else spare.tensors
        return FinishedBy(self._names.collecting(self._device, wide, memory), self.adopt)

    def parameter(self, weights: ModuleWeights, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return a tensor as it is held; None where that is in another dtype."""
        tensor = weights.tensors.get(self._names.canonical.get(name, name))
        return tensor if tensor is not None and tensor.dtype == dtype and tensor.is_contiguous() else None

    def adopt(self, tensors: Mapping[str, Tensor]) -> ModuleWeights:
        """Return weights that hold these very tensors: every parameter, and what of the persistent buffers differs."""
        tensors = {**self._names.buffers, **tensors}
        decoder = {name: self._names.rounded(target, tensors[target]) for name, target in self._decoder_names.items()}
        head = {name: tensors[target] for name, target in self._head_names.items()}
        if self._fp32_head:
            head = {name: tensor.float() for name, tensor in head.items()}
        return ModuleWeights(tensors, decoder, head)

    @property
    def _fp32_head(self) -> bool:
        """The head is asked for in another dtype than the matrices'."""
        return self._precision.head == torch.float32 != self._precision.matrix

    def with_adapter(self, base: ModuleWeights, pairs: Mapping[str, LoraPair], *, merge: bool) -> ModuleWeights:
        """Return `base` with an adapter beside its linear layers or merged into copies of their weights."""
        placed = {path: self._placed(pair) for path, pair in pairs.items()}
        if not merge:
            return replace(base, adapters=placed)
        tensors = dict(base.tensors)
        for path, pair in placed.items():
            name = self._names.canonical[f"{path}.weight"]
            tensors[name] = merged(tensors[name], pair, transposed=self._linears[path].transposed)
        return self.adopt(tensors)

    def relocated(self, weights: ModuleWeights, move: Callable[[Tensor], Tensor]) -> ModuleWeights:
        """Return the same weights in other memory."""
        tensors, decoder, head = (
            {name: move(tensor) for name, tensor in part.items()}
            for part in (weights.tensors, weights.decoder, weights.head)
        )
        adapters = {path: LoraPair(move(p.a), move(p.b), p.scaling) for path, p in weights.adapters.items()}
        return ModuleWeights(tensors, decoder, head, adapters)

    def _placed(self, pair: LoraPair) -> LoraPair:
        dtype = adapter_dtype(pair, self._precision)
        a, b = (side.to(device=self._device, dtype=dtype, copy=True) for side in (pair.a, pair.b))
        return LoraPair(a, b, pair.scaling)

    def install(self, weights: ModuleWeights) -> None:
        """Nothing is left for the flip."""

    def forward(self, weights: ModuleWeights, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """Return the hidden state before the head, and write the step's keys and values to `cache`."""
        options = {"input_ids": inputs.token_ids_T[None], "position_ids": inputs.positions_T[None]}
        call = PagedCall(self._ops, inputs, cache, self._layers)
        with paged(call), self._autocast(), self._adapted(weights.adapters):
            output = functional_call(self._decoder, dict(weights.decoder), (), options, tie_weights=False)
        assert call.num_calls == len(self._layers), "fewer attention layers than at load"
        hidden_TE: Tensor = output.last_hidden_state[0]
        return hidden_TE if inputs.last_rows is None else hidden_TE[inputs.last_rows.rows_R]

    def logits(self, weights: ModuleWeights, hidden_RE: Tensor) -> Tensor:
        """Return logits [R, V] of rows of the hidden state, with all that the model's forward does to them."""
        hidden_RE = hidden_RE.float() if self._fp32_head else hidden_RE
        with self._autocast(enabled=not self._fp32_head):
            options = {"input_ids": hidden_RE[None]}
            output = functional_call(self._head, dict(weights.head), (), options, tie_weights=False)
        logits_RV: Tensor = output.logits[0]
        return logits_RV

    def head(self, weights: ModuleWeights) -> None:
        """Return nothing: what the module does after its decoder is its own."""

    def _autocast(self, *, enabled: bool = True) -> AbstractContextManager[Any]:
        return autocast(self._precision, self._device, enabled=enabled)

    @contextmanager
    def _adapted(self, adapters: Mapping[str, LoraPair]) -> Iterator[None]:
        """Add each adapter's product to the output of its linear map, for the duration of a call."""
        handles = []
        try:
            for path, pair in adapters.items():
                linear = self._decoder.get_submodule(path.removeprefix(self._prefix))
                handles.append(linear.register_forward_hook(_Beside(pair)))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Beside:
    """A forward hook: y + scaling * B (A x), rounded to y's dtype."""

    def __init__(self, pair: LoraPair) -> None:
        self._pair = pair

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        pair = self._pair
        delta = F.linear(F.linear(args[0].to(pair.a.dtype), pair.a), pair.b) * pair.scaling
        return (output + delta).to(output.dtype)


def autocast(precision: Precision, device: torch.device, *, enabled: bool = True) -> AbstractContextManager[Any]:
    """Return torch's autocast where the precision is `autocast`, else a context that changes nothing."""
    wanted = enabled and precision.matrix != precision.residual
    return torch.autocast(device.type, dtype=precision.matrix, enabled=wanted, cache_enabled=False)


def _forget_parameters(module: nn.Module) -> None:
    """Replace parameters by empty ones on the meta device, tied ones by one."""
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in empty:
                empty[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            part._parameters[name] = None if parameter is None else empty[parameter]
