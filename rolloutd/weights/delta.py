"""What changed between two versions of a tensor, piece by piece: exact, and chosen by what is smallest.

A training step in bfloat16 leaves most elements as they were, because the step is smaller than their rounding. A piece
is a run of elements; its delta holds either the places of those that changed or one bit for each element, and then the
new elements. Elements are compared as bits, so NaNs and signed zeros are elements like others. C does the loops where
there is a compiler; numpy elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rolloutd.errors import ManifestMismatch
from rolloutd.kernels import compiled

from .manifest import ITEM_BYTES, TensorSpec

Encoding: TypeAlias = Literal["positions", "bitmap"]
Items: TypeAlias = "NDArray[np.unsignedinteger[Any]]"
"""Elements as the bits that they are."""

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


def encode(new: memoryview, old: memoryview, dtype: str) -> tuple[Encoding, bytearray] | None:
    """Return what turns `old` into `new`, at most `PIECE_ITEMS` elements; None where `new` itself is no larger."""
    items = _items(new, dtype)
    bits, num_changed = _changed(items, _items(old, dtype))
    num_blocks = _num_blocks(len(items))
    by_position, by_bit = 4 * num_blocks + 2 * num_changed, len(bits)
    head, size = min(by_position, by_bit), num_changed * items.itemsize
    if head + size >= new.nbytes:
        return None
    data = bytearray(head + size)
    elements = np.frombuffer(data, items.dtype, num_changed, offset=head)
    native = _native()
    if native is not None:
        native.gather(_at(items), _at(bits), len(items), items.itemsize, _at(elements))
    else:
        elements[:] = items[_marked(bits, len(items))]
    if by_bit < by_position:
        data[:head] = bits.data
        return "bitmap", data
    counts = np.frombuffer(data, "<u4", num_blocks)
    places = np.frombuffer(data, "<u2", num_changed, offset=4 * num_blocks)
    if native is not None:
        native.places_of(_at(bits), len(items), _at(counts), _at(places))
    else:
        marked = _marked(bits, len(items))
        counts[:], places[:] = np.bincount(marked // _BLOCK, minlength=num_blocks), marked % _BLOCK
    return "positions", data


def decode(spec: TensorSpec, delta: Delta, data: memoryview, old: memoryview) -> bytearray:
    """Return the new bytes of a run whose old ones are `old`; `ManifestMismatch` for a delta that does not add up."""
    new = bytearray(old)
    items = _items(memoryview(new), spec.dtype)
    if delta.encoding == "positions":
        _put_at_places(spec, items, data)
    else:
        _put_at_bits(spec, items, data)
    return new


def _changed(new: Items, old: Items) -> tuple[NDArray[np.uint8], int]:
    """Return a bitmap of the elements that differ, and how many they are."""
    native = _native()
    if native is None:
        changed = new != old
        return np.packbits(changed, bitorder="little"), int(np.count_nonzero(changed))
    bits = np.empty(-(-len(new) // 8), np.uint8)
    return bits, native.changed_bits(_at(new), _at(old), len(new), new.itemsize, _at(bits))


def _marked(bits: NDArray[np.uint8], num_items: int) -> NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(bits, bitorder="little", count=num_items))


def _put_at_places(spec: TensorSpec, items: Items, data: memoryview) -> None:
    num_blocks = _num_blocks(len(items))
    if data.nbytes < 4 * num_blocks:
        raise _wrong(spec, f"{data.nbytes} bytes have no room for {num_blocks} counts")
    counts = np.frombuffer(data, "<u4", num_blocks)
    num_places = int(counts.sum(dtype=np.int64))
    begin = 4 * num_blocks
    elements = _elements(spec, items, data, begin + 2 * num_places, num_places)
    places = np.frombuffer(data, "<u2", num_places, offset=begin)
    native = _native()
    if native is not None:
        are_wrong = native.scatter_at(_at(items), len(items), items.itemsize, _at(counts), _at(places), _at(elements))
    else:
        at = places + np.repeat(np.arange(num_blocks, dtype=np.int64) * _BLOCK, counts)
        are_wrong = at.size and (at[-1] >= len(items) or (np.diff(at) <= 0).any())
        if not are_wrong:
            items[at] = elements
    if are_wrong:
        raise _wrong(spec, f"its places do not rise within {len(items)} elements")


def _put_at_bits(spec: TensorSpec, items: Items, data: memoryview) -> None:
    num_bytes = -(-len(items) // 8)
    if data.nbytes < num_bytes:
        raise _wrong(spec, f"{data.nbytes} bytes have no room for {len(items)} bits")
    bits, native = np.frombuffer(data, np.uint8, num_bytes), _native()
    if native is not None:
        num_marked = native.num_marked(_at(bits), len(items))
    else:
        every = np.unpackbits(bits, bitorder="little")
        num_marked = -1 if every[len(items) :].any() else int(np.count_nonzero(every))
    if num_marked < 0:
        raise _wrong(spec, f"it marks more than {len(items)} elements")
    elements = _elements(spec, items, data, num_bytes, num_marked)
    if native is not None:
        native.scatter(_at(items), _at(bits), len(items), items.itemsize, _at(elements))
    else:
        items[_marked(bits, len(items))] = elements


def _elements(spec: TensorSpec, items: Items, data: memoryview, begin: int, count: int) -> Items:
    """Return the elements from byte `begin` on, which are all that is left."""
    if data.nbytes != begin + count * items.itemsize:
        raise _wrong(spec, f"{count} places came with {data.nbytes - begin} bytes of elements")
    return np.frombuffer(data, items.dtype, count, offset=begin)


def _wrong(spec: TensorSpec, what: str) -> ManifestMismatch:
    return ManifestMismatch(f"{spec.name}: a delta that does not add up: {what}. Push again, without delta.")


def _num_blocks(num_items: int) -> int:
    return -(-num_items // _BLOCK)


def _items(data: memoryview, dtype: str) -> Items:
    return np.frombuffer(data, np.dtype(f"<u{ITEM_BYTES[dtype]}"))


def _at(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


@cache
def _native() -> ctypes.CDLL | None:
    """Return the loops over elements in C; None where they cannot be compiled, which the log says."""
    source = Path(compiled.__file__).with_name("changes.c")
    library = compiled.compiled("changes", [source], without="deltas of weights are slower")
    if library is None:
        return None
    at, count, item_bytes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.changed_bits.argtypes = [at, at, count, item_bytes, at]
    library.gather.argtypes = [at, at, count, item_bytes, at]
    library.places_of.argtypes = [at, count, at, at]
    library.num_marked.argtypes = [at, count]
    library.scatter.argtypes = [at, at, count, item_bytes, at]
    library.scatter_at.argtypes = [at, count, item_bytes, at, at, at]
    for name in ("changed_bits", "num_marked", "scatter_at"):
        getattr(library, name).restype = count
    for name in ("gather", "places_of", "scatter"):
        getattr(library, name).restype = None
    return library


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
