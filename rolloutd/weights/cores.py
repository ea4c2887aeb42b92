"""How many cores the bytes of an update take, which land while the process at the other end works at them too."""

from __future__ import annotations

import os

NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
SHARED_CORES = max(1, NUM_CORES // 2)
"""One process digests and copies what it sends, the other one what it received."""
_landing = NUM_CORES


def share_cores() -> None:
    """From now on leave cores to the process at the other end of a transport."""
    global _landing
    _landing = SHARED_CORES


def landing_cores() -> int:
    """Return how many cores what lands may take: to be copied, digested, and packed for the products."""
    return _landing
