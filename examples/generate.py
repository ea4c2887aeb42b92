"""Generation in this process with `LLM`: samples, both log-probabilities, and the work that was shared. 10 seconds.

    python examples/generate.py [--model DIR]

Without --model a tiny Qwen2 with random weights is built, so the text is noise and the numbers are what to look at.
For a real model on a GPU change one line: `model = "Qwen/Qwen2.5-0.5B-Instruct"`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rolloutd import LLM, SamplingParams

NUM_PROMPTS, PROMPT_LEN, NUM_SAMPLES = 4, 512, 16


def build_model(folder: Path) -> Path:
    """Write a Qwen2 of 0.4M random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        max_position_embeddings=1024,
        initializer_range=0.1,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def show(model: str) -> None:
    """Generate, and print a few completions and the counters."""
    rng = random.Random(0)
    with LLM(model) as llm:
        prompts = [[rng.randrange(1, llm.info.vocab_size) for _ in range(PROMPT_LEN)] for _ in range(NUM_PROMPTS)]
        params = SamplingParams(n=NUM_SAMPLES, temperature=1.0, top_p=0.9, max_tokens=24, seed=1)
        outputs = llm.generate(prompts, params, use_tqdm=True)
        for completion in outputs[0].outputs[:3]:
            print(f"sample {completion.index}: {completion.finish_reason}, {len(completion.token_ids)} tokens")
            print(f"  ids                {completion.token_ids[:8]} ...")
            print(f"  log p, full        {[round(x, 2) for x in completion.logprobs[:8]]} ...")
            print(f"  log p, as sampled  {[round(x, 2) for x in completion.sampling_logprobs[:8]]} ...")
        stats = llm.stats()
    asked = NUM_PROMPTS * NUM_SAMPLES * PROMPT_LEN
    print(
        f"\n{NUM_PROMPTS} prompts x {NUM_SAMPLES} samples: {stats.sampled_tokens:,} tokens in {stats.num_steps} steps"
    )
    print(f"prompt tokens computed: {stats.prefill_tokens:,} (one by one they would be {asked:,})")
    print(f"KV blocks at the peak:  {stats.peak_blocks_used} of {stats.blocks_total}")


def main() -> None:
    """Run with the model given or with a tiny one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory or hub id")
    model = parser.parse_args().model
    if model is not None:
        show(model)
        return
    with tempfile.TemporaryDirectory() as scratch:
        show(str(build_model(Path(scratch))))


if __name__ == "__main__":
    main()
