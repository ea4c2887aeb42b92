"""A run of two ranks in which one rank's client fails in its second call; started by test_two_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rolloutd.errors import EngineStalled, RolloutdError
from tests.integrations.in_process import InProcessClient, config, trainer


def main() -> None:
    model, folder = map(Path, sys.argv[1:])
    built = trainer(model, config(folder, max_steps=4, rollout_server_address=str(model)))
    rank = built.accelerator.process_index
    client: InProcessClient = built.rollout_client
    inner = client.generate

    def fails_on_rank_1(prompts: Any, sampling_params: Any, **options: Any) -> Any:
        if rank == 1 and len(client.calls) == 1:
            raise EngineStalled("planted")
        return inner(
            prompts, sampling_params
        )  # each rank has an engine of its own here, and rank 0's alone is pushed to

    client.generate = fails_on_rank_1  # type: ignore[method-assign]
    try:
        built.train()
    except RolloutdError as error:
        sys.stdout.write(f"rank {rank} step {built.state.global_step}: {error}\n")  # one write: lines do not mix


if __name__ == "__main__":
    main()
