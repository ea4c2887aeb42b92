"""GRPO in two processes that share one rollout daemon: rank 0 starts it, each rank asks it for its own completions.

    accelerate launch --num_processes 2 --cpu examples/accelerate_two_processes.py

Offline, on a CPU, in about 30 seconds: a tiny model with random weights learns to write digits. With a GPU or two,
set `MODEL = "Qwen/Qwen2.5-0.5B-Instruct"` below and leave out `--cpu`; nothing else changes.

What happens when the daemon dies under a run: every rank ends, with the same named error, none hangs.

    accelerate launch --num_processes 2 --cpu examples/accelerate_two_processes.py --kill-daemon-at-step 3
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from rolloutd.errors import RolloutdError
from rolloutd.integrations.trl import GRPOConfig, GRPOTrainer

MODEL: str | None = None  # a folder or a hub id; None is the tiny model below


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left"
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a two-layer Qwen2 with random weights, the same on every rank."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Reward: the share of a completion's characters that are digits."""
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in completions]


class KillDaemon(TrainerCallback):
    """Kills the daemon that rank 0 started, after a given step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.trainer: GRPOTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        daemon = self.trainer.rollout_daemon if self.trainer is not None else None
        if daemon is not None and state.global_step == self.step:
            print(f"killing the daemon, process {daemon.pid}", flush=True)
            os.kill(daemon.pid, signal.SIGKILL)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO in two processes that share one rollout daemon.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds without a sign of the daemon")
    parser.add_argument("--kill-daemon-at-step", type=int, default=0, help="0: never")
    return parser.parse_args()


def start_both() -> int:
    """Start this script in two processes, for who launches only one: `python`, and `accelerate launch --cpu`.

    On a CPU accelerate leaves the processes to mpirun: it runs the script once, whatever --num_processes says.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *sys.argv]
    return subprocess.run(command, check=False).returncode


def main() -> None:
    options = parse()
    if "LOCAL_RANK" not in os.environ:
        sys.exit(start_both())
    tokenizer = None if MODEL else tiny_tokenizer()
    kill = KillDaemon(options.kill_daemon_at_step)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=MODEL or tiny_model(tokenizer),
            reward_funcs=digits,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=24,
                max_steps=options.steps,
                learning_rate=1e-6 if MODEL else 3e-2,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                rollout_server_timeout=options.timeout,
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"Count to {i}: " for i in range(2, 34)]}),
            processing_class=tokenizer,
            callbacks=[kill],
            use_rollout_server=True,
        )
        kill.trainer = trainer
        rank = trainer.accelerator.process_index
        try:
            trainer.train()
        except RolloutdError as error:
            sys.stderr.write(f"rank {rank} ended: {error}\n")  # now: the launcher ends us next
            sys.exit(1)
        metrics = trainer.rollout_metrics
        sys.stdout.write(f"rank {rank} done: {metrics.num_syncs} syncs, version {metrics.weight_version}\n")


if __name__ == "__main__":
    main()
