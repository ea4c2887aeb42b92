"""A digest of a tensor's bytes: exact, independent of chunking, and as fast as memory allows.

The bytes are read as little-endian 32-bit words; the digest is the sum over i of word_i * w_i mod 2^64. Every w_i is
odd, so it is invertible and one altered word always shows. It is a product of two odd 64-bit mixes (the finaliser of
SplitMix64, Steele et al. 2014), one of i's place in its block and one of the block's number: a 16 KiB table serves
tensors of any size. Name, dtype, shape and length are mixed in. It guards against accidents; authenticity is the
channel's. C does the sum where there is a compiler, on several threads and in the same pass as a copy; numpy elsewhere.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rolloutd.kernels import compiled

from .cores import landing_cores
from .manifest import TensorSpec

Buffer: TypeAlias = "memoryview | bytes | bytearray"

_BLOCK_WORDS = 1 << 11
"""8 KiB of data beside 16 KiB of factors: both stay in the first cache. One core sums 22 GB/s so, 9 with 2^17 words."""
_BLOCKS_AT_ONCE = 64
"""Of numpy, which turns them into 1 MiB of 64-bit words."""
_WORDS_PER_THREAD = 1 << 17
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Digest:
    """Fed with the bytes of one tensor in order, in chunks of any size."""

    def __init__(self, spec: TensorSpec, num_threads: int | None = None) -> None:
        self._num_threads = num_threads or landing_cores()
        head = f"{spec.name}\n{spec.dtype}\n{list(spec.shape)}".encode()
        self._total = int.from_bytes(hashlib.blake2b(head, digest_size=8).digest(), "little")
        self._num_words = 0
        self._tail = b""
        """The last 0 to 3 bytes, not yet a word."""

    def update(self, data: Buffer, into: memoryview | None = None, *, streams: bool = False) -> None:
        """Take the next bytes, and copy them to `into`, which is as long; `data` is C-contiguous.

        `streams`: nobody reads `into` soon, so that the copy need not go through the caches.
        """
        view = memoryview(data)
        if view.nbytes == 0:  # a view with a zero in its shape cannot be cast
            return
        view = view.cast("B")
        if into is not None and (self._tail or len(view) % 4 or _native() is None):
            into[:] = view
            view, into = into, None
        if self._tail:
            needed = 4 - len(self._tail)
            self._tail += bytes(view[:needed])
            view = view[needed:]
            if len(self._tail) < 4:
                return
            self._add(np.frombuffer(self._tail, "<u4"))
        num_whole = len(view) // 4 * 4
        self._add(np.frombuffer(view[:num_whole], "<u4"), into, streams=streams)
        self._tail = bytes(view[num_whole:])

    @classmethod
    def of_sum(cls, spec: TensorSpec, total: int, num_bytes: int) -> int:
        """Return the digest of a tensor whose words times factors were summed elsewhere, mod 2^64."""
        return (cls(spec)._total + total + num_bytes * _GOLDEN) & _MASK

    def value(self) -> int:
        """Return the 64-bit digest; a last incomplete word counts as zero-padded."""
        last = 0
        if self._tail:
            block, offset = divmod(self._num_words, _BLOCK_WORDS)
            last = int.from_bytes(self._tail, "little") * int(place_factors()[offset]) * int(block_factors(block, 1)[0])
        num_bytes = 4 * self._num_words + len(self._tail)
        return (self._total + last + num_bytes * _GOLDEN) & _MASK

    def _add(self, words: NDArray[np.uint32], into: memoryview | None = None, *, streams: bool = False) -> None:
        native = _native()
        if native is not None:
            target = None if into is None else np.frombuffer(into, "<u4").ctypes.data
            threads = min(self._num_threads, -(-len(words) // _WORDS_PER_THREAD))
            factors = place_factors().ctypes.data
            total = native(words.ctypes.data, len(words), self._num_words, factors, target, streams, threads)
            self._total = (self._total + total) & _MASK
            self._num_words += len(words)
            return
        while len(words):
            block, offset = divmod(self._num_words, _BLOCK_WORDS)
            if offset or len(words) < _BLOCK_WORDS:
                part = words[: _BLOCK_WORDS - offset]
                sums = np.dot(part.astype(np.uint64), place_factors()[offset : offset + len(part)])[None]
            else:
                part = words[: min(len(words) // _BLOCK_WORDS, _BLOCKS_AT_ONCE) * _BLOCK_WORDS]
                sums = part.reshape(-1, _BLOCK_WORDS).astype(np.uint64) @ place_factors()
            total = int((sums * block_factors(block, len(sums))).sum(dtype=np.uint64))
            self._total = (self._total + total) & _MASK
            self._num_words += len(part)
            words = words[len(part) :]


def tensor_digest(spec: TensorSpec, data: Buffer) -> int:
    """Return the digest of a whole tensor's bytes."""
    digest = Digest(spec)
    digest.update(data)
    return digest.value()


@cache
def _native() -> Callable[..., int] | None:
    """Return the sum over words in C; None where it cannot be compiled, which the log says."""
    source = Path(compiled.__file__).with_name("digest_words.c")
    library = compiled.compiled("digest", [source], without="digests of weights are slower")
    if library is None:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function = library.digest_words
    function.argtypes = [pointer, count, count, pointer, pointer, ctypes.c_int, ctypes.c_int]
    function.restype = ctypes.c_uint64
    return function


@cache
def place_factors() -> NDArray[np.uint64]:
    """Return the factor of each place in a block."""
    weights = _mixed(np.arange(1, _BLOCK_WORDS + 1, dtype=np.uint64))
    weights.flags.writeable = False
    return weights


def block_factors(block: int, count: int) -> NDArray[np.uint64]:
    """Return the factors of whole blocks: the same mix, on numbers that no place in a block has."""
    first = block + 1 + _BLOCK_WORDS
    return _mixed(np.arange(first, first + count, dtype=np.uint64))


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return mixed
