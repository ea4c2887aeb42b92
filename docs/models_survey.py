"""Tries the fallback on every causal LM that transformers knows: `python docs/models_survey.py` writes the JSON beside.

Each architecture is built with random weights from its default config, shrunk by the tables below, saved, served by
`model_impl="transformers"` in fp32 with chunked prefill, and compared with transformers' plain forward. What such
tables cannot build is recorded as untested. Takes some ten minutes on two cores; run it from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

RESULT = Path(__file__).with_suffix(".json")
LARGEST_DIFFERENCE = 2e-5
TIMEOUT_S = 60

SHRUNK: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "sliding_window": 16,
    "attention_chunk_size": 32,
    "num_kv_shared_layers": 0,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}


EXTRA: dict[str, dict[str, Any]] = {
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "num_key_value_heads": 4},
    "Dots1ForCausalLM": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "FalconForCausalLM": {"num_kv_heads": 4, "alibi": False},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16},
    "MiniMaxM3VLForCausalLM": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "MinistralForCausalLM": {"head_dim": 16},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "ReformerModelWithLMHead": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16)},
}
"""What single architectures need besides."""


def architectures() -> dict[str, str]:
    """Return model_type by architecture, one for each class in transformers' causal-LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: dict[str, str] = {}
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(architecture, model_type)
    return dict(sorted(found.items()))


def shrunk_config(cls: Any, extra: dict[str, Any]) -> Any:
    """Return a small config of a config class; of one with parts (text, vision), each is shrunk."""
    default = cls()
    text = default.get_text_config()
    options = {**_options(text), **extra}
    if text is default:
        return cls(**options)
    parts = {name: value for name, value in vars(default).items() if name in cls.sub_configs and value is not None}
    return cls(**{name: {**_options(part), **(extra if part is text else {})} for name, part in parts.items()})


def _options(default: Any) -> dict[str, Any]:
    settable = [name for name in SHRUNK if not isinstance(getattr(type(default), name, None), property)]
    options = {name: SHRUNK[name] for name in settable if _value(default, name) is not None}
    if getattr(default, "num_key_value_heads", None) == getattr(default, "num_attention_heads", None) is not None:
        options["num_key_value_heads"] = SHRUNK["num_attention_heads"]
    if hasattr(default, "max_window_layers"):
        options["max_window_layers"] = 1
    return options


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configs refuse to name one value for all layers
        return None


def build(architecture: str, folder: Path) -> Any:
    """Save a tiny model of the architecture and return it."""
    import transformers

    from tests.tiny_models import _fill

    cls = getattr(transformers, architecture)
    config = shrunk_config(cls.config_class, EXTRA.get(architecture, {}))
    config.architectures = [architecture]
    model = cls(config).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
        raise ValueError("the shrunk config is still too large")
    _fill(model, seed=0, tied=bool(getattr(config, "tie_word_embeddings", False)))
    model.save_pretrained(folder)
    return cls.from_pretrained(folder, dtype="float32").eval()


def try_one(architecture: str, folder: Path) -> dict[str, Any]:
    """Return the outcome of one architecture."""
    import transformers

    from rolloutd import LLM, SamplingParams
    from rolloutd.errors import ConfigError, ModelUnsupported
    from rolloutd.models.transformers_loading import causal_lm_class
    from tests.conformance.families import largest_difference, prompts_of, reference_logprobs

    try:
        causal_lm_class(architecture, getattr(transformers, architecture).config_class())
        model = build(architecture, folder)
        reference_logprobs(model, [5, 6], [7])
    except ModelUnsupported as error:
        return {"outcome": "refused", "reason": error.message}
    except Exception as error:  # whatever 180 modelling files raise is an outcome here
        return {
            "outcome": "untested",
            "reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}",
        }
    try:
        options = {"max_model_len": 128, "max_num_batched_tokens": 37}
        with LLM(str(folder), model_impl="transformers", **options) as llm:
            outputs = llm.generate(prompts_of(500, count=6), SamplingParams(max_tokens=8, seed=1, ignore_eos=True))
    except ConfigError as error:
        return {"outcome": "refused", "reason": error.message}
    worst = 0.0
    for output in outputs:
        completion = output.outputs[0]
        reference = reference_logprobs(model, output.prompt_token_ids, completion.token_ids)
        worst = max(worst, largest_difference(completion.logprobs, reference))
    outcome = "runs" if worst <= LARGEST_DIFFERENCE else "differs"
    return {"outcome": outcome, "difference": float(f"{worst:.1e}")}


def survey(names: list[str]) -> dict[str, Any]:
    """Return the outcome of each architecture."""
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            signal.alarm(TIMEOUT_S)
            try:
                outcome = try_one(name, Path(scratch) / "model")
            except Exception as error:  # a defect of ours: the page refuses this outcome
                traceback.print_exc()
                outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
            finally:
                signal.alarm(0)
        results[name] = outcome
        print(name, outcome, file=sys.stderr, flush=True)
    return results


def too_long(*_: Any) -> None:
    raise TimeoutError(f"building and comparing it takes more than {TIMEOUT_S} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="architectures to try again; without any, all are tried")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGALRM, too_long)
    import transformers

    before = json.loads(RESULT.read_text(encoding="utf-8"))["architectures"] if options.names else {}
    results = dict(sorted({**before, **survey(options.names or list(architectures()))}.items()))
    content = {"transformers": transformers.__version__, "architectures": results}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
