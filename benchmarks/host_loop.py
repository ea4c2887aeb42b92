"""Host time of a decode step where the device needs none: scheduler, launch and answer, all but the model. Seconds.

    python benchmarks/host_loop.py [--rows 256 1024] [--steps 8] [--repeats 3] [--shared-prefix-attention on]

Everything is real but the device: steps are captured and their replay does nothing, answers are there at once. Copies
and fills that a GPU would do in its own time are done here by the CPU and counted as the host's: the figure is an upper
bound. It is set against the step times that a model of an H200 gives for Qwen2.5-0.5B, prompt 512 and prefix reads
shared: estimates, not measurements. The host's work is hidden while it is below the device's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from rolloutd.engine.block_manager import BlockManager
from rolloutd.engine.garbage import THRESHOLDS
from rolloutd.engine.pipeline import Pipeline
from rolloutd.engine.scheduler import Scheduler
from rolloutd.engine.sequence import Batch, Group, Handle, Request, SampledTokens
from rolloutd.kernels.draw import draw_tokens_reference
from rolloutd.runtime.decode_loop import DecodeLoop
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.loop_rows import LoopSizes
from rolloutd.runtime.shared_prefix import SharedPrefixes, SharingRule
from rolloutd.runtime.step_graphs import Step, StepGraphs
from rolloutd.runtime.transfers import CpuTransfers, Event
from rolloutd.sampling_params import SamplingParams

MODELLED_STEP_MS = {256: 1.79, 1024: 4.71}
PROMPT_LEN, NEW_TOKENS, SAMPLES, BLOCK_SIZE, VOCAB = 512, 1024, 8, 16, 151_936
KV_BYTES = 512
"""Of a token and layer of Qwen2.5-0.5B in bf16."""
NUM_WARM_UP_RUNS = 4


class IdleDevice(CpuTransfers):
    """Replays at once, and answers that each row drew token 0 in each step."""

    def __init__(self) -> None:
        self._num_replays = 0

    def reset(self) -> None:
        """Forget nothing."""

    def __call__(self, step: Step) -> Step:
        """Capture without a run."""
        return self._replay

    def _replay(self) -> None:
        self._num_replays += 1

    def fetch(self, source: Tensor, target: Tensor) -> Event:
        """Copy the record, its last cell moved on by what was replayed."""
        target.copy_(source)
        target[-1] += self._num_replays
        self._num_replays = 0
        return super().fetch(target, target)


class IdleRunner:
    """A decode loop without a model; the steps before it cost nothing."""

    def __init__(self, sizes: LoopSizes, sharing: str) -> None:
        def forward(inputs: ForwardInputs) -> Tensor:
            raise AssertionError("a captured step is not computed again")

        device = IdleDevice()
        self.max_steps = sizes.max_steps
        self.launch_s = 0.0
        cpu = torch.device("cpu")
        rule = SharingRule.of(sharing, sizes.block_size)
        prefixes = None if rule is None else SharedPrefixes(rule, sizes.max_num_seqs, sizes.block_size, KV_BYTES)
        self._loop = DecodeLoop(forward, draw_tokens_reference, sizes, cpu, device, StepGraphs(device), prefixes)

    def run(self, batch: Batch) -> Handle:
        """Launch a run, or answer a step at once."""
        if batch.num_steps == 1:
            ones = [1] * len(batch.draws)
            zeros = [0.0] * len(batch.draws)
            return SampledTokens(ones, zeros, zeros, [[] for _ in batch.chunks])
        begin = time.perf_counter()
        handle = self._loop.launch(batch)
        self.launch_s += time.perf_counter() - begin
        return handle


def host_time(num_rows: int, max_steps: int, sharing: str) -> dict[str, Any]:
    """Return microseconds of the host per decode step: the whole, and the part that launches."""
    blocks_per_row = -(-(PROMPT_LEN + NEW_TOKENS) // BLOCK_SIZE) + 1
    num_blocks = num_rows * blocks_per_row
    sizes = LoopSizes(
        max_num_seqs=num_rows,
        max_model_len=PROMPT_LEN + NEW_TOKENS,
        max_steps=max_steps,
        block_size=BLOCK_SIZE,
        scratch_block=num_blocks,
        vocab_size=VOCAB,
    )
    blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True)
    scheduler = Scheduler(blocks, max_num_seqs=num_rows, max_num_batched_tokens=1 << 20)
    for i in range(num_rows // SAMPLES):
        params = SamplingParams(n=SAMPLES, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = Request(f"r{i}", tuple(range(i, i + PROMPT_LEN)), params)
        scheduler.add(Group.from_request(request, seed=i, eos_token_ids=frozenset()))
    runner = IdleRunner(sizes, sharing)
    pipeline = Pipeline(scheduler, runner)
    gc.set_threshold(*THRESHOLDS)  # as in the engine process
    while scheduler.counters.num_steps < 1 + NUM_WARM_UP_RUNS * max_steps:
        pipeline.fill(0)
        pipeline.commit_next()
    first_step, runner.launch_s, begin = scheduler.counters.num_steps, 0.0, time.perf_counter()
    while scheduler.counters.num_steps < NEW_TOKENS - 2 * max_steps:
        pipeline.fill(0)
        pipeline.commit_next()
    seconds, num_steps = time.perf_counter() - begin, scheduler.counters.num_steps - first_step
    assert scheduler.num_running == num_rows, "the measured steps are those of all rows"
    return {"us_per_step": seconds / num_steps * 1e6, "launch_us_per_step": runner.launch_s / num_steps * 1e6}


def measure(num_rows: int, max_steps: int, repeats: int, sharing: str) -> dict[str, Any]:
    """Return the median of several measurements beside the modelled step."""
    runs = [host_time(num_rows, max_steps, sharing) for _ in range(repeats)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    modelled_ms = MODELLED_STEP_MS.get(num_rows)
    share = None if modelled_ms is None else median["us_per_step"] / modelled_ms / 1e3
    return {"rows": num_rows, "steps": max_steps, **median, "modelled_step_ms": modelled_ms, "share_of_step": share}


def main() -> None:
    """Measure and print a table and JSON."""
    parser = argparse.ArgumentParser(description="Host time of a decode step with a device that needs none.")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared-prefix-attention", choices=["auto", "on", "off"], default="auto")
    options = parser.parse_args()
    rows = [
        measure(num_rows, options.steps, options.repeats, options.shared_prefix_attention) for num_rows in options.rows
    ]
    for row in rows:
        share = "" if row["share_of_step"] is None else f", {row['share_of_step']:.1%} of a modelled step"
        print(
            f"B={row['rows']}: host {row['us_per_step']:.0f} us a step, launch {row['launch_us_per_step']:.0f}{share}"
        )
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps({"torch": torch.__version__, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
