"""The weights that serve, and at most one update on its way in: begin -> stage -> verify -> flip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal

import torch
from torch import Tensor

from rolloutd.errors import LoraUnsupported, ManifestMismatch, UpdateConflict, did_you_mean
from rolloutd.models.model import Model, Packing, W

from .delta import Delta, decode
from .lora import LoraPair, pair_up
from .manifest import ITEM_BYTES, LoraSpec, TensorSpec, WeightManifest
from .names import split_lora_name
from .relocation import Inventory, MemoryPlan, Relocation
from .staging import StagedUpdate
from .tensors import Bytes, bytes_of, flat_bytes, tensor_from

UpdateKind = Literal["full", "lora"]
Staging = Literal["device", "host", "none"]


@dataclass(frozen=True, slots=True)
class KeptAdapter:
    """An adapter as it came, to be put on whatever the base is then."""

    pairs: Mapping[str, LoraPair]
    """Module path -> its matrices."""
    merge: bool


class WeightStore(Generic[W]):
    """Holds the base weights (checkpoint, or the last full update) and builds new versions from staged bytes.

    A full update is packed beside what serves while its tensors come, so that little is left for the commit. Staging
    memory and serving memory are disjoint. Nothing here changes what serves: the caller flips to what `build` returns,
    between two steps. With `staging` `host` that is so until `build`, which writes verified tensors over the base; with
    `none` bytes land there at once, and until `build` returns nothing may be computed (`is_torn`).
    """

    def __init__(self, model: Model[W], base: W, staging: Staging = "device") -> None:
        self._model = model
        self._staging: Staging = staging
        self.is_torn = False
        """The base is neither the old version nor a new one: an update without staging has begun, or has failed."""
        self._base = base
        self._open: StagedUpdate | None = None
        self._packing: Packing[W] | None = None
        """The weights of a full update that is open, once a tensor of it has come."""
        self._retiring: W | None = None
        """The base before the last full update, until the new one serves."""
        self._spare: W | None = None
        """A base that is no more, whose memory the next one takes."""
        self._kind: UpdateKind = "full"
        self._policy: KeptAdapter | None = None
        """The adapter that was pushed last, if no full update came after it."""
        self._kept: dict[str, KeptAdapter] = {}
        self._base_digest = ""
        self._base_specs: tuple[TensorSpec, ...] = ()
        """The base as it was sent, once there was a full update."""

    def begin(self, update_id: str, kind: UpdateKind) -> None:
        """Open an update, or leave it open; `UpdateConflict` while another one is open."""
        if self._open is not None and self._open.update_id == update_id and self._kind == kind:
            return
        if self._open is not None:
            raise UpdateConflict(
                f"update {self._open.update_id} is open; {update_id} cannot begin. Commit or abort the first one."
            )
        self._kind = kind
        if kind == "full" and self._staging == "host":
            self._open = StagedUpdate(update_id, self._check_full)
        elif kind == "full":
            self._open = StagedUpdate(update_id, self._check_full, _Place(self._packing_of_update))
        else:
            self._open = StagedUpdate(update_id, self._check_lora)

    def delta_names(self, base_digest: str) -> list[str]:
        """Return the parameters whose bytes lie in the base as they were sent; none if that is another base."""
        if base_digest != self._base_digest or self._kind != "full" or self.is_torn:
            return []
        return [spec.name for spec in self._base_specs if self._base_tensor(spec) is not None]

    def stage(
        self, update_id: str, spec: TensorSpec, offset: int, data: Bytes, delta: Delta | None = None
    ) -> Callable[[], int] | None:
        """Land bytes of one tensor; a name, shape or dtype that the model does not have is refused at once.

        Returns what gives the digest of a parameter that comes in one piece.
        """
        staged = self._named(update_id)
        if self._kind == "full" and self._staging == "none":
            self._check_full(spec)
            self.is_torn = True
        if delta is not None:
            data = bytes_of(data) if isinstance(data, Tensor) else data
            with self._base_bytes(spec, offset, delta.num_bytes) as old:
                data = memoryview(decode(spec, delta, data, old))
        return staged.write(spec, offset, data)

    def _base_tensor(self, spec: TensorSpec) -> Tensor | None:
        return self.parameter(spec.name, getattr(torch, spec.dtype))

    def _base_bytes(self, spec: TensorSpec, offset: int, num_bytes: int) -> memoryview:
        """Return bytes of a tensor as it is in the base; `ManifestMismatch` where it is not there in this dtype."""
        size = ITEM_BYTES.get(spec.dtype, 0)
        tensor = self._base_tensor(spec) if size and spec in self._base_specs else None
        if tensor is None:
            raise ManifestMismatch(
                f"{spec.name} came as a delta, and no {spec.dtype} {list(spec.shape)} of it was sent before. Push "
                "again, without delta."
            )
        if offset % size or num_bytes % size or not 0 <= offset <= offset + num_bytes <= spec.num_bytes:
            raise ManifestMismatch(
                f"{spec.name}: a delta for bytes {offset} to {offset + num_bytes} of {spec.num_bytes}. Cut it at "
                f"elements of {size} bytes, within the tensor's size."
            )
        return bytes_of(tensor.reshape(-1)[offset // size : (offset + num_bytes) // size])

    def abort(self, update_id: str) -> None:
        """Drop what was staged; nothing happens if no such update is open."""
        if self._open is not None and self._open.update_id == update_id:
            self._open = self._packing = None

    def build(self, update_id: str, manifest: WeightManifest, lora: LoraSpec | None) -> W:
        """Verify what landed and return the weights to serve from now on; the update is closed, also by an error."""
        staged, packing = self._named(update_id), self._packing
        self._open = self._packing = None
        tensors = staged.verify(manifest)
        if self._kind == "full":
            if self._staging != "device":
                self._model.check_complete(manifest.digests)
            if packing is None:
                packing = self._new_packing()
            for name, tensor in tensors.items():
                packing.add(name, tensor)
            built = packing.finish()
            self._retiring, self._base = self._base if self._staging == "device" else None, built
            self.is_torn = False
            self._base_digest, self._base_specs = manifest.digest, staged.specs()
            self._policy = None
            return built
        self._policy = self._paired(tensors, lora)
        return self._adapted(self._policy)

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return where a parameter of the base lies; None where it is held otherwise."""
        return self._model.parameter(self._base, name, dtype)

    def can_rebuild(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether all of these lie where the base is read, so that `rebuild` will find them there."""
        packing = self._model.packing(self._base)
        return all(packing.keep(name, tensor) for name, tensor in tensors.items())

    def rebuild(self, tensors: Mapping[str, Tensor]) -> W:
        """Return the base anew, whose parameters were written where they lie; `ManifestMismatch` where one was not."""
        if self._open is not None:
            raise UpdateConflict(f"update {self._open.update_id} is open. Commit or abort it first.")
        packing = self._model.packing(self._base)
        for name, tensor in tensors.items():
            if not packing.keep(name, tensor):
                raise ManifestMismatch(f"{name} does not lie where the engine reads it. Adopt the module again.")
        self._base = packing.finish()
        self._kind, self._policy, self._retiring = "full", None, None
        self._base_digest = ""
        return self._base

    def keep(self, update_id: str, manifest: WeightManifest, lora: LoraSpec | None, adapter: str) -> None:
        """Verify what landed and keep it under a name; the update is closed, also by an error."""
        staged = self._named(update_id)
        self._open = self._packing = None
        if self._kind == "full":
            raise ManifestMismatch(f"adapter={adapter!r} came with a full update. Push it with update_lora.")
        self._kept[adapter] = self._paired(staged.verify(manifest), lora)

    def forget(self, adapter: str) -> None:
        """Drop an adapter that was kept."""
        del self._kept[adapter]

    def policy(self) -> W:
        """Return the weights that were pushed last, or the checkpoint's."""
        return self._base if self._policy is None else self._adapted(self._policy)

    def base(self) -> W:
        """Return the weights without an adapter."""
        return self._base

    def with_kept(self, adapter: str) -> W:
        """Return the base with an adapter that was kept."""
        return self._adapted(self._kept[adapter])

    def adopt(self, serving: W) -> None:
        """Take what serves after a full update as the base: a runner may have copied it to where the old one lay.

        An adapter's weights are no base; they change nothing here.
        """
        if self._kind == "full":
            is_new = self._base is serving
            self._spare = self._retiring if is_new and self._model.keeps_spare else None
            self._retiring, self._base = None, serving

    def forget_spare(self) -> None:
        """Give back the memory that is kept for the next full update."""
        self._spare = None

    def _new_packing(self) -> Packing[W]:
        if self._staging != "device":
            return self._model.packing(self._base)
        spare, self._spare = self._spare, None
        return self._model.packing(spare)

    @property
    def overwrites(self) -> bool:
        """Whether a full update is written over what serves: in one go as it is built, or as its bytes land."""
        return self._staging != "device" and self._kind == "full"

    def is_open(self) -> bool:
        """Whether an update is on its way."""
        return self._open is not None

    def plan(self, specs: Sequence[TensorSpec]) -> MemoryPlan:
        """Return how the base would lie in memory of others; `ManifestMismatch` for a parameter it holds otherwise."""
        inventory, places = self._inventory(), []
        for spec in specs:
            self._model.check(spec.name, spec.shape)
            tensor = self._base_tensor(spec) if spec.dtype in ITEM_BYTES else None
            if tensor is None:
                raise ManifestMismatch(f"{spec.name} is not held in {spec.dtype}. Adopt a module of its dtype.")
            places.append((inventory.index_of(tensor), int(tensor.storage_offset())))
        return MemoryPlan(inventory.sizes(), places)

    def relocate_into(self, serving: W, memory: Sequence[Tensor]) -> W:
        """Move the base into memory of the sizes that were planned; return what serves, which shares it as before."""
        inventory = self._inventory()
        if inventory.sizes() != [room.nbytes for room in memory]:
            raise ManifestMismatch("the memory is not of the sizes that were planned. Adopt again.")
        places = dict(zip(inventory.storages, memory, strict=True))
        return self.relocate(serving, Relocation.into(places))

    def _inventory(self) -> Inventory:
        """Return the memory that the base lies in."""
        inventory = Inventory()
        self._model.relocated(self._base, inventory)
        return inventory

    def relocate(self, serving: W, move: Relocation) -> W:
        """Move the base and what serves and return the latter; what they share they share there too."""
        base, self._base = self._base, self._model.relocated(self._base, move)
        return self._base if serving is base else self._model.relocated(serving, move)

    def _packing_of_update(self) -> Packing[W]:
        if self._packing is None:
            self._packing = self._new_packing()
        return self._packing

    def _paired(self, tensors: Mapping[str, Tensor], lora: LoraSpec | None) -> KeptAdapter:
        if lora is None:
            raise ManifestMismatch("an adapter came without its scaling. Pass peft_config, or scaling per module.")
        return KeptAdapter(pair_up(tensors, lora, self._model.lora_targets), lora.mode == "merged")

    def _adapted(self, adapter: KeptAdapter) -> W:
        return self._model.with_adapter(self._base, adapter.pairs, merge=adapter.merge)

    def _named(self, update_id: str) -> StagedUpdate:
        if self._open is None or self._open.update_id != update_id:
            raise UpdateConflict(f"update {update_id} is not open. Begin a new one.")
        return self._open

    def _check_full(self, spec: TensorSpec) -> None:
        self._model.check(spec.name, spec.shape)

    def _check_lora(self, spec: TensorSpec) -> None:
        split = split_lora_name(spec.name)
        if split is None:
            raise LoraUnsupported(
                f"{spec.name!r} is no lora_A or lora_B matrix of a linear layer. Adapters may sit on the linear layers "
                "of attention and MLP; other changes need update_weights."
            )
        path, side = split
        targets = self._model.lora_targets
        if path not in targets:
            raise ManifestMismatch(f"the model has no linear layer {path!r}.{did_you_mean(path, targets)}")
        rows, columns = targets[path]
        expected = f"[r, {columns}]" if side == "A" else f"[{rows}, r]"
        if len(spec.shape) != 2 or spec.shape != ((spec.shape[0], columns) if side == "A" else (rows, spec.shape[1])):
            raise ManifestMismatch(f"{spec.name} has shape {list(spec.shape)}; {expected} fits the model.")
        rank = spec.shape[0] if side == "A" else spec.shape[1]
        if not 0 < rank <= max(rows, columns):
            raise ManifestMismatch(f"{spec.name} has rank {rank}; 1 to {max(rows, columns)} fit the model.")


class _Place:
    """The weights that a full update puts together, as bytes; they are begun with its first tensor."""

    def __init__(self, packing: Callable[[], Packing[Any]]) -> None:
        self._packing = packing

    def of(self, spec: TensorSpec, data: Bytes) -> Bytes | None:
        on_device = isinstance(data, Tensor)
        device_type = data.device.type if isinstance(data, Tensor) else "cpu"
        tensor = self._packing().place(spec.name, spec.shape, getattr(torch, spec.dtype), device_type)
        if tensor is None or not spec.num_bytes:
            return None
        return flat_bytes(tensor) if on_device else bytes_of(tensor)

    def filled(self, spec: TensorSpec) -> None:
        self._packing().placed(spec.name)

    def add(self, spec: TensorSpec, data: Bytes) -> None:
        self._packing().add(spec.name, tensor_from(spec, data))
