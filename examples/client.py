"""Ask a running daemon for n completions of a few prompts and print each one the moment it ends.

    rolloutd --model DIR            # in one terminal
    python examples/client.py       # in another: finds your newest daemon

Takes as long as the daemon needs for 4 × 4 completions of at most 64 tokens: seconds. Another daemon, on this host or
beyond, is named by its endpoint or its connection file: `python examples/client.py /tmp/policy.json`.
"""

from __future__ import annotations

import argparse
import sys
import time

from rolloutd import RolloutClient, RolloutdError, SamplingParams

PROMPTS = ["12 + 30 =", "The capital of France is", "def fibonacci(n):", "Once upon a time"]


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Stream completions from a rolloutd daemon.")
    parser.add_argument("address", nargs="?", help="endpoint or connection file; default: your newest daemon")
    parser.add_argument("-n", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    return parser.parse_args()


def main() -> None:
    """Print completions as they end, then tokens per second and the weight version."""
    options = arguments()
    params = SamplingParams(n=options.n, temperature=options.temperature, max_tokens=options.max_tokens)
    num_tokens = 0
    versions: set[int] = set()
    with RolloutClient(options.address) as client:
        model = client.wait_ready()
        print(f"{model.model} ({model.architecture}, {model.numerics}) at {client.address}")
        started = time.perf_counter()
        for index, completion in client.stream(PROMPTS, params):
            seconds = time.perf_counter() - started
            num_tokens += len(completion.token_ids)
            versions.update(completion.weight_versions)
            print(
                f"{seconds:6.2f} s  prompt {index} sample {completion.index}  {len(completion.token_ids):4d} tokens  "
                f"log p {sum(completion.logprobs):8.1f}  {completion.finish_reason:6}  {completion.text!r}"
            )
        seconds = time.perf_counter() - started
    served_by = ", ".join(str(version) for version in sorted(versions))
    print(f"{num_tokens} tokens in {seconds:.2f} s = {num_tokens / seconds:.0f} tokens/s, weight version {served_by}")


if __name__ == "__main__":
    try:
        main()
    except RolloutdError as error:  # its text says what to do; a traceback would bury it
        sys.exit(str(error))
