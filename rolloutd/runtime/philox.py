"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a pure function of key and counter, so a sample does not depend on the batch it runs in, and a retried or
preempted sample is the same sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10

U64 = NDArray[np.uint64]


def philox4x32(key: tuple[U64, U64], counter: tuple[U64, U64, U64, U64]) -> tuple[U64, U64, U64, U64]:
    """Return four 32-bit words (in uint64 arrays) for each key and counter of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_W0)) & _LOW, (k1 + np.uint64(_W1)) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: U64, indices: U64, positions: U64) -> NDArray[np.float64]:
    """Return one number in [0, 1) with 53 random bits for each (64-bit seed, sample index, position)."""
    zeros = np.zeros_like(seeds)
    key = (seeds & _LOW, seeds >> _32)
    w0, w1, _, _ = philox4x32(key, (positions & _LOW, positions >> _32, indices & _LOW, zeros))
    bits = (w0 << np.uint64(21)) ^ (w1 >> np.uint64(11))
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
