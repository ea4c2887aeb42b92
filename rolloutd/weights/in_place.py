"""Weights of a new version in the memory of the old one, for a device that has addresses written down."""

from __future__ import annotations

from torch import Tensor

from .packing import DecoderWeights, LoraSlice


def overwrite(serving: DecoderWeights, new: DecoderWeights) -> bool:
    """Copy `new` into the tensors of `serving`; False, and nothing changed, where that is not sound.

    It is sound where both have the same shapes, and the parameters are either all the same memory (so that adapters
    alone differ, which nobody else holds) or all other memory (a full update, after which nobody else holds the old
    parameters). An adapter merged into copies shares some: the rest may be the base that the next one is merged into.
    """
    old, fresh = serving.packed, new.packed
    if old.keys() != fresh.keys() or not all(_alike(old[name], fresh[name]) for name in old):
        return False
    if _layout(serving) != _layout(new):
        return False
    memory = {_address(tensor) for tensor in old.values()}
    same = all(_address(old[name]) == _address(fresh[name]) for name in old)
    if not same and any(_address(tensor) in memory for tensor in fresh.values()):
        return False
    pairs = [] if same else [(old[name], fresh[name]) for name in old]
    for path, slices in serving.adapters.items():
        for was, will in zip(slices, new.adapters[path], strict=True):
            pairs += [(was.a, will.a), (was.b, will.b)]
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
    return True


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _layout(weights: DecoderWeights) -> dict[str, list[tuple[object, ...]]]:
    """Return where adapters sit, with all that a graph has baked in."""

    def of(cut: LoraSlice) -> tuple[object, ...]:
        sides = [(side.shape, side.stride(), side.dtype, side.device) for side in (cut.a, cut.b)]
        return cut.start, cut.stop, cut.scaling, *sides

    return {path: [of(cut) for cut in slices] for path, slices in weights.adapters.items()}


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
