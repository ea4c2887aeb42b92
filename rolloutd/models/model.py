"""What the runner, the weight store and the engine need of an architecture, native or not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.kv_cache import KVCache, KVLayer
from rolloutd.weights.lora import LoraPair


class Weights(Protocol):
    """All parameters of one weight version; replaced as a whole, never written after they were packed."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_parameters(self) -> int: ...


W = TypeVar("W", bound=Weights)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class HeadMatrix:
    """Logits = hidden W^T, over the divisor, then softcap * tanh(logits / softcap)."""

    weight_VE: Tensor
    divisor: float
    softcap: float | None


class Packing(Protocol[T_co]):
    """A new version on its way: tensors come one by one, under Hugging Face names."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to its place; `ManifestMismatch` for one that the model does not have."""
        ...

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> Tensor | None:
        """Return where the bytes of a tensor go if they may be written there as they are; `placed` says that they were.

        None where they are cast on the way, or moved from a device of this type: `add` does that.
        """
        ...

    def placed(self, name: str) -> None:
        """Take note that a tensor lies at its place."""
        ...

    def keep(self, name: str, tensor: Tensor) -> bool:
        """Take note that a tensor lies at its place already; False, and nothing noted, where it does not."""
        ...

    def finish(self) -> T_co:
        """Return the weights; `ManifestMismatch` names what never came."""
        ...


class FinishedBy(Generic[T, W]):
    """A packing whose result becomes weights by one more step."""

    def __init__(self, packing: Packing[T], finish: Callable[[T], W]) -> None:
        self._packing = packing
        self._finish = finish
        self.add, self.place, self.placed = packing.add, packing.place, packing.placed
        self.keep = packing.keep

    def finish(self) -> W:
        """Return the weights; `ManifestMismatch` names what never came."""
        return self._finish(self._packing.finish())


class Model(Protocol[W]):
    """A function of weights, inputs and KV cache. It holds what weights never change: sizes, tables, rounding."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_activations(self) -> int:
        """Elements that are alive at once for one token, at the widest point of a layer."""
        ...

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]: ...

    @property
    def lora_targets(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (out, in) of every linear map that an adapter may sit on."""
        ...

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ManifestMismatch` unless the model has a parameter of this Hugging Face name and shape."""
        ...

    def check_complete(self, names: Collection[str]) -> None:
        """Raise `ManifestMismatch` naming what these tensors lack of a whole version."""
        ...

    @property
    def keeps_spare(self) -> bool:
        """Whether `packing` makes use of a version that is no more: where fresh memory costs more than to keep it."""
        ...

    def packing(self, spare: W | None = None) -> Packing[W]:
        """Return new weights that are still to be filled, in the memory of `spare`, which nobody reads any more."""
        ...

    def parameter(self, weights: W, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return a tensor as it lies in weights, dense in row order; None where they hold it in another dtype.

        None also for a name that the model does not have.
        """
        ...

    def with_adapter(self, base: W, pairs: Mapping[str, LoraPair], *, merge: bool) -> W:
        """Return `base` with an adapter, beside its matrices or merged into copies; `base` stays as it is."""
        ...

    def relocated(self, weights: W, move: Callable[[Tensor], Tensor]) -> W:
        """Return the same weights in other memory: each tensor as `move` gives it back."""
        ...

    def install(self, weights: W) -> None:
        """Finish what can only be done at the flip, between two steps: from now on these weights serve."""
        ...

    def forward(self, weights: W, inputs: ForwardInputs, cache: KVCache) -> Tensor:
        """Return the hidden state before the head, and write the step's keys and values to `cache`.

        It is [T, E], or has only `inputs.last_rows` where there are some.
        """
        ...

    def logits(self, weights: W, hidden_RE: Tensor) -> Tensor:
        """Return logits [R, V] of rows of the hidden state, in the dtype that the head rounds them to."""
        ...

    def head(self, weights: W) -> HeadMatrix | None:
        """Return what `logits` is made of, for a kernel that draws from it; None where it is more, or other."""
        ...


def pack(model: Model[W], tensors: Iterable[tuple[str, Tensor]]) -> W:
    """Return new weights of a model, from all of its tensors; `ManifestMismatch` for a wrong or missing one."""
    packing = model.packing()
    for name, tensor in tensors:
        packing.add(name, tensor)
    return packing.finish()
