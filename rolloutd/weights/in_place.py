"""Weights of a new version in the memory of the old one, for a device that has addresses written down."""

from __future__ import annotations

from torch import Tensor

from rolloutd.kernels.copy_weights import can_copy, copy_weights, copy_weights_reference
from rolloutd.kernels.launch import HAS_TRITON

from .appended import LoraSlice
from .packing import DecoderWeights


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
    for was_below, will_below in zip(serving.appended(), new.appended(), strict=True):
        pairs += [(was_below.a_CK, will_below.a_CK), (was_below.b_rN, will_below.b_rN)]
    _copy(pairs)
    return True


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each source to its target: on a GPU in a launch or two, not one for each tensor."""
    if HAS_TRITON and pairs and pairs[0][0].is_cuda and all(can_copy(*pair) for pair in pairs):
        copy_weights(pairs)
    else:
        copy_weights_reference(pairs)


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
