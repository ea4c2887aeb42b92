"""transformers' own modelling code over the paged KV cache against the same code without it, fp32, tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from rolloutd import LLM, SamplingParams
from rolloutd.errors import ConfigError, ManifestMismatch, ModelUnsupported
from rolloutd.models.model import pack
from tests.conformance.fallback_models import FAMILIES, REFUSED, VOCAB, build_fallback
from tests.conformance.families import (
    MAX_LOGPROB_DIFFERENCE,
    largest_difference,
    load,
    prompts_of,
    reference_logprobs,
    wrong_greedy_tokens,
)

Factory = Callable[..., Path]
STEM = prompts_of(VOCAB, count=1, longest=60, seed=5)[0] * 2
PARAMS = SamplingParams(n=2, max_tokens=16, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """`fallback(kind)` returns a model folder, built once."""
    root = tmp_path_factory.mktemp("fallback")

    def factory(kind: str) -> Path:
        options = FAMILIES[kind] if kind in FAMILIES else REFUSED[kind][0]
        out_dir = root / kind
        return out_dir if out_dir.exists() else build_fallback(kind, out_dir, options)

    return factory


def worst_difference(llm: LLM, model: Any, prompts: list[list[int]], params: SamplingParams = PARAMS) -> float:
    """Return max |difference of log p| between fresh rollouts and a plain forward."""
    worst = 0.0
    for output in llm.generate(prompts, params):
        for completion in output.outputs:
            reference = reference_logprobs(model, output.prompt_token_ids, completion.token_ids, params.temperature)
            worst = max(worst, largest_difference(completion.logprobs, reference))
    return worst


@pytest.mark.parametrize("kind", FAMILIES)
def test_greedy_tokens_and_logprobs_equal_transformers(kind: str, fallback: Factory) -> None:
    folder = fallback(kind)
    model = load(folder)
    prompts = prompts_of(VOCAB, count=6)
    with LLM(str(folder)) as llm:
        assert llm.info.max_model_len == 256
        assert llm.info.num_parameters >= sum(parameter.numel() for parameter in model.parameters())
        greedy = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=10))
        worst = worst_difference(llm, model, prompts, SamplingParams(temperature=0.7, max_tokens=10, seed=1))
    for prompt, output in zip(prompts, greedy, strict=True):
        completion = output.outputs[0]
        assert not wrong_greedy_tokens(model, prompt, completion.token_ids, 10)
        reference = reference_logprobs(model, prompt, completion.token_ids)
        worst = max(worst, largest_difference(completion.logprobs, reference))
    assert worst <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("kind", ["gpt2", "cohere2", "deepseek_v3"])
def test_chunks_prefixes_and_preemption_do_not_change_numbers(kind: str, fallback: Factory) -> None:
    folder = fallback(kind)
    model = load(folder)
    prompts = [[*STEM, *prompt] for prompt in prompts_of(VOCAB, count=6, longest=20, seed=6)]
    with LLM(str(folder), max_num_batched_tokens=37) as llm:
        assert worst_difference(llm, model, prompts[:1]) <= MAX_LOGPROB_DIFFERENCE
        assert worst_difference(llm, model, prompts) <= MAX_LOGPROB_DIFFERENCE
        assert llm.stats().cached_tokens > 0
        block_bytes = llm.info.kv_cache_bytes // llm.info.num_blocks
    with LLM(str(folder), kv_cache_bytes=16 * block_bytes) as llm:
        assert worst_difference(llm, model, prompts) <= MAX_LOGPROB_DIFFERENCE
        assert llm.stats().num_preemptions > 0


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_native_families_give_the_same_numbers(kind: str, tiny_model: Factory) -> None:
    folder = tiny_model(kind)
    prompts = prompts_of(512, count=6)
    with LLM(str(folder)) as llm:
        native = llm.generate(prompts, PARAMS)
    with LLM(str(folder), model_impl="transformers") as llm:
        fallback = llm.generate(prompts, PARAMS)
    for ours, theirs in zip(native, fallback, strict=True):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert a.token_ids == b.token_ids
            assert largest_difference(a.logprobs, b.logprobs) <= MAX_LOGPROB_DIFFERENCE


@pytest.mark.parametrize("numerics", ["bf16", "autocast"])
@pytest.mark.parametrize("kind", ["gpt_neox", "granitemoe"])
def test_reduced_precision_follows_the_trainer(kind: str, numerics: str, fallback: Factory) -> None:
    """The mean gap to the trainer's own forward in that mode is far below that between bf16 and fp32."""
    folder = fallback(kind)
    exact = load(folder)
    dtype = torch.bfloat16 if numerics == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    gaps, rounding = [], []
    with LLM(str(folder), numerics=numerics) as llm:
        outputs = llm.generate(prompts_of(VOCAB, count=10), SamplingParams(max_tokens=16, seed=2, ignore_eos=True))
    for output in outputs:
        completion = output.outputs[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=numerics == "autocast"):
            trainer = reference_logprobs(model, output.prompt_token_ids, completion.token_ids)
        reference = reference_logprobs(exact, output.prompt_token_ids, completion.token_ids)
        gaps += [abs(a - b) for a, b in zip(completion.logprobs, trainer, strict=True)]
        rounding += [abs(a - b) for a, b in zip(trainer, reference, strict=True)]
    assert sum(gaps) < 0.6 * sum(rounding)


def test_an_fp32_head_does_not_round_logits(fallback: Factory) -> None:
    """A bf16 head gives logits that are bf16 numbers, an fp32 head does not."""
    folder = fallback("gpt_neox")
    for head_dtype, rounded in (("auto", True), ("float32", False)):
        with LLM(str(folder), numerics="bf16", head_dtype=head_dtype) as llm:
            runner: Any = llm.engine._runner
            hidden_RE = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
            with torch.inference_mode():
                logits_RV = runner._model.logits(runner.weights, hidden_RE)
        assert logits_RV.dtype == (torch.bfloat16 if rounded else torch.float32)
        assert torch.equal(logits_RV.float(), logits_RV.bfloat16().float()) is rounded


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_an_fp32_head_keeps_what_the_trainer_sends_and_the_embedding_rounds_it(kind: str, fallback: Factory) -> None:
    model = changed(load(fallback(kind)))
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    with LLM(str(fallback(kind)), numerics="bf16", head_dtype="float32") as llm:
        llm.update_weights(model.named_parameters())
        weights = llm.engine._runner.weights
        embedding = weights.decoder["wte.weight" if tied else "embed_in.weight"]
        assert torch.equal(weights.head["lm_head.weight"], head)
        assert torch.equal(embedding, model.get_input_embeddings().weight.bfloat16())
        assert {tensor.dtype for tensor in weights.decoder.values()} == {torch.bfloat16}


# ------------------------------------------------------------------ updates


def changed(model: Any) -> Any:
    """Return the model after a change of every parameter, as a step of training makes it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "olmoe", "deepseek_v3"])
def test_an_update_serves_the_trainers_numbers(kind: str, fallback: Factory) -> None:
    folder = fallback(kind)
    model = changed(load(folder))
    prompts = prompts_of(VOCAB, count=4)
    with LLM(str(folder)) as llm:
        assert worst_difference(llm, model, prompts) > 0.01
        llm.update_weights(model.named_parameters())
        assert worst_difference(llm, model, prompts) <= MAX_LOGPROB_DIFFERENCE


def test_a_state_dict_with_tied_names_and_buffers_is_an_update(fallback: Factory) -> None:
    gpt2, deepseek = changed(load(fallback("gpt2"))), load(fallback("deepseek_v3"))
    assert {"lm_head.weight", "transformer.wte.weight"} <= gpt2.state_dict().keys()
    with torch.no_grad():
        buffers = {name: buffer for name, buffer in deepseek.named_buffers() if "correction_bias" in name}
        for buffer in buffers.values():
            buffer.copy_(buffer.flip(0))
    assert buffers
    for model, kind in ((gpt2, "gpt2"), (deepseek, "deepseek_v3")):
        with LLM(str(fallback(kind))) as llm:
            llm.update_weights(model.state_dict().items())
            assert worst_difference(llm, model, prompts_of(VOCAB, count=4)) <= MAX_LOGPROB_DIFFERENCE


def test_of_tied_names_the_first_counts_and_either_is_enough(fallback: Factory) -> None:
    model = load(fallback("gpt2"))
    parameters = dict(model.named_parameters())
    embedding = parameters["transformer.wte.weight"]
    other = {"lm_head.weight": torch.zeros_like(embedding)}
    alone = {("lm_head.weight" if tensor is embedding else name): tensor for name, tensor in parameters.items()}
    with LLM(str(fallback("gpt2"))) as llm:
        served: Any = llm.engine._runner
        for tensors in ({**other, **parameters}, {**parameters, **other}, alone):
            weights = pack(served._model, tensors.items())
            assert torch.equal(weights.head["lm_head.weight"], embedding)
            assert weights.head["lm_head.weight"] is weights.decoder["wte.weight"]
            assert weights.num_bytes == served.weights.num_bytes == 4 * sum(p.numel() for p in model.parameters())
            assert not any(tensor is parameters[name] for name, tensor in weights.tensors.items())


def test_wrong_updates_are_named_and_change_nothing(fallback: Factory) -> None:
    folder = fallback("gpt2")
    model = load(folder)
    good = dict(model.named_parameters())
    bias = "transformer.h.0.attn.c_attn.bias"
    wrong = [
        ({**good, "transformer.h.0.attn.c_atn.bias": good[bias]}, f"no tensor .*Did you mean '{bias}'"),
        ({**good, bias: torch.zeros(3)}, rf"{bias} has shape \[3\], the model's is \[192\]"),
        ({name: tensor for name, tensor in good.items() if name != bias}, f"1 of 28 tensors are missing: {bias}"),
    ]
    with LLM(str(folder)) as llm:
        for tensors, words in wrong:
            with pytest.raises(ManifestMismatch, match=words):
                llm.update_weights(tensors.items())
        assert llm.weight_version == 0
        assert worst_difference(llm, model, prompts_of(VOCAB, count=3)) <= MAX_LOGPROB_DIFFERENCE


LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h"],
}


@pytest.mark.parametrize("mode", ["exact", "merged"])
@pytest.mark.parametrize("kind", LORA_TARGETS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_an_adapter_is_served_as_peft_computes_it(kind: str, mode: str, fallback: Factory) -> None:
    folder = fallback(kind)
    base = load(folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS[kind])
    model = get_peft_model(load(folder), config).eval()
    generator = torch.Generator().manual_seed(0)
    adapter = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    prompts = prompts_of(VOCAB, count=4)
    with LLM(str(folder)) as llm:
        num_parameters = llm.engine._runner.weights.num_parameters
        llm.update_lora(adapter.items(), config.to_dict(), mode=mode)
        assert worst_difference(llm, model, prompts) <= MAX_LOGPROB_DIFFERENCE
        added = sum(parameter.numel() for parameter in adapter.values()) if mode == "exact" else 0
        assert llm.engine._runner.weights.num_parameters == num_parameters + added
        llm.update_weights(base.named_parameters())
        assert worst_difference(llm, base, prompts) <= MAX_LOGPROB_DIFFERENCE


def test_an_adapter_on_the_head_is_refused(fallback: Factory) -> None:
    a, b = torch.ones(2, 64), torch.ones(VOCAB, 2)
    with LLM(str(fallback("gpt_neox"))) as llm, pytest.raises(ManifestMismatch, match="no linear layer 'lm_head'"):
        llm.update_lora(
            {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}.items(),
            LoraConfig(r=2, target_modules=["dense"]).to_dict(),
        )


# ----------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(kind: str, fallback: Factory) -> None:
    folder = fallback(kind)
    architecture = type(load(folder)).__name__
    with pytest.raises(ModelUnsupported, match=f"{architecture} cannot run .*{REFUSED[kind][1]}"):
        LLM(str(folder), max_model_len=128)


def test_determinism_is_not_promised(fallback: Factory) -> None:
    with pytest.raises(ConfigError, match=r"deterministic=True with GPT2LMHeadModel.*native architecture"):
        LLM(str(fallback("gpt2")), deterministic=True)


def test_native_only_refuses_what_is_not_native(fallback: Factory) -> None:
    with pytest.raises(ModelUnsupported, match=r"GPT2LMHeadModel, which is not native.*--model-impl auto"):
        LLM(str(fallback("gpt2")), model_impl="native")


def test_the_context_is_the_models(fallback: Factory) -> None:
    with pytest.raises(ConfigError, match="max_model_len=512 > 256"):
        LLM(str(fallback("gpt2")), max_model_len=512)
    with pytest.raises(ConfigError, match="does not say how many positions"):
        LLM(str(fallback("bloom")))


def test_longrope_ends_where_transformers_would_change_its_frequencies(tiny_model: Factory) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.5] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    }
    folder = tiny_model("phi3", max_len=256, rope_parameters=rope, original_max_position_embeddings=64)
    with LLM(str(folder), model_impl="transformers") as llm:
        assert llm.info.max_model_len == 64
        assert worst_difference(llm, load(folder), prompts_of(512, count=4, longest=47)) <= MAX_LOGPROB_DIFFERENCE


def test_a_leak_between_tokens_outside_attention_is_found(fallback: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP that sees the row before it passes every check of structure; only the numbers tell."""
    from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2MLP

    honest: Callable[..., torch.Tensor] = Starcoder2MLP.forward

    def leaking(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        shifted = torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return honest(self, hidden_states + 0.1 * shifted)

    monkeypatch.setattr(Starcoder2MLP, "forward", leaking)
    with pytest.raises(ModelUnsupported, match="mixes tokens outside of attention"):
        LLM(str(fallback("starcoder2")))
