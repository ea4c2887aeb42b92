"""Weight and adapter updates through `LLM`: the numbers that serve afterwards, refusals, versions, prefix reuse."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rolloutd import LLM, SamplingParams
from rolloutd.errors import ConfigError, LoraUnsupported, ManifestMismatch, RolloutdError, StaleWeights
from rolloutd.weights.push import Push
from rolloutd.weights.tensors import bytes_of
from tests.engine import forward_gap

Factory = Callable[..., Path]
PROMPTS = [[random.Random(i).randrange(256) for _ in range(5 + 4 * i)] for i in range(6)]
PARAMS = SamplingParams(n=2, max_tokens=16, seed=1, ignore_eos=True)


@pytest.fixture
def folder(tiny_model: Factory) -> Path:
    return tiny_model("qwen2", tie=True)


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as llm:
        yield llm


def largest_gap(llm: LLM, model: Any) -> float:
    """Return max |log p difference| of fresh rollouts to a plain forward of `model`."""
    return forward_gap.largest_gap(llm, model, PROMPTS, PARAMS)


def trained_copy(folder: Path, seed: int = 0) -> Any:
    """Return the model after a change of every parameter, as a step of training makes it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def lora_copy(folder: Path, seed: int = 0, **options: Any) -> Any:
    """Return a PEFT model whose adapter is far from zero."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], **options}
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_full_update_serves_the_trainers_numbers(llm: LLM, folder: Path) -> None:
    before = llm.generate(PROMPTS, PARAMS)
    assert before[0].outputs[0].weight_versions == [0] * 16
    model = trained_copy(folder)
    assert largest_gap(llm, model) > 0.01, "the trained copy differs from the checkpoint"
    update = llm.update_weights(model.named_parameters())
    assert update.version == llm.weight_version == 1
    assert update.num_tensors == len(list(model.parameters()))
    assert update.num_bytes == sum(p.nbytes for p in model.parameters())
    assert largest_gap(llm, model) < 2e-5
    assert llm.generate(PROMPTS, PARAMS)[0].outputs[0].weight_versions == [1] * 16


def test_equal_weights_have_equal_digests(llm: LLM, folder: Path) -> None:
    model = trained_copy(folder)
    first = llm.update_weights(dict(model.named_parameters()))
    wrapped = {f"module._orig_mod.{name}": parameter for name, parameter in model.named_parameters()}
    assert llm.update_weights(wrapped).digest == first.digest
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert llm.update_weights(model.named_parameters()).digest != first.digest
    assert llm.weight_version == 3


def test_prefixes_of_old_weights_are_not_reused(llm: LLM, folder: Path) -> None:
    prompt = list(range(100))
    llm.generate(prompt, SamplingParams(max_tokens=1))
    llm.update_weights(trained_copy(folder).named_parameters())
    before = llm.stats()
    llm.generate(prompt, SamplingParams(max_tokens=1))
    assert llm.stats().prefill_tokens - before.prefill_tokens == 100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
        {"target_modules": "all-linear"},
    ],
    ids=["plain", "rslora", "patterns", "all linear layers"],
)
@pytest.mark.parametrize("mode", ["exact", "merged"])
def test_an_adapter_serves_the_peft_models_numbers(llm: LLM, folder: Path, mode: Any, options: dict[str, Any]) -> None:
    model = lora_copy(folder, **options)
    adapter = adapter_of(model)
    update = llm.update_lora(adapter, model.peft_config["default"], mode=mode)
    assert update.num_bytes == sum(tensor.nbytes for tensor in adapter.values())
    assert largest_gap(llm, model) < 5e-5
    again = lora_copy(folder, seed=1, **options)
    llm.update_lora(adapter_of(again).items(), again.peft_config["default"].to_dict(), mode=mode)
    assert largest_gap(llm, again) < 5e-5, "the second adapter must start from the pristine base"


def packed_bytes(llm: LLM) -> dict[str, bytes]:
    runner: Any = llm.engine._runner
    return {name: tensor.numpy().tobytes() for name, tensor in runner.weights.packed.items()}


def test_two_hundred_syncs_later_nothing_has_drifted(llm: LLM, folder: Path) -> None:
    """Each merge starts from the pristine base: the 200th is the first, bit for bit, and so is the trainer's base."""
    model = lora_copy(folder)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    first, config = adapter_of(model), model.peft_config["default"]
    llm.update_lora(first, config, mode="merged")
    after_one, gap = packed_bytes(llm), largest_gap(llm, model)
    for seed in range(1, 199):
        generator = torch.Generator().manual_seed(seed)
        other = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in first.items()}
        llm.update_lora(other, config, mode="merged" if seed % 3 else "exact")
    llm.update_lora(first, config, mode="merged")
    assert llm.weight_version == 200
    assert packed_bytes(llm) == after_one
    assert largest_gap(llm, model) == gap
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in base.items())


def test_versions_in_turn_write_over_memory_that_is_free(llm: LLM, folder: Path) -> None:
    models = [trained_copy(folder, seed) for seed in range(2)]
    runner: Any = llm.engine._runner
    places = []
    for version in range(6):
        model = models[version % 2]
        running = llm.generate(PROMPTS[:1], PARAMS)
        llm.update_weights(model.named_parameters())
        places.append(runner.weights.packed["model.embed_tokens.weight"].data_ptr())
        assert largest_gap(llm, model) < 2e-5
        assert running
    assert places[2:] == places[:4], "two places, in turn"
    assert places[0] != places[1]


def test_an_update_that_is_dropped_half_way_has_not_touched_what_serves(llm: LLM, folder: Path) -> None:
    served, other = trained_copy(folder, 0), trained_copy(folder, 1)
    for model in (other, served):  # from now on the next version has memory to write over
        llm.update_weights(model.named_parameters())
    push = Push.full(dict(other.named_parameters()))
    for begin in range(2):
        llm.engine.begin_update(f"u{begin}", "full")
        for spec, tensor in list(push.tensors())[: 5 + begin]:
            llm.engine.stage(f"u{begin}", spec, 0, bytes_of(tensor))
        llm.engine.abort_update(f"u{begin}")
        push = Push.full(dict(other.named_parameters()))
        assert largest_gap(llm, served) < 2e-5
    llm.update_weights(other.named_parameters())
    assert largest_gap(llm, other) < 2e-5


def test_stats_name_what_serves(llm: LLM, folder: Path) -> None:
    assert llm.stats().weight_digest == ""
    update = llm.update_weights(trained_copy(folder).named_parameters())
    assert llm.stats().weight_digest == update.digest
    assert llm.stats().longest_pause_s == 0.0, "nothing waited"


def test_a_request_that_demands_newer_weights_is_refused(llm: LLM, folder: Path) -> None:
    with pytest.raises(StaleWeights, match=r"version 1 or newer, 0 serves.*Push the weights"):
        llm.generate(PROMPTS, PARAMS, min_version=1)
    assert not llm.engine.has_unfinished()
    llm.update_weights(trained_copy(folder).named_parameters())
    assert llm.generate(PROMPTS[:1], PARAMS, min_version=1)[0].outputs[0].weight_versions[0] == 1


def test_explicit_scaling_wins(llm: LLM, folder: Path) -> None:
    model = lora_copy(folder)
    scaling = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 0.7
            scaling[name] = 0.7
    llm.update_lora(adapter_of(model), model.peft_config["default"], scaling=scaling)
    assert largest_gap(llm, model) < 5e-5


def test_full_weights_replace_an_adapter(llm: LLM, folder: Path) -> None:
    adapted, trained = lora_copy(folder), trained_copy(folder)
    llm.update_lora(adapter_of(adapted), adapted.peft_config["default"])
    llm.update_weights(trained.named_parameters())
    assert largest_gap(llm, trained) < 2e-5


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in trained_copy(folder).named_parameters()}


def _refusals() -> dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]]:
    name = "model.layers.0.mlp.down_proj.weight"
    return {
        "missing": (lambda t: t.pop(name), rf"missing.*{name}"),
        "unknown": (lambda t: t.update({"model.layers.0.mlp.down_prj.weight": t.pop(name)}), "Did you mean"),
        "shape": (lambda t: t.update({name: t[name].T.contiguous()}), r"shape \[192, 64\].*\[64, 192\]"),
        "dtype": (lambda t: t.update({name: t[name].to(torch.int32)}), "dtype int32"),
    }


@pytest.mark.parametrize("case", ["missing", "unknown", "shape", "dtype"])
def test_a_refused_update_leaves_the_old_version_serving(llm: LLM, folder: Path, case: str) -> None:
    before = llm.generate(PROMPTS, PARAMS)
    tensors = _tensors(folder)
    change, words = _refusals()[case]
    change(tensors)
    with pytest.raises(ManifestMismatch, match=words):
        llm.update_weights(tensors)
    assert llm.weight_version == 0
    after = llm.generate(PROMPTS, PARAMS)
    assert [c.token_ids for o in after for c in o.outputs] == [c.token_ids for o in before for c in o.outputs]
    assert llm.update_weights(_tensors(folder)).version == 1, "the next update goes through"


def test_a_failing_iterator_closes_the_update(llm: LLM, folder: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(_tensors(folder).items())[:3]
        raise RuntimeError("the trainer failed")

    with pytest.raises(RuntimeError, match="the trainer failed"):
        llm.update_weights(tensors())
    assert llm.update_weights(_tensors(folder)).version == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_other_kinds_of_adapter_are_named(llm: LLM, options: dict[str, Any], words: str) -> None:
    config = LoraConfig(r=2, target_modules=options.pop("target_modules", ["q_proj"]), **options)
    error: type[RolloutdError] = LoraUnsupported
    with pytest.raises(error, match=words):
        llm.update_lora({}, config)
    assert llm.weight_version == 0


@pytest.mark.parametrize("shape", [(), (4,), (0, 64), (4, 63), (400, 64)])
def test_adapter_matrices_of_wrong_shapes_are_refused_before_memory_is_taken(llm: LLM, shape: tuple[int, ...]) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(ManifestMismatch, match="fit"):
        llm.update_lora({name: torch.zeros(shape)}, {"r": 4}, scaling={"model.layers.0.self_attn.q_proj": 1.0})


def test_an_unknown_mode_is_named(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="mode='fused'"):
        llm.update_lora({}, {"r": 4}, mode="fused")  # type: ignore[arg-type]


def test_versions_rise(llm: LLM, folder: Path) -> None:
    assert llm.update_weights(_tensors(folder), version=7).version == 7
    with pytest.raises(ConfigError, match="version=7 is not above"):
        llm.update_weights(_tensors(folder), version=7)
    assert llm.update_weights(_tensors(folder)).version == 8
