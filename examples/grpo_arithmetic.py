"""The demo: GRPO teaches a small model two-digit addition, with rollouts from rolloutd. About 4 minutes on 2 cores.

It builds a Qwen2 of 0.8M parameters, trains it briefly on demonstrations of which a third are wrong (about a minute;
kept in .cache/), then runs GRPO and prints held-out accuracy before and after. Nothing is downloaded.

    python examples/grpo_arithmetic.py

To train a real model on a GPU change one line: `model = "Qwen/Qwen2.5-0.5B-Instruct"`, and give the task its prompts;
examples/grpo_gsm8k.py does just that.
"""

from __future__ import annotations

from pathlib import Path

import arithmetic
import grpo_run

NUM_HELD_OUT = 300


def task() -> grpo_run.Task:
    """Return two-digit addition as rows."""
    train, held_out = arithmetic.split(NUM_HELD_OUT)
    return grpo_run.Task(
        train=[{"prompt": one.prompt, "answer": one.answer} for one in train],
        held_out=[{"prompt": one.prompt, "answer": one.answer} for one in held_out],
        is_right=arithmetic.is_right,
        max_completion_length=arithmetic.MAX_COMPLETION,
    )


def main() -> None:
    """Run the demo."""
    parser = grpo_run.parser(__doc__ or "", steps=180, prompts=64, generations=8)
    parser.add_argument("--cache-dir", type=Path, default=Path(__file__).parent.parent / ".cache")
    parser.add_argument("--pretrain-steps", type=int, default=arithmetic.Recipe.steps)
    options = parser.parse_args()
    grpo_run.quiet()
    model = str(arithmetic.prepare(options.cache_dir, arithmetic.Recipe(steps=options.pretrain_steps)))
    grpo_run.run(model, task(), options)


if __name__ == "__main__":
    main()
