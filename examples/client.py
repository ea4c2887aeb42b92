"""Streams completions from a running daemon as they finish. A few seconds.

In one terminal:   rolloutd --model DIR
In another:        python examples/client.py [ADDRESS]

ADDRESS is an endpoint or a connection file; without it the newest daemon of this user is taken. For a real model on a
GPU start the daemon with it: `rolloutd --model Qwen/Qwen2.5-0.5B-Instruct`.
"""

from __future__ import annotations

import argparse
import time

from rolloutd import RolloutClient, SamplingParams


def main() -> None:
    """Connect, wait for the model, stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", help="an endpoint or a connection file")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    with RolloutClient(options.address) as client:
        started = time.perf_counter()
        health = client.health()
        print(f"daemon pid {health.pid}: {health.state} (answered in {1e3 * (time.perf_counter() - started):.0f} ms)")
        info = client.wait_ready()
        print(f"{info.model}: {info.architecture}, {info.num_parameters / 1e6:.1f}M parameters, {info.numerics}")
        prompts = [[(7 * i + j) % info.vocab_size for j in range(8)] for i in range(options.prompts)]
        # Lengths differ, so completions arrive out of order.
        params = [
            SamplingParams(n=options.samples, max_tokens=max(1, options.max_tokens * (i + 1) // options.prompts))
            for i in range(options.prompts)
        ]
        started, num_tokens = time.perf_counter(), 0
        for index, completion in client.stream(prompts, params):
            num_tokens += len(completion.token_ids)
            print(
                f"{time.perf_counter() - started:6.3f} s  prompt {index} sample {completion.index}  "
                f"{len(completion.token_ids):3d} tokens  {completion.finish_reason:<6}  "
                f"weights {completion.weight_versions[-1]}  mean log p {_mean(completion.logprobs):.2f}"
            )
        print(f"{num_tokens} tokens, {num_tokens / (time.perf_counter() - started):,.0f} tokens/s")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
