"""LoRA GRPO: only the adapter travels, the trainer's base stays untouched, and the numbers agree. About a minute.

    python examples/grpo_lora.py

After each of 20 syncs the daemon's log-probabilities are compared with the PEFT model's own forward (fp32), and a hash
over the trainer's base weights is taken before the first and after the last sync. The script fails if any of it is off.
For a real model on a GPU change one line: `model = "Qwen/Qwen2.5-0.5B-Instruct"`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import arithmetic
import grpo_run
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from rolloutd import SamplingParams
from rolloutd.integrations.trl import GRPOTrainer

MAX_GAP = 5e-5


def base_hash(model: torch.nn.Module) -> str:
    """Return a hash over every parameter and buffer that is not the adapter's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def largest_gap(trainer: Any, prompts: list[list[int]]) -> float:
    """Return max |log p difference| between fresh rollouts and the PEFT model's forward."""
    outputs = trainer.rollout_client.generate(prompts, SamplingParams(n=4, max_tokens=arithmetic.MAX_COMPLETION))
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    worst = 0.0
    for output in outputs:
        for completion in output.outputs:
            ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]], device=model.device)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(output.prompt_token_ids) - 1 : -1].float()
            logp = torch.log_softmax(logits, -1).gather(1, ids[0, len(output.prompt_token_ids) :, None])[:, 0].cpu()
            worst = max(worst, float((logp - torch.tensor(completion.logprobs)).abs().max()))
    model.train(was_training)
    return worst


def main() -> None:
    """Train with an adapter and check every sync."""
    parser = grpo_run.parser(__doc__ or "", steps=20, prompts=8, generations=8)
    parser.set_defaults(learning_rate=1e-3)
    parser.add_argument("--cache-dir", type=Path, default=Path(__file__).parent.parent / ".cache")
    parser.add_argument("--pretrain-steps", type=int, default=60)
    options = parser.parse_args()
    grpo_run.quiet()
    recipe = arithmetic.Recipe(steps=options.pretrain_steps)
    model = str(arithmetic.prepare(options.cache_dir, recipe))
    train, _ = arithmetic.split(300)
    task = grpo_run.Task(
        train=[{"prompt": one.prompt, "answer": one.answer} for one in train],
        held_out=[],
        is_right=arithmetic.is_right,
        max_completion_length=arithmetic.MAX_COMPLETION,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    gaps: list[float] = []
    prompts = [tokenizer(one.prompt)["input_ids"] for one in train[:8]]

    class CheckedTrainer(GRPOTrainer):
        """Compares rollouts with the PEFT model after each sync, before the next optimizer step."""

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._generate(*args, **kwargs)
            gaps.append(largest_gap(self, prompts))
            return result

    trainer = CheckedTrainer(
        model=model,
        reward_funcs=grpo_run.reward_of(task),
        args=grpo_run.config_of(options, task),
        train_dataset=Dataset.from_list(task.train),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    grpo_run.show_progress(trainer)
    before = base_hash(trainer.model)
    trainer.train()
    after = base_hash(trainer.model)
    metrics = trainer.rollout_metrics
    adapter_bytes = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    model_bytes = sum(p.nbytes for p in trainer.model.parameters()) - adapter_bytes
    print(f"syncs                       {metrics.num_syncs}")
    print(f"bytes per sync              {metrics.sync_bytes / metrics.num_syncs:,.0f} (adapter {adapter_bytes:,})")
    print(f"bytes of the whole model    {model_bytes:,}")
    print(f"hash of the base            before {before}, after {after}")
    print(f"max |log p - PEFT model's|  {max(gaps):.1e} over {len(gaps)} syncs (limit {MAX_GAP:.0e})")
    if before != after or max(gaps) > MAX_GAP or metrics.sync_bytes != metrics.num_syncs * adapter_bytes:
        raise SystemExit("the base changed, the numbers disagree, or more than the adapter travelled")


if __name__ == "__main__":
    main()
