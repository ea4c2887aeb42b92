"""What changed between two versions of a tensor, piece by piece: exact, and chosen by what is smallest.

A training step in bfloat16 leaves most elements as they were, because the step is smaller than their rounding. A piece
is a run of elements; its delta holds either the places of those that changed or one bit for each element, and then the
new elements. Elements are compared as bits, so NaNs and signed zeros are elements like others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rolloutd.errors import ManifestMismatch

from .manifest import ITEM_BYTES, TensorSpec

Encoding: TypeAlias = Literal["positions", "bitmap"]

PIECE_ITEMS = 1 << 20
"""Elements that are encoded by themselves."""
_BLOCK = 1 << 16
"""Elements whose places are counted by 16 bits."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New elements of a run, and where they stand in it.

    `positions`: how many changed in each 65,536 elements, uint32; their places there, uint16; the elements.
    `bitmap`: a bit for each element, the first in the lowest bit; the elements that it marks.
    """

    encoding: Encoding
    num_bytes: int
    """Of the tensor that the run covers."""


def pieces(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each piece of a tensor, in bytes."""
    size = PIECE_ITEMS * ITEM_BYTES[spec.dtype]
    for start in range(0, spec.num_bytes, size):
        yield start, min(start + size, spec.num_bytes)


def encode(new: memoryview, old: memoryview, dtype: str) -> tuple[Encoding, bytes] | None:
    """Return what turns `old` into `new`, at most `PIECE_ITEMS` elements; None where `new` itself is no larger."""
    after, before = _items(new, dtype), _items(old, dtype)
    changed = after != before
    num_changed, num_blocks = int(np.count_nonzero(changed)), _num_blocks(len(after))
    by_position = 4 * num_blocks + 2 * num_changed
    by_bit = -(-len(after) // 8)
    if min(by_position, by_bit) + num_changed * after.itemsize >= new.nbytes:
        return None
    if by_bit < by_position:
        return "bitmap", np.packbits(changed, bitorder="little").tobytes() + after[changed].tobytes()
    places = np.flatnonzero(changed)
    counts = np.bincount(places // _BLOCK, minlength=num_blocks).astype("<u4")
    return "positions", counts.tobytes() + (places % _BLOCK).astype("<u2").tobytes() + after[places].tobytes()


def decode(spec: TensorSpec, delta: Delta, data: memoryview, old: memoryview) -> bytearray:
    """Return the new bytes of a run whose old ones are `old`; `ManifestMismatch` for a delta that does not add up."""
    new = bytearray(old)
    items = np.frombuffer(new, _unsigned(spec.dtype))
    split = _at_positions if delta.encoding == "positions" else _at_bits
    places, elements = split(spec, data, len(items))
    if places.size * items.itemsize != elements.nbytes:
        raise _wrong(spec, f"{places.size} places came with {elements.nbytes} bytes of elements")
    items[places] = np.frombuffer(elements, items.dtype)
    return new


def _at_positions(spec: TensorSpec, data: memoryview, num_items: int) -> tuple[NDArray[np.int64], memoryview]:
    num_blocks = _num_blocks(num_items)
    if data.nbytes < 4 * num_blocks:
        raise _wrong(spec, f"{data.nbytes} bytes have no room for {num_blocks} counts")
    counts = np.frombuffer(data[: 4 * num_blocks], "<u4").astype(np.int64)
    end = 4 * num_blocks + 2 * int(counts.sum())
    if data.nbytes < end:
        raise _wrong(spec, f"{data.nbytes} bytes have no room for {int(counts.sum())} places")
    starts = np.repeat(np.arange(num_blocks, dtype=np.int64) * _BLOCK, counts)
    places = np.frombuffer(data[4 * num_blocks : end], "<u2").astype(np.int64) + starts
    if places.size and (places[-1] >= num_items or (np.diff(places) <= 0).any()):
        raise _wrong(spec, f"its places do not rise within {num_items} elements")
    return places, data[end:]


def _at_bits(spec: TensorSpec, data: memoryview, num_items: int) -> tuple[NDArray[np.int64], memoryview]:
    end = -(-num_items // 8)
    if data.nbytes < end:
        raise _wrong(spec, f"{data.nbytes} bytes have no room for {num_items} bits")
    bits = np.unpackbits(np.frombuffer(data[:end], np.uint8), bitorder="little")
    if bits[num_items:].any():
        raise _wrong(spec, f"it marks more than {num_items} elements")
    return np.flatnonzero(bits), data[end:]


def _wrong(spec: TensorSpec, what: str) -> ManifestMismatch:
    return ManifestMismatch(f"{spec.name}: a delta that does not add up: {what}. Push again, without delta.")


def _num_blocks(num_items: int) -> int:
    return -(-num_items // _BLOCK)


def _unsigned(dtype: str) -> np.dtype[np.unsignedinteger]:
    return np.dtype(f"<u{ITEM_BYTES[dtype]}")


def _items(data: memoryview, dtype: str) -> NDArray[np.unsignedinteger]:
    return np.frombuffer(data, _unsigned(dtype))


class DeltaBase:
    """What a peer holds as its base, as this side sent it last: a copy of every tensor, in host memory.

    From the first byte of an update until its commit was answered it is neither version, and says so.
    """

    def __init__(self) -> None:
        self.digest = ""
        """Of the version that was sent; empty where there is none, or where nobody knows."""
        self._tensors: dict[str, tuple[TensorSpec, memoryview]] = {}

    def tensor(self, spec: TensorSpec) -> tuple[memoryview, bool]:
        """Return memory for a tensor, to be written over by what is sent, and whether it holds the version before."""
        held = self._tensors.get(spec.name)
        if held is not None and held[0] == spec:
            return held[1], True
        memory = memoryview(bytearray(spec.num_bytes))
        self._tensors[spec.name] = spec, memory
        return memory, False
