"""GRPO on tiny models with the engine in this process: what TRL gets from the backend, and what the daemon gets."""

from __future__ import annotations

import gc
import importlib.resources
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rolloutd import LLM
from rolloutd.errors import ConfigError, DaemonUnreachable, InfraError, LoraUnsupported, MaxModelLen, ParityMismatch
from rolloutd.integrations.attach import Seams
from rolloutd.integrations.contract import differences, eos_token_ids, trainer_numerics
from rolloutd.integrations.daemon import engine_options
from rolloutd.integrations.options import RolloutOptions
from rolloutd.integrations.trainer_weights import base_model_of
from rolloutd.integrations.trl import GRPOTrainer, RLOOConfig, RLOOTrainer, rollout_report
from rolloutd.serve.spawn import start_daemon
from tests.cpu_as_gpu import FACTORY, cpu_as_gpu
from tests.integrations.in_process import (
    DAEMONS,
    SEAMS,
    InProcessClient,
    InProcessGRPOTrainer,
    config,
    prompts,
    reward,
    start_fake_daemon,
    trainer,
)

DIFFERENCE = "sampling/sampling_logp_difference"


def logged(trained: Any, key: str) -> list[float]:
    return [entry[key] for entry in trained.state.log_history if key in entry]


def base_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}


# --------------------------------------------------------------------- training


def test_grpo_trains_with_the_trainers_log_probabilities(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = trainer(
        model,
        config(
            tmp_path, max_steps=3, per_device_train_batch_size=8, per_device_eval_batch_size=6, num_generations_eval=3
        ),
        eval_dataset=prompts(3),
    )
    before = base_state(trained.model)
    trained.train()
    assert len(logged(trained, f"{DIFFERENCE}/max")) == 3
    assert max(logged(trained, f"{DIFFERENCE}/max")) < 1e-4
    assert all(math.isclose(x, 1.0, abs_tol=1e-3) for x in logged(trained, "sampling/importance_sampling_ratio/mean"))
    assert any(not torch.equal(p, before[n]) for n, p in trained.model.named_parameters()), "the weights moved"
    metrics = trained.rollout_metrics
    assert metrics.num_syncs == metrics.weight_version == 3
    assert metrics.sync_bytes == 3 * sum(p.numel() * 4 for p in trained.model.parameters())
    assert metrics.generated_tokens > 0
    assert metrics.generate_seconds > 0
    assert min(logged(trained, "rollout/tokens_per_second")) > 0
    assert "|logprob gap| max" in capsys.readouterr().out
    assert f"{metrics.generated_tokens:,}" in rollout_report(trained)

    results = trained.evaluate()
    assert results[f"eval_{DIFFERENCE}/max"] < 1e-4
    assert trained.rollout_metrics.num_syncs == 4, "one step passed since the last load"
    trained.evaluate()
    assert trained.rollout_metrics.num_syncs == 4


def test_the_backend_answers_as_trl_asks(model: Path, tmp_path: Path) -> None:
    more_stops = list(range(240, 256))
    built = trainer(model, config(tmp_path, max_completion_length=60, generation_kwargs={"stop_token_ids": more_stops}))
    built.force_sync()
    a, b, c = [10, 11, 12], [20, 21], [10, 11]
    asked = [a, a, b, c, a, b, c]
    ids, completions, logprobs, extra = built.vllm_generation.generate(asked, None, 4, None, unknown=1)
    assert ids == asked
    assert extra is None
    assert len(completions) == len(logprobs) == len(asked)
    calls = built.rollout_client.calls[-1]
    assert calls[0] == [a, b, c], "equal prompts are one request, whatever num_generations says"
    assert [params.n for params in calls[1]] == [3, 2, 2]
    stops = {*eos_token_ids(built), *more_stops}
    for completion, logprob in zip(completions, logprobs, strict=True):
        assert type(completion) is list
        assert {type(token) for token in completion} == {int}
        assert 1 <= len(completion) <= 60
        assert len(completion) == 60 or completion[-1] in stops, "the stop id is the last"
        assert not stops & set(completion[:-1])
        assert all(type(entry) is list and len(entry) == 1 and entry[0] <= 0 for entry in logprob)
        completion.append(0)
        logprob.append([0.0])
    assert any(len(completion) < 61 for completion in completions), "some ended by a stop id"
    same = [tuple(completions[i]) for i in (0, 1, 4)]
    assert len(set(same)) == 3, "samples of a group differ"


def test_calls_and_versions_change_the_seeds(model: Path, tmp_path: Path) -> None:
    built = trainer(model, config(tmp_path))
    for _ in range(2):
        built.force_sync()
        for _ in range(2):
            built.vllm_generation.generate([[1], [2]], None, 1)
    seeds = [params.seed for _, many in built.rollout_client.calls for params in many]
    assert len(seeds) == len(set(seeds)) == 8


def test_images_and_full_contexts_are_named(model: Path, tmp_path: Path) -> None:
    built = trainer(model, config(tmp_path))
    with pytest.raises(NotImplementedError, match="image"):
        built.vllm_generation.generate([[1]], [["an image"]], 1)
    assert built.vllm_generation.generate([[1]], [None], 1)[1]
    with pytest.raises(MaxModelLen, match="256"):
        built.vllm_generation.generate([[1] * 256], None, 1)


def test_an_error_of_the_daemon_ends_training(model: Path, tmp_path: Path) -> None:
    built = trainer(model, config(tmp_path))
    built.rollout_client.error = DaemonUnreachable("gone")
    with pytest.raises(DaemonUnreachable, match="gone"):
        built.train()


def test_deltas_are_for_full_weights_that_are_trained(model: Path, tmp_path: Path) -> None:
    full = trainer(model, config(tmp_path, rollout_server_delta=True))
    full.train()
    assert full.rollout_client.deltas == [True] * 2
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.norm.weight[0] += 1.0
    lora = trainer(
        changed,
        config(tmp_path, rollout_server_delta=True),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    lora.train()
    assert lora.rollout_client.deltas == [False], "the base travels once"


def test_a_base_under_lora_can_exist_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    built = trainer(model, config(tmp_path, rollout_server_share_base=True), peft_config=lora)
    built.train()
    client = built.rollout_client
    assert [kind for kind, _ in client.updates] == ["adopted", "lora", "lora"]
    norm = next(p for name, p in built.model.named_parameters() if name.endswith("model.norm.weight"))
    served = client.llm.engine.parameter("model.norm.weight", torch.float32)
    assert norm.data_ptr() == served.data_ptr()
    assert built.rollout_logprob_gap.max < 1e-4


def test_a_daemon_reads_the_trainers_base(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own, with a CPU in the GPU's place at both ends."""
    cpu_as_gpu(monkeypatch)

    class OnGpu(GRPOTrainer):
        _rollout_seams = Seams(
            start_daemon=lambda engine, server, timeout_s: start_daemon(
                engine, server, timeout_s=timeout_s, factory=FACTORY
            )
        )

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    built = trainer(model, config(tmp_path, rollout_server_share_base=True), OnGpu, peft_config=lora)
    before = {name: p.detach().clone() for name, p in built.model.named_parameters() if ".lora_" not in name}
    places = {name: p.data_ptr() for name, p in built.model.named_parameters() if name in before}
    built.train()
    norm = next(p for name, p in built.model.named_parameters() if name.endswith("model.norm.weight"))
    assert all(torch.equal(p, before[n]) for n, p in built.model.named_parameters() if n in before)
    assert all(p.data_ptr() != places[n] for n, p in built.model.named_parameters() if n in before), "all moved"
    assert built.rollout_logprob_gap.max < 1e-4
    scored = built.rollout_client.score([[5, 6]], [[7, 8]])
    with torch.no_grad():
        norm.mul_(1.5)
    assert built.rollout_client.score([[5, 6]], [[7, 8]]) != scored, "and the daemon reads them there"
    built.rollout_client.close()
    built.rollout_daemon.stop(5.0)


def test_a_base_that_cannot_be_shared_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"the model is on cpu: only a GPU's memory is shared\. Leave it out"):
        trainer(model, config(tmp_path, rollout_server_share_base=True))
    cpu_as_gpu(monkeypatch)
    with pytest.raises(ConfigError, match="rollout_server_share_base=True, and this trainer has no LoRA adapter"):
        trainer(model, config(tmp_path, rollout_server_share_base=True))


def test_a_gap_above_the_limit_ends_training(model: Path, tmp_path: Path) -> None:
    trainer(model, config(tmp_path, rollout_server_max_logprob_gap=1e-3)).train()
    with pytest.raises(ParityMismatch, match="rollout_server_max_logprob_gap is 0"):
        trainer(model, config(tmp_path, rollout_server_max_logprob_gap=0.0)).train()


def test_generation_kwargs_reach_the_daemon_and_stay_in_the_config(model: Path, tmp_path: Path) -> None:
    kwargs = {"min_tokens": 2, "stop_token_ids": [5]}
    built = trainer(model, config(tmp_path, generation_kwargs=dict(kwargs)))
    assert built.args.generation_kwargs == kwargs
    built.train()
    params = built.rollout_client.calls[0][1][0]
    assert params.min_tokens == 2
    assert 5 in params.stop_token_ids


def test_several_generations_per_sync_and_iterations(model: Path, tmp_path: Path) -> None:
    trained = trainer(
        model,
        config(tmp_path, max_steps=4, steps_per_generation=4, num_iterations=2, gradient_accumulation_steps=2),
    )
    trained.train()
    assert trained.rollout_metrics.num_generate_calls == 1, "one generation serves 8 micro-steps, 4 optimizer steps"
    assert len(trained.rollout_client.calls[0][0]) == 4


def test_rloo_trains(model: Path, tmp_path: Path) -> None:
    class InProcessRLOOTrainer(RLOOTrainer):
        _rollout_seams = SEAMS

    options = {name: getattr(config(tmp_path), name) for name in ("output_dir", "max_steps", "report_to")}
    args = RLOOConfig(
        **options,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        use_rollout_server=True,
    )
    trained = InProcessRLOOTrainer(model=str(model), reward_funcs=reward, args=args, train_dataset=prompts())
    trained.train()
    assert trained.rollout_metrics.num_syncs == 2


def test_off_is_trls_own_trainer(model: Path, tmp_path: Path) -> None:
    num_daemons = len(DAEMONS)
    built = trainer(model, config(tmp_path, max_steps=1, use_rollout_server=True), use_rollout_server=False)
    assert built.use_vllm is False
    assert len(DAEMONS) == num_daemons
    built.train()
    with pytest.raises(ConfigError, match="no rollout server"):
        built.rollout_metrics  # noqa: B018


# ------------------------------------------------------------------------ tools


def multiply(a: int, b: int) -> int:
    """Multiplies two integers.

    Args:
        a: first factor
        b: second factor

    Returns:
        the product
    """
    return a * b


def test_tools_run_and_extend_what_was_sampled(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = importlib.resources.files("trl") / "chat_templates/qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'
    call_ids = tokenizer(call)["input_ids"]

    built = trainer(
        model,
        config(tmp_path, max_steps=1, max_completion_length=160, rollout_server_max_model_len=1024),
        processing_class=tokenizer,
        train_dataset=prompts(4).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}),
        reward_funcs=lambda completions, **kwargs: [float(len(str(c)) % 5) for c in completions],
        tools=[multiply],
    )
    client, inner = built.rollout_client, built.rollout_client.generate

    def first_answers_call_the_tool(asked: Any, params: Any, *, min_version: int) -> Any:
        assert min_version == client.llm.weight_version, "it demands what it pushed last"
        outputs = inner(asked, params, min_version=min_version)
        if len(client.calls) == 1:
            for output in outputs:
                output.outputs[0].token_ids[:] = call_ids
                output.outputs[0].logprobs[:] = [-1.0] * len(call_ids)
        return outputs

    client.generate = first_answers_call_the_tool
    built.train()
    assert logged(built, "tools/call_frequency") == [0.25]
    assert logged(built, "tools/failure_frequency") == [0.0]
    first, second = client.calls[0][0][0], client.calls[1][0][0]
    assert second[: len(first) + len(call_ids)] == first + call_ids, "the second turn extends the ids of the first"
    assert built.rollout_metrics.num_generate_calls == 2, "one for the batch, one for all turns of the tool loop"


# ------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("mode", ["exact", "merged"])
def test_lora_sends_the_adapter_alone_and_leaves_the_base(model: Path, tmp_path: Path, mode: str) -> None:
    trained = trainer(
        model,
        config(tmp_path, max_steps=3, learning_rate=1e-2, rollout_server_lora=mode),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    before = base_state(trained.model)
    trained.train()
    trained.force_sync()
    after = base_state(trained.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "not a bit of the base has changed"
    adapter = [p for p in trained.model.parameters() if p.requires_grad]
    metrics = trained.rollout_metrics
    assert metrics.sync_bytes == metrics.num_syncs * sum(p.numel() * p.element_size() for p in adapter)
    assert metrics.base_sync_bytes == 0, "the daemon loaded the same base"
    assert [kind for kind, _ in trained.rollout_client.updates] == ["lora"] * 4
    assert any(p.abs().max() > 0 for n, p in trained.model.named_parameters() if "lora_B" in n)
    assert max(logged(trained, f"{DIFFERENCE}/max")) < 1e-4


def test_a_base_in_four_bits_is_served_as_it_computes(model: Path, tmp_path: Path) -> None:
    """QLoRA: the daemon loads the checkpoint and gets the dequantized base once."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    quantized = AutoModelForCausalLM.from_pretrained(model, quantization_config=four_bits, dtype=torch.float32)
    layer = quantized.model.layers[0].mlp.down_proj
    trained = trainer(
        quantized,
        config(tmp_path, learning_rate=1e-2),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    assert DAEMONS[-1].address == str(model)
    trained.train()
    assert [kind for kind, _ in trained.rollout_client.updates] == ["full", "lora", "lora"]
    served = trained.rollout_client.llm.engine.parameter("model.layers.0.mlp.down_proj.weight", torch.float32)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        expected = layer(x) if not hasattr(layer, "base_layer") else layer.base_layer(x)
        assert (x @ served.T - expected).abs().max() < 0.02, "bitsandbytes rounds on its way on a CPU"
    loaded = AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp.down_proj.weight
    assert not torch.equal(served, loaded)
    assert max(logged(trained, f"{DIFFERENCE}/mean")) < 0.01


def test_a_base_that_the_daemon_does_not_hold_is_sent_once(model: Path, tmp_path: Path) -> None:
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    trained = trainer(
        changed,
        config(tmp_path, learning_rate=1e-2),
        peft_config=LoraConfig(r=2, use_rslora=True, alpha_pattern={"v_proj": 6}, target_modules=["v_proj", "o_proj"]),
    )
    assert DAEMONS[-1].address == str(model)
    trained.train()
    assert [kind for kind, _ in trained.rollout_client.updates] == ["full", "lora", "lora"]
    assert trained.rollout_metrics.base_sync_bytes > 0
    assert max(logged(trained, f"{DIFFERENCE}/max")) < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_adapters_that_cannot_be_served_are_named_before_training(
    model: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    num_daemons = len(DAEMONS)
    with pytest.raises(LoraUnsupported, match=words):
        trainer(model, config(tmp_path), peft_config=LoraConfig(**{"target_modules": ["q_proj"], **options}))
    assert len(DAEMONS) == num_daemons


def test_parameters_trained_beside_the_adapter_are_named(model: Path, tmp_path: Path) -> None:
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    wrapped.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(LoraUnsupported, match=r"model\.norm\.weight"):
        trainer(wrapped, config(tmp_path))


# --------------------------------------------------------------- model, daemon


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_made_in_memory_is_served_from_a_copy(
    tiny_model: Callable[..., Path], tmp_path: Path, tie: bool
) -> None:
    model = tiny_model("qwen2", tie=tie)
    made = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(model).config)
    made.config._name_or_path = ""
    trained = trainer(
        made,
        config(tmp_path, max_steps=1),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    assert "rolloutd-model-" in DAEMONS[-1].address
    assert trained.rollout_client.llm.engine.tokenizer is not None, "the tokenizer was copied too"
    assert not Path(DAEMONS[-1].address).exists(), "once loaded, the copy goes"
    trained.train()
    assert trained.rollout_metrics.base_sync_bytes == 0, "the copy is the base, bit for bit"
    assert max(logged(trained, f"{DIFFERENCE}/max")) < 1e-4


def test_a_changed_config_is_not_served_from_the_folder(model: Path, tmp_path: Path) -> None:
    stretched = AutoModelForCausalLM.from_pretrained(model)
    stretched.config.rms_norm_eps = 1e-3
    stretched.config.use_cache = False
    trainer(stretched, config(tmp_path), processing_class=AutoTokenizer.from_pretrained(model))
    assert "rolloutd-model-" in DAEMONS[-1].address


def test_the_daemon_gets_the_trainers_device_numerics_and_length(model: Path, tmp_path: Path) -> None:
    trainer(model, config(tmp_path, rollout_server_max_model_len=512, rollout_server_numerics="autocast", seed=3))
    assert dict(DAEMONS[-1].engine_options) == {
        "model": str(model),
        "device": "cpu",
        "numerics": "autocast",
        "head_dtype": "auto",
        "max_model_len": 512,
        "seed": 3,
    }
    assert DAEMONS[-1].server_options["die_with_parent"] is True


def test_a_daemon_on_a_gpu_keeps_rows_free_for_the_adapter(model: Path, tmp_path: Path) -> None:
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=3, rank_pattern={"layers.0.self_attn.v_proj": 7})
    built = trainer(model, config(tmp_path), peft_config=adapter)
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision=built.accelerator.mixed_precision)
    on_gpu = SimpleNamespace(accelerator=accelerator, args=built.args, model=built.model)
    assert engine_options(on_gpu, RolloutOptions(max_model_len=64), "m")["max_lora_rank"] == 7
    merged = RolloutOptions(max_model_len=64, lora_mode="merged")
    assert "max_lora_rank" not in engine_options(on_gpu, merged, "m")


def connect_in_bf16(address: str, options: RolloutOptions) -> InProcessClient:
    engine = DAEMONS[-1].engine_options
    return InProcessClient(LLM(address, numerics="bf16", head_dtype=engine["head_dtype"], max_model_len=256))


class Bf16Trainer(InProcessGRPOTrainer):
    """Its daemon computes in bf16, with the head that the adapter asked for."""

    _rollout_seams = Seams(connect=connect_in_bf16, start_daemon=start_fake_daemon)


@pytest.mark.parametrize("peft", [False, True])
def test_a_trainer_that_casts_its_head_gets_a_daemon_that_does(
    peft: bool, tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tied matrix is fp32 in the trainer then: numerics, digests of the base and pushes must see through that.

    With an adapter the head is untied here: TRL 1.16 looks for a tied embedding where PEFT has moved it.
    """
    built = trainer(
        tiny_model("qwen2", tie=not peft),
        config(tmp_path, cast_lm_head_to_fp32=True, model_init_kwargs={"dtype": "bfloat16"}),
        cls=Bf16Trainer,
        **({"peft_config": LoraConfig(target_modules=["q_proj"])} if peft else {}),
    )
    assert DAEMONS[-1].engine_options["head_dtype"] == "float32"
    assert trainer_numerics(built) == "bf16"
    assert "head" not in caplog.text
    assert built.rollout_client.llm.info.head_dtype == "float32"
    built.train()
    assert built.rollout_metrics.base_sync_bytes == 0, "the base is the checkpoint's, bit for bit"
    weights = built.rollout_client.llm.engine._runner.weights
    if not peft:
        trained = base_model_of(built.model).lm_head.weight.detach()
        built.force_sync()
        weights = built.rollout_client.llm.engine._runner.weights
        assert torch.equal(weights.head, trained)
        assert not torch.equal(trained, trained.bfloat16().float()), "it was trained in fp32"
    assert weights.embedding.dtype == torch.bfloat16


def test_a_head_that_differs_is_a_warning(model: Path) -> None:
    with LLM(str(model), numerics="bf16") as llm:
        served = llm.info

    def said(cast: bool, **facts: str) -> str:
        info = replace(served, **facts)
        built = SimpleNamespace(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            args=SimpleNamespace(cast_lm_head_to_fp32=cast),
            accelerator=SimpleNamespace(mixed_precision="no"),
        )
        return "; ".join(differences(built, info, None))

    assert said(False) == said(True, head_dtype="float32") == ""
    assert "the daemon's is bfloat16. Start it with --head-dtype float32" in said(True)
    assert "Set cast_lm_head_to_fp32=True" in said(False, head_dtype="float32")


def test_the_daemon_and_the_client_go_with_the_trainer(model: Path, tmp_path: Path) -> None:
    built = trainer(model, config(tmp_path))
    daemon, client = DAEMONS[-1], built.rollout_client
    assert built.rollout_daemon is daemon
    del built
    gc.collect()
    assert daemon.stopped
    assert client.closed


def test_an_address_starts_nothing(model: Path, tmp_path: Path) -> None:
    num_daemons = len(DAEMONS)
    built = trainer(model, config(tmp_path, rollout_server_address=str(model)))
    built.train()
    assert len(DAEMONS) == num_daemons
    assert built.rollout_daemon is None


def test_options_of_a_daemon_that_runs_elsewhere_are_a_warning(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(model, config(tmp_path, rollout_server_address=str(model), rollout_server_max_model_len=128))
    assert "no effect on the daemon at rollout_server_address" in caplog.text


def test_lora_with_a_real_daemon_until_it_is_killed(model: Path, tmp_path: Path) -> None:
    trained = trainer(
        model,
        config(tmp_path, learning_rate=1e-2, rollout_server_timeout=10.0),
        cls=GRPOTrainer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    )
    trained.train()
    assert trained.rollout_metrics.num_syncs == 2
    assert trained.rollout_metrics.base_sync_bytes == 0
    assert max(logged(trained, f"{DIFFERENCE}/max")) < 1e-4
    assert trained.rollout_client.health().weight_version == 2
    os.kill(trained.rollout_daemon.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(InfraError, match="log"):
        trained.vllm_generation.generate([[1, 2, 3]], None, 1)
    with pytest.raises(InfraError):
        trained.force_sync()
    assert time.monotonic() - started < 25.0
    assert trained.rollout_metrics.num_syncs == 2, "a sync that failed is not counted"


def test_another_model_at_the_address_is_refused(model: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*Qwen2ForCausalLM"):
        trainer(model, config(tmp_path, rollout_server_address=str(tiny_model("llama"))))


def test_differences_that_show_in_the_numbers_are_warnings(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(
        model,
        config(tmp_path, bf16=True),
        peft_config=LoraConfig(target_modules=["q_proj"], lora_dropout=0.1),
    )
    assert "the trainer computes in autocast, the daemon in fp32" in caplog.text
    assert "lora_dropout=0.1" in caplog.text


def test_trls_own_config_is_enough(model: Path, tmp_path: Path) -> None:
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, bf16=False, use_cpu=True
    )
    built = trainer(model, args)
    assert base_model_of(built.model) is built.model
    assert built.use_vllm


@pytest.fixture(autouse=True)
def no_trainer_outlives_its_test() -> Iterator[None]:
    yield
    gc.collect()
