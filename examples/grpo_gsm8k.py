"""GRPO on GSM8K with a hub model, for a GPU. How long 500 steps take has not been measured.

    python examples/grpo_gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 500

The code is that of examples/grpo_arithmetic.py with another task. `--dataset FILE` takes JSON lines with `question` and
`answer` instead of the hub's openai/gsm8k, `--model DIR` a local model.
"""

from __future__ import annotations

import re
from typing import Any

import grpo_run
from datasets import Dataset, load_dataset

SYSTEM = "Solve the problem step by step. End with the answer as a number on a line of its own, after ####."
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> str | None:
    """Return the last number of a text without separators, None if it has none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").removesuffix(".0") if found else None


def is_right(completion: str, answer: str) -> bool:
    """Return whether the completion's last number is the answer."""
    return last_number(completion) == answer


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    """Return prompts as chats, answers as bare numbers."""
    return [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}],
            "answer": last_number(row["answer"].split("####")[-1]) or "",
        }
        for row in dataset
    ]


def load(dataset: str | None, num_held_out: int, max_completion_length: int) -> grpo_run.Task:
    """Return the task from the hub, or from a file whose last rows are held out."""
    if dataset is None:
        train = rows_of(load_dataset("openai/gsm8k", "main", split="train"))
        held_out = rows_of(load_dataset("openai/gsm8k", "main", split="test"))[:num_held_out]
    else:
        rows = rows_of(load_dataset("json", data_files=dataset, split="train"))
        train, held_out = rows[:-num_held_out], rows[-num_held_out:]
    return grpo_run.Task(train=train, held_out=held_out, is_right=is_right, max_completion_length=max_completion_length)


def main() -> None:
    """Train."""
    parser = grpo_run.parser(__doc__ or "", steps=500, prompts=32, generations=8)
    parser.set_defaults(learning_rate=1e-6)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--dataset", help="a file of JSON lines instead of the hub's openai/gsm8k")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--max-completion-length", type=int, default=512)
    options = parser.parse_args()
    task = load(options.dataset, options.held_out, options.max_completion_length)
    grpo_run.run(options.model, task, options)


if __name__ == "__main__":
    main()
