"""One of two processes that agree, disagree, and lose each other; started by test_two_processes.py."""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist

from rolloutd.errors import LimitError, MaxModelLen, RolloutdError
from rolloutd.integrations.ranks import Ranks


def main() -> None:
    rank, store, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = Ranks.of(2, timeout_s=3.0)
    print([fact["rank"] for fact in ranks.agree(None, {"rank": rank, "text": "é" * 100})], flush=True)
    for error in (MaxModelLen("too long"), ValueError("odd"), LimitError("x" * 100_000)):
        try:
            ranks.agree(error if rank == 1 else None)
        except (RolloutdError, ValueError, RuntimeError) as raised:
            print(f"{type(raised).__name__} {str(raised)[:60]}", flush=True)
    if rank == 1:
        if ending == "silent":
            time.sleep(6.0)
        os._exit(0)
    started = time.monotonic()
    try:
        ranks.agree(None)
    except RolloutdError as error:
        print(f"{error.code} {time.monotonic() - started < 5.0}", flush=True)
    os._exit(0)  # the other is gone: leaving the group in order would wait for it


if __name__ == "__main__":
    main()
