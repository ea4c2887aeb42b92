"""Python's garbage collector, made to suit a process that is an engine."""

from __future__ import annotations

import gc

THRESHOLDS = (100_000, 50, 50)
"""By default (700, 10, 10) the collector walks all queued requests again every 70,000 new objects: at 10,000 queued
requests half of the scheduler's time."""


def relax_collector() -> None:
    """Collect rarely, and never what is alive now. Finished requests are freed by their reference counts."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
