"""A digest of a tensor's bytes: exact, independent of chunking, and as fast as memory allows.

The bytes are read as little-endian 32-bit words; the digest is the sum over i of word_i * w_i mod 2^64, where w_i is an
odd 64-bit mix of i (the finaliser of SplitMix64, Steele et al. 2014). An odd factor is invertible, so one altered word
always shows. Name, dtype, shape and length are mixed in. It guards against accidents; authenticity is the channel's.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .manifest import TensorSpec

_BLOCK_WORDS = 1 << 17
"""512 KiB of data and 1 MiB of weights a block: both stay in the processor's cache."""
_MASK = (1 << 64) - 1


class Digest:
    """Fed with the bytes of one tensor in order, in chunks of any size."""

    def __init__(self, spec: TensorSpec) -> None:
        head = f"{spec.name}\n{spec.dtype}\n{list(spec.shape)}".encode()
        self._total = int.from_bytes(hashlib.blake2b(head, digest_size=8).digest(), "little")
        self._num_bytes = 0
        self._tail = b""

    def update(self, data: memoryview | bytes) -> None:
        """Take the next bytes."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        self._num_bytes += len(view)
        if self._tail:
            missing = -len(self._tail) % 4
            self._tail += bytes(view[:missing])
            view = view[missing:]
            if len(self._tail) < 4:
                return
            self._add(np.frombuffer(self._tail, "<u4"), self._words_before(len(view) + 4))
            self._tail = b""
        whole = len(view) // 4
        if whole:
            words = np.frombuffer(view[: whole * 4], "<u4")
            first = (self._num_bytes - len(view)) // 4
            self._add(words, first)
        self._tail = bytes(view[whole * 4 :])

    def value(self) -> int:
        """Return the 64-bit digest; a last incomplete word counts as zero-padded."""
        total = self._total
        if self._tail:
            word = int.from_bytes(self._tail.ljust(4, b"\0"), "little")
            total += word * int(_weights(self._num_bytes // 4 // _BLOCK_WORDS)[self._num_bytes // 4 % _BLOCK_WORDS])
        return (total + self._num_bytes * 0x9E3779B97F4A7C15) & _MASK

    def _words_before(self, bytes_left: int) -> int:
        return (self._num_bytes - bytes_left) // 4

    def _add(self, words: NDArray[np.uint32], first: int) -> None:
        while len(words):
            block, offset = divmod(first, _BLOCK_WORDS)
            part = words[: _BLOCK_WORDS - offset]
            weights = _weights(block)[offset : offset + len(part)]
            self._total = (self._total + int(np.dot(part.astype(np.uint64), weights))) & _MASK
            words, first = words[len(part) :], first + len(part)


def tensor_digest(spec: TensorSpec, data: memoryview | bytes) -> int:
    """Return the digest of a whole tensor's bytes."""
    digest = Digest(spec)
    digest.update(data)
    return digest.value()


@lru_cache(maxsize=64)
def _weights(block: int) -> NDArray[np.uint64]:
    """Return w_i for the words of one block."""
    z = np.arange(block * _BLOCK_WORDS + 1, (block + 1) * _BLOCK_WORDS + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    weights: NDArray[np.uint64] = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return weights
