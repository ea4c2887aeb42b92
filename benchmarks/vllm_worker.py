"""vLLM as a peer, in an environment of its own: run by that environment's interpreter, imports nothing of ours."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Answer requests until the input ends, as worker.py does."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    llm = LLM(
        model=options["model"],
        skip_tokenizer_init=True,
        dtype=options["dtype"],
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        enable_prefix_caching=True,
    )

    def generate(prompts: list[list[int]], samples: int, new_tokens: list[int]) -> Any:
        params = [
            SamplingParams(n=samples, max_tokens=n, min_tokens=n, ignore_eos=True, logprobs=0, detokenize=False)
            for n in new_tokens
        ]
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    generate([[1, 2, 3, 4]], 1, [1])
    out.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        outputs = generate(request["prompts"], request["samples"], request["new_tokens"])
        seconds = time.perf_counter() - begin
        lengths = [[len(completion.token_ids) for completion in output.outputs] for output in outputs]
        answer: dict[str, Any] = {"seconds": seconds, "cpu_s": 0.0}
        if lengths != [[n] * request["samples"] for n in request["new_tokens"]]:
            answer = {"error": f"completions of {lengths} tokens"}
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
