"""One peer in a process of its own, so that its memory and its start are its own: JSON lines in, JSON lines out.

    python -m rolloutd.benchmarks.worker KIND OPTIONS

Requests are objects with "op"; an answer is one object. The first line that comes says that the peer is ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Generator(Protocol):
    """What a peer is asked to do."""

    def generate(self, prompts: list[list[int]], samples: int, new_tokens: list[int]) -> list[list[list[int]]]:
        """Return token ids by prompt and sample, drawn at temperature 1; end-of-sequence is ignored."""
        ...


class Ours:
    """Our engine, wherever it runs."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._outputs: list[Any] = []

    def generate(self, prompts: list[list[int]], samples: int, new_tokens: list[int]) -> list[list[list[int]]]:
        """Generate, with both log-probabilities of each token."""
        self._outputs = self._engine.generate(prompts, sampling(samples, new_tokens))
        return [[completion.token_ids for completion in output.outputs] for output in self._outputs]

    def logprobs(self) -> list[list[list[float]]]:
        """Return those of the last run, by prompt and sample."""
        return [[completion.logprobs for completion in output.outputs] for output in self._outputs]


class InProcess(Ours):
    """Our engine in this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        from rolloutd.llm import LLM

        lora = options.pop("lora", "off")
        self.llm = LLM(**options)
        super().__init__(self.llm)
        if lora != "off":
            self._push_adapter(lora)

    def stats(self) -> dict[str, Any]:
        """Return counters since the start."""
        stats = self.llm.stats()
        return {name: getattr(stats, name) for name in ("num_steps", "prefill_tokens", "decode_tokens", "block_copies")}

    def _push_adapter(self, mode: str, rank: int = 16) -> None:
        runner: Any = self.llm.engine._runner
        model = runner._model
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for path, (rows, columns) in model.lora_targets.items():
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / rank**0.5
        self.llm.update_lora(tensors.items(), {"r": rank, "lora_alpha": rank / 100}, mode=mode)  # type: ignore[arg-type]


class ThroughDaemon(Ours):
    """Our engine in a daemon, through its socket."""

    def __init__(self, options: dict[str, Any]) -> None:
        from rolloutd.serve.client import RolloutClient
        from rolloutd.serve.spawn import start_daemon

        self._daemon = start_daemon(options, {"die_with_parent": True})
        self.client = RolloutClient(self._daemon.address)
        super().__init__(self.client)


def sampling(samples: int, new_tokens: list[int]) -> list[Any]:
    """Return parameters for each prompt."""
    from rolloutd.sampling_params import SamplingParams

    return [SamplingParams(n=samples, max_tokens=length, ignore_eos=True) for length in new_tokens]


class Transformers:
    """transformers: `model.generate` in one padded batch, as TRL without a server generates."""

    def __init__(self, options: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM

        dtype, self._device = getattr(torch, options["dtype"]), options["device"]
        self._batch = options["max_num_seqs"]
        self.model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval().to(self._device)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], samples: int, new_tokens: list[int]) -> list[list[list[int]]]:
        """Generate without log-probabilities; what is longer than wanted is computed and cut off."""
        tokens, step = [], max(1, self._batch // samples)
        for at in range(0, len(prompts), step):
            lengths = new_tokens[at : at + step]
            ids = torch.tensor(prompts[at : at + step], device=self._device).repeat_interleave(samples, 0)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=max(lengths),
                min_new_tokens=max(lengths),
                pad_token_id=0,
            )[:, ids.shape[1] :].tolist()
            groups = [out[i : i + samples] for i in range(0, len(out), samples)]
            tokens += [[row[:length] for row in group] for group, length in zip(groups, lengths, strict=True)]
        return tokens

    @torch.inference_mode()
    def score(self, prompt: list[int], completion: list[int]) -> list[float]:
        """Return log p of each token of a completion by a plain forward."""
        ids = torch.tensor([[*prompt, *completion]], device=self._device)
        logits = self.model(ids).logits[0, len(prompt) - 1 : -1].float()
        return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()


class ContinuousBatching(Transformers):
    """transformers' continuous batching, `generate_batch`."""

    @torch.no_grad()  # its buffers may not be made in inference mode
    def generate(self, prompts: list[list[int]], samples: int, new_tokens: list[int]) -> list[list[list[int]]]:
        """Generate; requests of one length go in one call, as the length is the call's."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        tokens: list[list[list[int]]] = [[] for _ in prompts]
        for length in sorted(set(new_tokens)):
            chosen = [i for i, wanted in enumerate(new_tokens) if wanted == length]
            config = GenerationConfig(
                max_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1, pad_token_id=0
            )
            inputs = [prompts[i] for i in chosen for _ in range(samples)]
            memory = ContinuousBatchingConfig(max_memory_percent=0.5 if self._device == "cuda" else 0.15)
            answers = self.model.generate_batch(
                inputs=inputs, generation_config=config, continuous_batching_config=memory, progress_bar=False
            )
            rows = [answers[key].generated_tokens for key in sorted(answers, key=_request_number)]
            for at, i in enumerate(chosen):
                tokens[i] = rows[at * samples : (at + 1) * samples]
        return tokens


def _request_number(key: str) -> int:
    return int(key.rpartition("_")[2])


KINDS: dict[str, Callable[[dict[str, Any]], Generator]] = {
    "rolloutd": InProcess,
    "deterministic": InProcess,
    "daemon": ThroughDaemon,
    "generate": Transformers,
    "generate_batch": ContinuousBatching,
}


def _answer(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    op = request["op"]
    if op == "run":
        return _run(peer, request)
    if op == "score":
        return {"logprobs": [peer.score(prompt, completion) for prompt, completion in request["pairs"]]}
    if op == "breakdown":
        from rolloutd.benchmarks.breakdown import breakdown

        return breakdown(peer, request)
    if op == "wire":
        from rolloutd.benchmarks.breakdown import wire

        return wire(peer, request)
    if op == "profile":
        from rolloutd.benchmarks.gpu_profile import profile

        return profile(peer, request)
    raise ValueError(f"unknown op {op!r}")


def _run(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    before = peer.stats() if hasattr(peer, "stats") else {}
    used, begin = time.process_time(), time.perf_counter()
    tokens = peer.generate(request["prompts"], request["samples"], request["new_tokens"])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - used
    lengths = [[len(row) for row in group] for group in tokens]
    wanted = [[length] * request["samples"] for length in request["new_tokens"]]
    if lengths != wanted:
        raise ValueError(f"completions of {lengths} tokens, {wanted} were asked for")
    answer: dict[str, Any] = {"seconds": seconds, "cpu_s": cpu_s}
    if torch.cuda.is_available():
        answer |= {"on_gpu": True, "peak_bytes": torch.cuda.max_memory_reserved()}
    if before:
        answer["stats"] = {name: value - before[name] for name, value in peer.stats().items()}
    if request.get("keep"):
        answer["tokens"] = [group[0] for group in tokens]
        answer["logprobs"] = [group[0] for group in peer.logprobs()]
    return answer


def main() -> None:
    """Serve requests until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    peer = KINDS[kind](options)
    peer.generate([[1, 2, 3, 4]], 1, [1])
    out.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        try:
            answer = _answer(peer, json.loads(line))
        except Exception as error:  # the one boundary: the parent gets it by name
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
