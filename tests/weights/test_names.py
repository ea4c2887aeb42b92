"""Trainer names: every wrapper that may stand around a Hugging Face parameter, alone and nested."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from rolloutd.weights.names import canonical_name, split_lora_name

PATH = "model.layers.0.self_attn.q_proj"
WRAPPERS = ["module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"]


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        (f"{PATH}.weight", f"{PATH}.weight"),
        (f"module.{PATH}.weight", f"{PATH}.weight"),
        (f"module.module.{PATH}.bias", f"{PATH}.bias"),
        (f"_orig_mod.{PATH}.weight", f"{PATH}.weight"),
        (
            "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.weight",
            f"{PATH}.weight",
        ),
        (
            "model.layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.self_attn.q_proj.weight",
            f"{PATH}.weight",
        ),
        ("_fsdp_wrapped_module.lm_head.weight", "lm_head.weight"),
        (f"base_model.model.{PATH}.base_layer.weight", f"{PATH}.weight"),
        (f"base_model.model.{PATH}.base_layer.bias", f"{PATH}.bias"),
        (f"base_model.model.{PATH}.lora_A.default.weight", f"{PATH}.lora_A.weight"),
        (f"base_model.model.{PATH}.lora_B.policy-2.weight", f"{PATH}.lora_B.weight"),
        (f"base_model.model.{PATH}.lora_B.default.bias", f"{PATH}.lora_B.bias"),
        (f"base_model.model.{PATH}.lora_A.weight", f"{PATH}.lora_A.weight"),
        (
            "module._fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj"
            ".lora_A.default._orig_mod.weight",
            f"{PATH}.lora_A.weight",
        ),
        ("_fsdp_wrapped_module.base_model._fsdp_wrapped_module.model.model.norm.weight", "model.norm.weight"),
        (f"base_model.model.{PATH}", PATH),
        ("model.my_module.weight", "model.my_module.weight"),
        ("model.modules.weight", "model.modules.weight"),
        ("encoder.base_model.model.weight", "encoder.base_model.model.weight"),
    ],
)
def test_the_bare_models_name_comes_out(raw: str, canonical: str) -> None:
    assert canonical_name(raw) == canonical
    assert canonical_name(canonical) == canonical


@given(st.data())
def test_wrappers_may_stand_anywhere(data: st.DataObject) -> None:
    parts = []
    for part in f"{PATH}.lora_A.default.weight".split("."):
        parts += [*data.draw(st.lists(st.sampled_from(WRAPPERS), max_size=2)), part]
    assert canonical_name(".".join(parts)) == f"{PATH}.lora_A.weight"


@pytest.mark.parametrize("target_modules", [["q_proj", "down_proj"], "all-linear"])
def test_peft_names_come_back_to_the_models_own(target_modules: list[str] | str) -> None:
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    expected = {name for name, _ in model.named_parameters()}
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    peft_model = nn.ModuleDict({"module": get_peft_model(model, LoraConfig(r=2, target_modules=target_modules))})
    split = {name: split_lora_name(canonical_name(name)) for name, _ in peft_model.named_parameters()}
    assert {canonical_name(name) for name, pair in split.items() if pair is None} == expected
    pairs = [pair for pair in split.values() if pair is not None]
    assert {path for path, _ in pairs} <= modules
    assert sorted(pairs) == sorted((path, side) for path in {path for path, _ in pairs} for side in ("A", "B"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        (f"{PATH}.lora_A.weight", (PATH, "A")),
        (f"{PATH}.lora_B.weight", (PATH, "B")),
        (f"{PATH}.weight", None),
        (f"{PATH}.lora_B.bias", None),
        (f"{PATH}.lora_C.weight", None),
        (f"{PATH}.lora_magnitude_vector.default.weight", None),
        ("model.embed_tokens.lora_embedding_A.default", None),
        ("lora_A.weight", None),
    ],
)
def test_adapter_matrices_are_told_from_everything_else(name: str, split: tuple[str, str] | None) -> None:
    assert split_lora_name(name) == split
