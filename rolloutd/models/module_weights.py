"""Weights of a transformers module: one version is a dict of tensors under the module's own parameter names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rolloutd.errors import ManifestMismatch, did_you_mean
from rolloutd.weights.lora import LoraPair
from rolloutd.weights.packing import Precision


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """All parameters of one weight version; replaced as a whole, never written after they were packed."""

    tensors: Mapping[str, Tensor]
    """Parameters and persistent buffers by name; of tied ones the first name alone."""
    decoder: Mapping[str, Tensor]
    """The decoder's share of `tensors`, by its names inside the decoder, in the decoder's dtypes."""
    head: Mapping[str, Tensor]
    """What stands after the decoder, by its names there, in the head's dtype."""
    adapters: Mapping[str, LoraPair] = field(default_factory=dict)
    """Module path -> adapter beside that linear map."""

    def _unique(self) -> Iterable[Tensor]:
        every = [*self.tensors.values(), *self.decoder.values(), *self.head.values()]
        every += [side for pair in self.adapters.values() for side in (pair.a, pair.b)]
        return {id(tensor): tensor for tensor in every}.values()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._unique())

    @property
    def num_parameters(self) -> int:
        adapters = sum(pair.a.numel() + pair.b.numel() for pair in self.adapters.values())
        return sum(tensor.numel() for tensor in self.tensors.values()) + adapters


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor goes: its shape and the dtype in which transformers keeps it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class ModuleNames:
    """Which tensors a module has under which names, and which names stand for one tensor."""

    def __init__(self, module: nn.Module) -> None:
        first: dict[int, str] = {}
        self.canonical: dict[str, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self.canonical[name] = first.setdefault(id(parameter), name)
        state = module.state_dict()
        named = dict(module.named_parameters())
        self.parameters = {name: Slot(tuple(p.shape), p.dtype) for name, p in named.items()}
        self.buffers = {name: tensor for name, tensor in module.named_buffers() if name in state}
        """Persistent buffers of the checkpoint; an update may bring those that are floating point, and need not."""

    def split(self, prefix: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return what lies under `prefix`, by its names below it, and what does not; each with its canonical name."""
        inside, outside = {}, {}
        for name, target in {**self.canonical, **{name: name for name in self.buffers}}.items():
            if name.startswith(prefix):
                inside[name.removeprefix(prefix)] = target
            else:
                outside[name] = target
        return inside, outside

    def _slot(self, name: str) -> Slot | None:
        if name in self.canonical:
            return self.parameters[self.canonical[name]]
        buffer = self.buffers.get(name)
        return Slot(tuple(buffer.shape), buffer.dtype) if buffer is not None and buffer.is_floating_point() else None

    def rounded(self, target: str, tensor: Tensor) -> Tensor:
        """Return the tensor in the dtype in which the module keeps it."""
        slot = self.parameters.get(target)
        return tensor if slot is None else tensor.to(slot.dtype)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ManifestMismatch` unless the module has a tensor of this name and shape."""
        slot = self._slot(name)
        if slot is None:
            raise ManifestMismatch(
                f"the model has no tensor {name!r}.{did_you_mean(name, self.parameters)} "
                "Names must be the trainer's Hugging Face parameter names."
            )
        if shape != slot.shape:
            raise ManifestMismatch(
                f"{name} has shape {list(shape)}, the model's is {list(slot.shape)}. Push the served model's weights."
            )

    def collecting(
        self, device: torch.device, dtypes: Mapping[str, torch.dtype], memory: Mapping[str, Tensor]
    ) -> Collecting:
        """Return an empty collection of a whole version; tensors take the module's dtypes, or what `dtypes` says.

        Those of `memory` are written over.
        """
        return Collecting(self, device, dtypes, memory)

    def slot_of(self, name: str) -> tuple[str, Slot]:
        """Return canonical name and slot of a tensor that passed `check`."""
        slot = self._slot(name)
        assert slot is not None
        return self.canonical.get(name, name), slot

    def check_complete(self, seen: set[str]) -> None:
        missing = sorted(set(self.parameters) - seen)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ManifestMismatch(
                f"{len(missing)} of {len(self.parameters)} tensors are missing: {', '.join(missing[:3])}{more}. "
                "A full update carries every parameter; use update_lora for an adapter."
            )


class Collecting:
    """Copies of a version's tensors by canonical name; where several of tied names come, that one."""

    def __init__(
        self,
        names: ModuleNames,
        device: torch.device,
        dtypes: Mapping[str, torch.dtype],
        memory: Mapping[str, Tensor],
    ) -> None:
        self._names, self._device, self._dtypes, self._memory = names, device, dtypes, memory
        self._tensors: dict[str, Tensor] = {}
        self._places: dict[str, Tensor] = {}

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> Tensor | None:
        """Return where the bytes of a tensor go, if they may be written there as they are."""
        self._names.check(name, shape)
        target, slot = self._names.slot_of(name)
        if self._device.type != device_type or dtype != self._dtypes.get(target, slot.dtype) or target != name:
            return None
        self._places[name] = self._room(name, shape, dtype)
        return self._places[name]

    def _room(self, target: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        old = self._memory.get(target)
        fits = old is not None and (old.shape, old.dtype) == (shape, dtype) and old.is_contiguous()
        if old is None or not fits or old.device.type != self._device.type:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return old[:]

    def placed(self, name: str) -> None:
        """Take note that a tensor lies at its place."""
        self._tensors[name] = self._places.pop(name)

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor; `ManifestMismatch` for one that the module does not have."""
        self._names.check(name, tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise ManifestMismatch(f"{name} has dtype {tensor.dtype}. Weights must be float32, bfloat16 or float16.")
        target, slot = self._names.slot_of(name)
        if target == name or target not in self._tensors:
            room = self._room(target, slot.shape, self._dtypes.get(target, slot.dtype))
            self._tensors[target] = room.copy_(tensor)

    def keep(self, name: str, tensor: Tensor) -> bool:
        """Take note that a tensor lies at its place already; False, and nothing noted, where it does not."""
        self._names.check(name, tuple(tensor.shape))
        target, slot = self._names.slot_of(name)
        room = self._room(target, slot.shape, self._dtypes.get(target, slot.dtype))
        if (room.data_ptr(), room.dtype) != (tensor.data_ptr(), tensor.dtype):
            return False
        self._tensors[target] = room
        return True

    def finish(self) -> dict[str, Tensor]:
        """Return the tensors; `ManifestMismatch` names what never came."""
        self._names.check_complete(set(self._tensors))
        return self._tensors


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A module that computes y = x W^T + b."""

    rows: int
    columns: int
    transposed: bool
    """W is stored [in, out], as in transformers' Conv1D."""


def linear_maps(module: nn.Module, prefix: str) -> dict[str, LinearMap]:
    """Return path -> map of every linear layer whose path begins with `prefix`."""
    from transformers.pytorch_utils import Conv1D

    result = {}
    for path, layer in module.named_modules():
        if not path.startswith(prefix):
            continue
        if isinstance(layer, nn.Linear):
            rows, columns = layer.weight.shape
            result[path] = LinearMap(rows, columns, transposed=False)
        elif isinstance(layer, Conv1D):
            columns, rows = layer.weight.shape
            result[path] = LinearMap(rows, columns, transposed=True)
    return result


def adapter_dtype(pair: LoraPair, precision: Precision) -> torch.dtype:
    """Return the dtype that PEFT multiplies adapters in: the matrix dtype, or in a pure bf16 model their own."""
    return precision.matrix if precision.residual == torch.float32 else pair.a.dtype


def merged(weight: Tensor, pair: LoraPair, *, transposed: bool) -> Tensor:
    """Return W + scaling * B A, rounded once to W's dtype."""
    delta = pair.scaling * (pair.b.float() @ pair.a.float())
    return (weight.float() + (delta.T if transposed else delta)).to(weight.dtype)
