"""What the GRPO examples share: options, training, held-out evaluation through the rollout path, table and plot.

Not a script. A task gives prompts with answers and says when a completion is right; everything else is here, so the
arithmetic demo and the GSM8K example run the same code.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from rolloutd import SamplingParams
from rolloutd.integrations.trl import GRPOConfig, GRPOTrainer

EVAL_SAMPLES = 4
"""Sampled completions of each held-out problem."""
EVAL_SEED = 17


@dataclass(frozen=True)
class Task:
    """A verifiable task. Prompts are texts, or lists of chat messages."""

    train: list[dict[str, Any]]
    """Rows with `prompt` and `answer`."""
    held_out: list[dict[str, Any]]
    is_right: Callable[[str, str], bool]
    """(completion, answer) -> whether it counts."""
    max_completion_length: int


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out completions that are right."""

    sampled: float
    """At temperature 1, `EVAL_SAMPLES` completions a problem."""
    greedy: float


@dataclass(frozen=True)
class Result:
    """What a run achieved and what its rollouts cost."""

    accuracy_before: Accuracy
    accuracy_after: Accuracy
    reward_before: float
    reward_after: float
    num_held_out: int
    steps: int
    train_seconds: float
    rollout_tokens_per_s: float
    num_syncs: int
    seconds_per_sync: float
    bytes_per_sync: float
    logprob_gap_mean: float
    logprob_gap_max: float

    def table(self) -> str:
        """Return the result for people."""
        before, after = self.accuracy_before, self.accuracy_after
        rows = [
            ("", "before", "after"),
            ("reward, mean of 10 steps", f"{self.reward_before:.3f}", f"{self.reward_after:.3f}"),
            (f"held-out accuracy, sampled ({self.num_held_out})", f"{before.sampled:.1%}", f"{after.sampled:.1%}"),
            (f"held-out accuracy, greedy ({self.num_held_out})", f"{before.greedy:.1%}", f"{after.greedy:.1%}"),
            ("GRPO steps, seconds", f"{self.steps}", f"{self.train_seconds:.0f} s"),
            ("rollout tokens/s", "", f"{self.rollout_tokens_per_s:,.0f}"),
            ("weight sync, each", f"{self.seconds_per_sync * 1e3:.1f} ms", f"{self.bytes_per_sync:,.0f} bytes"),
            ("|log p - trainer's|, mean and max", f"{self.logprob_gap_mean:.1e}", f"{self.logprob_gap_max:.1e}"),
        ]
        return "\n".join(f"{name:<38}{left:>14}{right:>18}" for name, left, right in rows)


def parser(description: str, *, steps: int, prompts: int, generations: int) -> argparse.ArgumentParser:
    """Return the options that every GRPO example has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--steps", type=int, default=steps, help="GRPO steps")
    result.add_argument("--prompts", type=int, default=prompts, help="prompts per step")
    result.add_argument("--generations", type=int, default=generations, help="completions per prompt")
    result.add_argument("--learning-rate", type=float, default=3e-4)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--out", type=Path, default=Path("runs"), help="where plot and result go")
    return result


def quiet() -> None:
    """Keep libraries' chatter from drowning the output."""
    warnings.filterwarnings("ignore")
    disable_progress_bar()  # of loading and saving, which take no time here
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("trl").setLevel(logging.ERROR)


class RewardBar(TrainerCallback):
    """A progress bar with the reward; without a terminal one line every 50 steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc="GRPO", unit=" steps", disable=None)
        self._recent: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        self._recent = [*self._recent[-19:], float(logs["reward"])]
        self._bar.update(1)
        self._bar.set_postfix(reward=f"{_mean(self._recent):.2f}")
        if self._bar.disable and state.global_step % 50 == 0:
            print(f"step {state.global_step:4d} of {state.max_steps}  reward {_mean(self._recent):.3f}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


def show_progress(trainer: Any) -> None:
    """Show a bar with the reward instead of a dictionary a step."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RewardBar())


def config_of(options: argparse.Namespace, task: Task, **overrides: Any) -> GRPOConfig:
    """Return the trainer's config; `use_rollout_server=True` is the one line that is rolloutd's."""
    on_gpu = torch.cuda.is_available()
    values: dict[str, Any] = {
        "use_rollout_server": True,
        "output_dir": str(options.out),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.prompts * options.generations,
        "num_generations": options.generations,
        "max_completion_length": task.max_completion_length,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "temperature": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,  # our own bar shows the reward
        "gradient_checkpointing": on_gpu,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "seed": options.seed,
    }
    return GRPOConfig(**{**values, **overrides})


def evaluate(trainer: Any, task: Task) -> Accuracy:
    """Return held-out accuracy of the weights of this moment, generated by the daemon that training uses."""
    trainer.force_sync()
    prompts = [_prompt_ids(trainer.processing_class, row["prompt"]) for row in task.held_out]
    length = task.max_completion_length
    params = [
        SamplingParams(n=EVAL_SAMPLES, temperature=1.0, max_tokens=length, seed=EVAL_SEED + i)
        for i in range(len(prompts))  # one seed for all would give every problem the same random numbers
    ]
    sampled = trainer.rollout_client.generate(prompts, params)
    greedy = trainer.rollout_client.generate(prompts, SamplingParams(temperature=0.0, max_tokens=length))
    return Accuracy(_share_right(sampled, task), _share_right(greedy, task))


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(ids)


def _share_right(outputs: Sequence[Any], task: Task) -> float:
    right = [
        task.is_right(completion.text, row["answer"])
        for row, output in zip(task.held_out, outputs, strict=True)
        for completion in output.outputs
    ]
    return sum(right) / len(right)


def reward_of(task: Task) -> Callable[..., list[float]]:
    """Return TRL's reward function: 1 for a right completion, 0 for another."""

    def correctness(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(task.is_right(text, expected)) for text, expected in zip(texts, answer, strict=True)]

    return correctness


def run(model: str, task: Task, options: argparse.Namespace, **overrides: Any) -> Result:
    """Train, evaluate before and after, and return the result; the plot and a JSON of it lie in `options.out`."""
    quiet()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_of(task),
        args=config_of(options, task, **overrides),
        train_dataset=Dataset.from_list(task.train),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    show_progress(trainer)
    before = evaluate(trainer, task)
    print(f"held-out accuracy before: sampled {before.sampled:.1%}, greedy {before.greedy:.1%}", flush=True)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after = evaluate(trainer, task)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    metrics, gap = trainer.rollout_metrics, trainer.rollout_logprob_gap
    result = Result(
        accuracy_before=before,
        accuracy_after=after,
        reward_before=_mean(rewards[:10]),
        reward_after=_mean(rewards[-10:]),
        num_held_out=len(task.held_out),
        steps=options.steps,
        train_seconds=seconds,
        rollout_tokens_per_s=metrics.tokens_per_second,
        num_syncs=metrics.num_syncs,
        seconds_per_sync=metrics.sync_seconds / metrics.num_syncs,
        bytes_per_sync=metrics.sync_bytes / metrics.num_syncs,
        logprob_gap_mean=gap.mean or 0.0,
        logprob_gap_max=gap.max,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    plot_rewards(rewards, options.out / "reward.png")
    (options.out / "result.json").write_text(json.dumps(asdict(result), indent=1))
    print(f"\n{result.table()}\n\nplot: {options.out / 'reward.png'}", flush=True)
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def plot_rewards(rewards: Sequence[float], path: Path) -> None:
    """Draw reward over steps, raw and as a running mean of 20."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(range(1, len(rewards) + 1), rewards, color="0.75", linewidth=1, label="step")
    running = [_mean(rewards[max(0, i - 19) : i + 1]) for i in range(len(rewards))]
    axes.plot(range(1, len(rewards) + 1), running, color="C0", linewidth=2, label="mean of 20 steps")
    axes.set_xlabel("GRPO step")
    axes.set_ylabel("reward")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
