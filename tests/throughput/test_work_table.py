"""A small GRPO batch's work beside a committed table, in both directions; and six regressions that it must catch.

`python -m tests.throughput.test_work_table` writes the table anew: a change of work changes it in its own commit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rolloutd.engine.sequence import Sequence
from rolloutd.runtime.cpu_kernels import cpu_kernels
from rolloutd.runtime.cpu_ops import CpuOps, PackedWeights
from rolloutd.runtime.model_runner import ModelRunner
from rolloutd.serve import arrays
from tests.throughput.meter import NEW_TOKENS, PROMPTS, SAMPLES, measure

TABLE = Path(__file__).with_name("work.json")
MODEL = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 512, "max_len": 128}

REASONS = {
    "prompt_tokens_computed": "4 prompts of 72 tokens, each once for its 4 samples",
    "decode_tokens_computed": "16 sequences x 5 tokens: the last one that is sampled is never computed",
    "steps": "one that prefills and samples, then one for each further token",
    "block_copies": "a prompt of 72 tokens ends inside of a block, which 3 of 4 samples copy before they write to it",
    "peak_blocks": "4 whole blocks a prompt, shared, and one of its own for each of the 16 sequences",
    "wire_bytes": "20 bytes a token (id, two log-probabilities, version), the prompts, a header for each completion",
    "decode_host_calls": "functions of the package called in one step of 16 sequences: the host's work on it",
    "prefill_operators": "operators of torch in the step that prefills",
    "prefill_products": "4 a layer, and the head; the 2 of the first MLP twice, as it takes 256 rows at a time",
    "prefill_product_rows": "288 rows a product; 4, one a prompt, in the head and in 3 products of the last layer",
    "prefill_product_flops": "2 x rows x outputs x inputs",
    "prefill_product_bytes": "inputs, weights and outputs, once each",
    "prefill_weights_packed": "none: weights are packed when they arrive",
    "prefill_allocations": "new tensors of the step",
    "prefill_allocated_bytes": "their bytes",
    "prefill_kernel_calls": "embedding, norms, rotation, activation, attention of each prompt (last layer: once), draw",
    "prefill_attention_items": "rows of a chunk that are attended together; in the last layer one row a prompt",
    "decode_operators": "operators of torch in a step that decodes: none of the model's, which are one recorded call",
    "decode_products": "4 a layer, and the head",
    "decode_product_rows": "16 rows in each of 9 products",
    "decode_product_flops": "2 x rows x outputs x inputs",
    "decode_product_bytes": "inputs, weights and outputs, once each",
    "decode_weights_packed": "none",
    "decode_allocations": "new tensors of the step: what is drawn, a token and two log-probabilities a row",
    "decode_allocated_bytes": "their bytes",
    "decode_kernel_calls": "5 a layer, the embedding, the first norm, the draw",
    "decode_attention_items": "4 groups in each of 2 layers: what a prompt's samples share is read once",
}

OF_TORCH = ("operators", "allocations", "allocated_bytes")
"""What another version of torch may do in other pieces: compared under the version that the table was made with."""

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="the table is of the fast path, which needs a C compiler")


def assert_as_committed(work: dict[str, int]) -> None:
    """Raise with every number that differs, and what it is made of."""
    table = json.loads(TABLE.read_text())
    committed, names = table["work"], work.keys() | table["work"].keys()
    if table["torch"] != version("torch"):
        names = {name for name in names if not name.endswith(OF_TORCH)}
    changed = [
        f"{name}: {work.get(name)} was {committed.get(name)} ({REASONS[name]})"
        for name in sorted(names)
        if work.get(name) != committed.get(name)
    ]
    assert not changed, "\n".join([*changed, f"If this is meant: python -m {__name__}, and commit the table."])


def test_work_is_what_the_table_says(tiny_model: Callable[..., Path]) -> None:
    assert_as_committed(measure(tiny_model("qwen2", **MODEL)))


def test_every_number_has_a_reason_and_follows_from_it() -> None:
    work = json.loads(TABLE.read_text())["work"]
    assert work.keys() == REASONS.keys()
    sequences, layers = SAMPLES * len(PROMPTS), MODEL["layers"]
    assert work["prompt_tokens_computed"] == sum(map(len, PROMPTS))
    assert work["decode_tokens_computed"] == sequences * (NEW_TOKENS - 1)
    assert work["steps"] == NEW_TOKENS
    assert work["block_copies"] == sequences - len(PROMPTS)
    assert work["decode_products"] == 4 * layers + 1
    assert work["prefill_products"] == 4 * layers + 1 + 2 * (layers - 1)
    assert work["decode_product_rows"] == sequences * (4 * layers + 1)
    assert work["prefill_product_rows"] == 288 * (4 * (layers - 1) + 1) + len(PROMPTS) * (3 + 1)
    assert work["decode_attention_items"] == len(PROMPTS) * layers
    assert work["decode_kernel_calls"] == 5 * layers + 3
    assert work["decode_weights_packed"] == work["prefill_weights_packed"] == 0
    outputs, inputs = (128, 64, 384, 64), (64, 64, 64, 192)
    weights = layers * sum(n * k for n, k in zip(outputs, inputs, strict=True)) + 512 * 64
    assert work["decode_product_flops"] == 2 * sequences * weights
    assert work["wire_bytes"] < 20 * sequences * NEW_TOKENS + 4 * 288 + 200 * sequences


# ------------------------------------------------------------------ what must not pass


def prefix_sharing_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "is_fresh", property(lambda self: False))


def weights_packed_in_every_step(patch: pytest.MonkeyPatch) -> None:
    def linear(self: CpuOps, x: Tensor, layer: Any) -> Tensor:
        return PackedWeights(self._kernels).multiply(x, layer.weight, layer.bias)

    patch.setattr(CpuOps, "linear", linear)


def one_more_copy_of_the_kv_cache(patch: pytest.MonkeyPatch) -> None:
    attend = CpuOps.paged_attention

    def copying(self: CpuOps, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return attend(self, q, k.clone(), v, *rest)

    patch.setattr(CpuOps, "paged_attention", copying)


def logits_of_tokens_that_are_not_sampled(patch: pytest.MonkeyPatch) -> None:
    sample = ModelRunner._sample

    def wasteful(self: Any, batch: Any, inputs: Any, hidden_TE: Tensor, prompt: Any) -> Any:
        self._model.logits(self.weights, hidden_TE)
        return sample(self, batch, inputs, hidden_TE, prompt)

    patch.setattr(ModelRunner, "_sample", wasteful)


def one_more_product_in_each_layer(patch: pytest.MonkeyPatch) -> None:
    rotate = CpuOps.rope_and_store

    def wasteful(self: CpuOps, q: Tensor, *rest: Any) -> Tensor:
        torch.mm(q, q.t())
        return rotate(self, q, *rest)

    patch.setattr(CpuOps, "rope_and_store", wasteful)


def json_for_each_token_on_the_wire(patch: pytest.MonkeyPatch) -> None:
    pack = arrays.pack_finished

    def verbose(done: Any, prompt_ids: Any) -> Any:
        packed, completion = pack(done, prompt_ids), done.completion
        tokens = zip(completion.token_ids, completion.logprobs, strict=True)
        text = json.dumps([{"token_id": token, "logprob": logprob} for token, logprob in tokens])
        return arrays.Finished(packed.item, (text.encode(), *packed.columns[1:]))

    patch.setattr(arrays, "pack_finished", verbose)


@pytest.mark.parametrize(
    ("regression", "seen"),
    [
        (prefix_sharing_off, ["prompt_tokens_computed", "peak_blocks", "decode_attention_items"]),
        (weights_packed_in_every_step, ["prefill_weights_packed"]),  # a recorded step has no place for it
        (one_more_copy_of_the_kv_cache, ["decode_allocated_bytes", "decode_operators"]),  # and is not recorded
        (logits_of_tokens_that_are_not_sampled, ["prefill_product_rows", "prefill_product_flops"]),
        (one_more_product_in_each_layer, ["decode_products", "prefill_products"]),
        (json_for_each_token_on_the_wire, ["wire_bytes"]),
    ],
)
def test_a_regression_is_caught(
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    regression: Callable[[pytest.MonkeyPatch], None],
    seen: list[str],
) -> None:
    regression(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        assert_as_committed(measure(tiny_model("qwen2", **MODEL)))
    print(caught.value)
    for name in seen:
        assert f"{name}: " in str(caught.value)


def main() -> None:
    """Write the table."""
    from tests.tiny_models import build

    with tempfile.TemporaryDirectory() as folder:
        work = measure(build("qwen2", Path(folder, "model"), **MODEL))  # type: ignore[arg-type]
    TABLE.write_text(json.dumps({"torch": version("torch"), "work": work}, indent=1) + "\n")


if __name__ == "__main__":
    main()
