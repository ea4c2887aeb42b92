"""Adapters: PEFT's own scaling is the oracle; whatever is more than pairs on linear layers is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from rolloutd.errors import LoraUnsupported, ManifestMismatch
from rolloutd.weights.lora import check_peft_config, pair_up, scaling_from_config
from rolloutd.weights.manifest import LoraSpec
from rolloutd.weights.names import canonical_name, split_lora_name

Factory = Callable[..., Path]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
TARGETS = {Q: (16, 8), V: (4, 8)}


def as_json(config: LoraConfig) -> dict[str, Any]:
    """Return the config as adapter_config.json holds it: lists for sets, strings for enums."""
    text = json.dumps(config.to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    restored: dict[str, Any] = json.loads(text)
    return restored


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "lora_alpha": 7},
        {"lora_alpha": 0},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 16}},
        {"alpha_pattern": {"v_proj": 1, "layers.1.self_attn.q_proj": 33}},
        {"alpha_pattern": {r".*\.1\.mlp\.\w+_proj": 5, "down_proj": 6}},
        {"alpha_pattern": {"k_proj|v_proj": 9, r"(q|v|up)_proj": 3}},
        {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64, "q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2, "model.layers.0.self_attn.q_proj": 64}},
        {"rank_pattern": {"^model.layers.0.*": 2}, "alpha_pattern": {"o_proj": 12}, "use_rslora": True},
        {"alpha_pattern": {"self_attn": 3, "q_pro": 4, "q_proj": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
def test_scaling_is_what_peft_computes(tiny_model: Factory, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"))
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **options})
    peft_model = get_peft_model(model, config)
    expected = {
        canonical_name(name): module.scaling["default"]
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }
    ranks = {}
    for name, parameter in peft_model.named_parameters():
        split = split_lora_name(canonical_name(name))
        if split is not None and split[1] == "A":
            ranks[split[0]] = parameter.shape[0]
    assert ranks.keys() == expected.keys() != set()
    live = peft_model.peft_config["default"]
    for as_mapping in (live.to_dict(), as_json(live)):
        check_peft_config(as_mapping)
        assert scaling_from_config(as_mapping, ranks) == expected


def test_a_rank_of_zero_is_a_shard_that_was_not_gathered() -> None:
    with pytest.raises(ManifestMismatch, match=f"{Q}: lora_A has 0 rows. Gather"):
        scaling_from_config({"lora_alpha": 8}, {Q: 0})


UNSUPPORTED: dict[str, Mapping[str, Any]] = {
    "use_dora": {"use_dora": True},
    "use_qalora": {"use_qalora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "bias=.all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "target_parameters": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["lm_head"]},
    "takes in lm_head": {"target_modules": r".*(q_proj|lm_head)"},
}


@pytest.mark.parametrize("words", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own advice on some of these options
def test_each_unsupported_kind_is_refused_by_name(words: str) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], **UNSUPPORTED[words]})
    for as_mapping in (config.to_dict(), as_json(config)):
        with pytest.raises(LoraUnsupported, match=words) as caught:
            check_peft_config(as_mapping)
        assert "update_weights" in caught.value.message
        assert len(caught.value.message) < 300


@pytest.mark.parametrize("option", ["use_bdlora", "arrow_config", "kasa_config", "monteclora_config"])
def test_kinds_that_only_newer_peft_knows_are_refused_by_name(option: str) -> None:
    config = {**LoraConfig(target_modules=["q_proj"]).to_dict(), option: {"x": 1}}
    with pytest.raises(LoraUnsupported, match=option):
        check_peft_config(config)


def test_other_adapters_are_refused_by_name() -> None:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(LoraUnsupported, match=r"peft_type=IA3 .*only LORA"):
        check_peft_config(config.to_dict())
    with pytest.raises(LoraUnsupported, match="peft_type=ADALORA"):
        check_peft_config({"peft_type": "ADALORA"})


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"lora_dropout": 0.1},
        {"target_modules": "all-linear"},
        {"target_modules": r"(?!.*lm_head).*_proj"},
        {"target_modules": ["model.layers.0.self_attn.q_proj"], "exclude_modules": ["lm_head"]},
        {"modules_to_save": [], "target_parameters": None},
    ],
    ids=str,
)
def test_what_leaves_pairs_on_linear_layers_is_served(options: dict[str, Any]) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj"], **options})
    check_peft_config(config.to_dict())
    check_peft_config(as_json(config))
    assert scaling_from_config(config.to_dict(), {Q: 4}) == {Q: 2.0}


# ---------------------------------------------------------------- pairs


def adapter() -> dict[str, Tensor]:
    return {
        f"{path}.lora_{side}.weight": torch.ones((2, columns) if side == "A" else (rows, 2))
        for path, (rows, columns) in TARGETS.items()
        for side in ("A", "B")
    }


def spec(**scaling: float) -> LoraSpec:
    return LoraSpec({Q: 2.0, V: 0.5, **scaling}, "exact")


def test_pairs_come_with_their_scaling() -> None:
    tensors = adapter()
    pairs = pair_up(tensors, spec(), TARGETS)
    assert pairs.keys() == {Q, V}
    assert pairs[Q].a is tensors[f"{Q}.lora_A.weight"]
    assert pairs[Q].b is tensors[f"{Q}.lora_B.weight"]
    assert (pairs[Q].scaling, pairs[V].scaling) == (2.0, 0.5)


def replaced(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {**adapter(), name: torch.ones(shape)}


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in adapter().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(f"{Q}.lora_B.weight"), f"{Q}: lora_A came without lora_B"),
        (without(f"{V}.lora_A.weight"), f"{V}: lora_B came without lora_A"),
        (replaced(f"{Q}.lora_A.weight", (2, 9)), r"lora_A \[2, 9\].*expected \[r, 8\] and \[16, r\]"),
        (replaced(f"{Q}.lora_B.weight", (15, 2)), r"lora_B \[15, 2\]"),
        (replaced(f"{Q}.lora_B.weight", (16, 3)), r"lora_A \[2, 8\] and lora_B \[16, 3\] do not fit"),
        (replaced(f"{Q}.lora_A.weight", (2, 8, 1)), "do not fit"),
        (replaced(f"{Q}.lora_A.weight", ()), "do not fit"),
        (
            {**replaced(f"{Q}.lora_A.weight", (0, 8)), f"{Q}.lora_B.weight": torch.ones(16, 0)},
            r"lora_A \[0, 8\] and lora_B \[16, 0\] do not fit",
        ),
        (
            replaced("model.layers.0.self_attn.q_prj.lora_A.weight", (2, 8)),
            rf"no linear layer .*q_prj'. Did you mean '{Q}'\? .*Hugging Face parameter names",
        ),
        ({}, "no lora_A and lora_B"),
    ],
    ids=["no B", "no A", "in", "out", "rank", "3-D", "scalar", "rank 0", "unknown module", "nothing"],
)
def test_what_does_not_pair_up_is_named(tensors: dict[str, Tensor], words: str) -> None:
    scaling = dict.fromkeys({name.rsplit(".", 2)[0] for name in tensors}, 1.0)
    with pytest.raises(ManifestMismatch, match=words):
        pair_up(tensors, LoraSpec(scaling, "exact"), TARGETS)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_scaling_is_finite(factor: float) -> None:
    with pytest.raises(ManifestMismatch, match=f"{Q}: its scaling is {factor}"):
        pair_up(adapter(), spec(**{Q: factor}), TARGETS)


def test_scaling_and_pairs_have_the_same_modules() -> None:
    with pytest.raises(ManifestMismatch, match=f"{V}: its scaling is missing"):
        pair_up(adapter(), LoraSpec({Q: 1.0}, "exact"), TARGETS)
    with pytest.raises(ManifestMismatch, match=r"scaling names 'model\.norm', for which no matrices came"):
        pair_up(adapter(), spec(**{"model.norm": 1.0}), TARGETS)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (f"{Q}.lora_magnitude_vector.default.weight", "use_dora"),
        ("model.embed_tokens.lora_embedding_A.default", "an embedding in target_modules"),
        ("lm_head.modules_to_save.default.weight", "modules_to_save"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta.default", "trainable_token_indices"),
        (f"{Q}.lora_B.bias", "lora_bias"),
        (f"{Q}.lora_diag.default", "kasa_config"),
        (f"{Q}.bias", "is no lora_A or lora_B matrix"),
    ],
)
def test_other_tensors_name_the_option_they_come_from(name: str, option: str) -> None:
    with pytest.raises(LoraUnsupported, match=option):
        pair_up({**adapter(), name: torch.ones(2)}, spec(), TARGETS)
