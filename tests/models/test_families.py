"""Families by themselves: options that are refused by name, sizes, and that no product goes past the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from rolloutd import LLM
from rolloutd.errors import ConfigError, ModelUnsupported
from rolloutd.models.config import decoder_config
from rolloutd.models.model import pack
from rolloutd.models.native import NativeModel
from rolloutd.runtime.inputs import ForwardInputs, PrefillRows
from rolloutd.runtime.kv_cache import KVCache
from rolloutd.runtime.ops import AttentionSpec, Ops
from rolloutd.runtime.row_invariant import RowInvariantOps
from rolloutd.weights.packing import Linear, Precision
from tests.conformance.families import KINDS
from tests.tiny_models import Shape, build_config

Factory = Callable[..., Path]
FP32 = Precision(matrix=torch.float32, residual=torch.float32, head=torch.float32)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "kind", "changes", "words"),
    [
        ("Gemma2ForCausalLM", "gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma2ForCausalLM", "gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("Gemma2ForCausalLM", "gemma2", {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
        ("Gemma2ForCausalLM", "gemma2", {"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ("Gemma3ForCausalLM", "gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("Gemma3ForCausalLM", "gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Phi3ForCausalLM", "phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("Phi3ForCausalLM", "phi3", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("Olmo2ForCausalLM", "olmo2", {"rope_parameters": LONGROPE}, "rope_type='longrope'"),
        ("Olmo3ForCausalLM", "olmo3", {"sliding_window": None}, "sliding_window=None"),
        ("GraniteForCausalLM", "granite", {"quantization_config": {"bits": 4}}, "quantized"),
        ("GraniteForCausalLM", "granite", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "factor=0.5"),
        ("SmolLM3ForCausalLM", "smollm3", {"use_sliding_window": False}, "use_sliding_window=False"),
        ("SmolLM3ForCausalLM", "smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]"),
        ("Qwen2MoeForCausalLM", "qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "sliding_window=0"),
        ("Qwen3MoeForCausalLM", "qwen3_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("MixtralForCausalLM", "mixtral", {"rope_parameters": LONGROPE}, "rope_type='longrope'"),
    ],
)
def test_options_that_would_change_the_numbers_are_refused(
    architecture: str, kind: str, changes: dict[str, Any], words: str
) -> None:
    config = build_config(kind, Shape(), eos_id=2, pad_id=0)
    assert decoder_config(architecture, config).architecture == architecture
    for name, value in changes.items():  # set afterwards: transformers' own checks are not what is tested
        object.__setattr__(config, name, value)
    with pytest.raises(ModelUnsupported, match=f"{architecture}.*{words}"):
        decoder_config(architecture, config)


def test_a_longrope_serves_up_to_where_it_changes(tiny_model: Factory) -> None:
    rope = {**LONGROPE, "partial_rotary_factor": 1.0}
    folder = str(tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64))
    with pytest.raises(ConfigError, match=r"max_model_len=1024 > 64: a longrope RoPE.*--max-model-len 64"):
        LLM(folder)
    with LLM(folder, max_model_len=64) as llm:
        assert llm.info.max_model_len == 64


def native(folder: Path, ops: Ops) -> tuple[NativeModel, Any]:
    """Return a model and its weights, in fp32 on the CPU."""
    hf = AutoConfig.from_pretrained(folder)
    config = decoder_config(hf.architectures[0], hf)
    model = NativeModel(config, FP32, ops, max_model_len=64, device=torch.device("cpu"))
    return model, pack(model, load_file(folder / "model.safetensors").items())


class Watch(TorchDispatchMode):
    """Fails on a matrix product that is not inside `linear` or `paged_attention`."""

    inside = False
    num_products = 0

    @contextmanager
    def allowed(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in (".mm", "addmm", "bmm", "matmul", "linear", "attention", "einsum")):
            assert self.inside, f"{func} outside of the ops"
            self.num_products += 1
        return func(*args, **(kwargs or {}))


class WatchedOps(Ops):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        with self._watch.allowed():
            return super().linear(x, layer)

    def paged_attention(self, q: Tensor, k: Tensor, v: Tensor, inputs: ForwardInputs, spec: AttentionSpec) -> Tensor:
        with self._watch.allowed():
            return super().paged_attention(q, k, v, inputs, spec)


@pytest.mark.parametrize("kind", KINDS)
def test_every_product_goes_through_the_ops(kind: str, tiny_model: Factory) -> None:
    """So that a stricter kind of ops governs all of them: experts, their router and the head too."""
    watch = Watch()
    model, weights = native(tiny_model(kind), WatchedOps(watch))
    table = torch.arange(1)
    inputs = ForwardInputs(
        token_ids_T=torch.arange(8),
        positions_T=torch.arange(8),
        slot_mapping_T=torch.arange(8),
        num_decode=0,
        decode_block_tables_RM=torch.zeros(0, 0, dtype=torch.int64),
        decode_lens_R=torch.zeros(0, dtype=torch.int64),
        prefills=(PrefillRows(0, 0, 8, table),),
        last_row_of_chunk=np.array([7]),
    )
    cache = KVCache.allocate(model.kv_layers, 1, 16, torch.float32, torch.device("cpu"))
    with watch, torch.inference_mode():
        logits = model.logits(weights, model.forward(weights, inputs, cache))
    assert torch.isfinite(logits).all()
    assert watch.num_products >= 2 * 5 + 1, "qkv, attention, o, gate and up, down of two layers, and the head"


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_computes_only_what_is_drawn_from(kind: str, tiny_model: Factory) -> None:
    """Two rows that decode and two chunks: their last rows, and the cache, are those of a forward that gives all."""
    model, weights = native(tiny_model(kind), WatchedOps(Watch()))
    all_rows = ForwardInputs(
        token_ids_T=torch.tensor([5, 6, 1, 2, 3, 4, 7, 8, 9, 0, 11, 0]),
        positions_T=torch.tensor([3, 2, 0, 1, 2, 3, 4, 17, 18, 19, 20, 0]),
        slot_mapping_T=torch.tensor([3, 18, 32, 33, 34, 35, 36, 65, 66, 67, 68]),
        num_decode=2,
        decode_block_tables_RM=torch.tensor([[0], [1]]),
        decode_lens_R=torch.tensor([4, 3]),
        prefills=(PrefillRows(2, 0, 5, torch.tensor([2])), PrefillRows(7, 17, 4, torch.tensor([3, 4]))),
        last_row_of_chunk=np.array([6, 1, 10, 0]),
    )
    last_rows = replace(all_rows, last_only=True)
    caches = []
    for _ in range(2):
        cache = KVCache.allocate(model.kv_layers, 5, 16, torch.float32, torch.device("cpu"))
        for i, tensor in enumerate((*cache.keys, *cache.values)):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
        caches.append(cache)
    with torch.inference_mode():
        whole = model.forward(weights, all_rows, caches[0])
        last = model.forward(weights, last_rows, caches[1])
    assert (whole.shape[0], last.shape[0]) == (12, 4)
    assert last_rows.output_row_of_chunk.tolist() == [2, 1, 3, 0]
    torch.testing.assert_close(last[last_rows.output_row_of_chunk], whole[all_rows.output_row_of_chunk])
    for one, other in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "mixtral"])
def test_sizes_that_memory_is_planned_with(kind: str, tiny_model: Factory) -> None:
    model, weights = native(tiny_model(kind, hidden=64, head_dim=32, tie=True), Ops())
    layer = model.kv_layers[1]
    assert (len(model.kv_layers), layer.num_heads, layer.key_dim, layer.value_dim) == (2, 2, 32, 32)
    attention, experts = 2 * (4 + 2 * 2) * 32, {"qwen2_moe": 2 * 2 * 64 + 2 * 192, "mixtral": 2 * 2 * 64 + 2 * 192}
    assert model.num_activations == 4 * 64 + max(attention, 2 * 192, experts.get(kind, 0))
    assert weights.num_bytes == 4 * weights.num_parameters


def test_row_invariant_activations_are_what_they_are_called() -> None:
    x = torch.linspace(-12, 12, 2 * 101).view(1, -1)
    plain, strict = Ops(), RowInvariantOps()
    for name in ("silu_and_mul", "gelu_tanh_and_mul", "sigmoid"):
        expected = getattr(plain, name)(x.double())
        assert torch.allclose(getattr(strict, name)(x).double(), expected, rtol=1e-6, atol=1e-6), name
        assert getattr(strict, name)(x.bfloat16()).dtype == torch.bfloat16
