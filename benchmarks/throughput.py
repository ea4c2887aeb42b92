"""Generation throughput of `LLM` beside transformers' `model.generate`, in one process and one run. About two minutes.

    python benchmarks/throughput.py [--model DIR] [--workloads W1 W2] [--repeats 3] [--deterministic]

Both sample at temperature 1 and ignore end-of-sequence; ours returns log-probabilities, `generate` does not. Before
anything is timed the log-probabilities are compared with a plain forward. `--deterministic` adds a column: what
`deterministic=True` leaves of the default's speed, in runs between the others. Read the
ratio, not the absolute speed: it holds on this machine, in this run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rolloutd import LLM, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Workload:
    """`prompts` prompts of `prompt_len` tokens, `samples` completions of `new_tokens` each."""

    prompts: int
    samples: int
    prompt_len: int
    new_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.prompts * self.samples * self.new_tokens


WORKLOADS = {"W1": Workload(8, 8, 128, 128), "W2": Workload(4, 16, 512, 64)}


def build_model(folder: Path) -> None:
    """Write a 5.9M-parameter Qwen2 with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=1024,
        vocab_size=4096,
        max_position_embeddings=1024,
        tie_word_embeddings=False,  # a tied random head repeats its input token, with probability near 1
        initializer_range=0.06,  # at 0.02 attention is almost uniform and a wrong position would pass the check
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def prompts_of(workload: Workload, vocab_size: int, seed: int) -> list[list[int]]:
    """Return fresh random prompts, so that no run profits from an earlier one's prefix cache."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(workload.prompt_len)] for _ in range(workload.prompts)]


def run_ours(llm: LLM, workload: Workload, prompts: list[list[int]]) -> tuple[float, list[RequestOutput]]:
    """Return seconds and outputs."""
    params = SamplingParams(n=workload.samples, max_tokens=workload.new_tokens, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    return time.perf_counter() - started, outputs


def run_transformers(model: PreTrainedModel, workload: Workload, prompts: list[list[int]]) -> float:
    """Return seconds of one padded batch of all samples, as TRL without a server generates."""
    ids = torch.tensor(prompts).repeat_interleave(workload.samples, 0)
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=workload.new_tokens,
        min_new_tokens=workload.new_tokens,
        pad_token_id=0,
    )
    return time.perf_counter() - started


def check(model: PreTrainedModel, outputs: list[RequestOutput]) -> float:
    """Return max |log p difference| to plain forwards, one completion a prompt; refuse to time wrong numbers."""
    worst = max(difference(model, output) for output in outputs)
    if worst > 5e-5:
        raise SystemExit(f"log-probabilities differ by {worst:.2e} from transformers: nothing is timed")
    return worst


def difference(model: PreTrainedModel, output: RequestOutput) -> float:
    """Return max |log p difference| over the first completion of one prompt."""
    completion = output.outputs[0]
    ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0, len(output.prompt_token_ids) - 1 : -1].float(), -1)
    expected = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return float((expected - torch.tensor(completion.logprobs)).abs().max())


def measure(
    llm: LLM, model: PreTrainedModel, name: str, repeats: int, deterministic: LLM | None = None
) -> dict[str, object]:
    """Return speeds and their ratios, from interleaved runs."""
    workload = WORKLOADS[name]
    ours, theirs, kept = [], [], []
    before = llm.stats()
    for i in range(repeats + 1):
        prompts = prompts_of(workload, llm.info.vocab_size, seed=1000 * workload.prompt_len + i)
        seconds, outputs = run_ours(llm, workload, prompts)
        worst = check(model, outputs)
        peer = run_transformers(model, workload, prompts)
        if deterministic is not None:
            slower, outputs = run_ours(deterministic, workload, prompts)
            check(model, outputs)
            kept.append(seconds / slower)
        if i:  # the first pair warms both up
            ours.append(workload.num_tokens / seconds)
            theirs.append(workload.num_tokens / peer)
    after = llm.stats()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "workload": name,
        **asdict(workload),
        "ours_tokens_per_s": statistics.median(ours),
        "generate_tokens_per_s": statistics.median(theirs),
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
        "max_logprob_difference": worst,
        "deterministic_ratio_median": statistics.median(kept[1:]) if kept else None,
        "prefill_tokens_per_run": (after.prefill_tokens - before.prefill_tokens) // (repeats + 1),
    }


def main() -> None:
    """Run the workloads and print a table and JSON."""
    parser = argparse.ArgumentParser(description="Throughput beside transformers' generate.")
    parser.add_argument("--model", help="a model directory; default: a 5.9M-parameter Qwen2 with random weights")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deterministic", action="store_true", help="also measure deterministic=True")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            build_model(Path(scratch))
        folder = options.model or scratch
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with ExitStack() as stack:
            llm = stack.enter_context(LLM(folder, dtype="float32", device="cpu"))
            strict = None
            if options.deterministic:
                strict = stack.enter_context(LLM(folder, dtype="float32", device="cpu", deterministic=True))
            rows = [measure(llm, model, name, options.repeats, strict) for name in options.workloads]
    for row in rows:
        print(
            f"{row['workload']}: rolloutd {row['ours_tokens_per_s']:,.0f} tok/s, generate "
            f"{row['generate_tokens_per_s']:,.0f} tok/s, ratio {row['ratio_median']:.2f} "
            f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f}), max |dlogp| {row['max_logprob_difference']:.1e}"
        )
        if options.deterministic:
            print(f"{row['workload']}: deterministic=True runs at {row['deterministic_ratio_median']:.2f} of that")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps({"versions": versions, "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
