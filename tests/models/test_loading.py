"""What can be loaded, and what is refused with a name: hub ids, broken checkpoints, unknown options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rolloutd import LLM, SamplingParams
from rolloutd.errors import ManifestMismatch, ModelNotFound, ModelUnsupported, RequestError

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
Factory = Callable[..., Path]


@pytest.fixture
def copy(tiny_model: Factory, tmp_path: Path) -> Path:
    """A model folder that a test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def test_a_hub_id_resolves_through_the_cache(tiny_model: Factory, tmp_path: Path) -> None:
    """In a process of its own, since the hub's library reads its environment once."""
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(tiny_model("qwen2"), repository / "snapshots" / revision)
    script = (
        "from rolloutd import LLM, SamplingParams\n"
        "with LLM('org/tiny') as llm:\n"
        "    print(len(llm.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="model-00002-of-00002"):
        LLM(str(copy))


def test_a_shard_outside_the_folder_is_not_followed(copy: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match=r"lacks elsewhere\.safetensors"):
        LLM(str(copy))


def test_broken_files_are_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelUnsupported, match=r"model\.safetensors cannot be read"):
        LLM(str(copy))
    weights.unlink()
    with pytest.raises(ModelNotFound, match="save_pretrained"):
        LLM(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelUnsupported, match="not valid JSON"):
        LLM(str(copy))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": LONGROPE}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "refused by transformers"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None}, "names no architecture"),
    ],
)
def test_options_that_would_change_the_numbers_are_refused(copy: Path, changes: dict[str, Any], words: str) -> None:
    edit(copy / "config.json", **changes)
    with pytest.raises(ModelUnsupported, match=words):
        LLM(str(copy))


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    edit(copy / "config.json", intermediate_size=100)
    with pytest.raises(ManifestMismatch, match="mlp"):
        LLM(str(copy))


def test_without_a_tokenizer_token_ids_still_work(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    with LLM(str(copy)) as llm:
        assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].outputs[0].text == ""
        with pytest.raises(RequestError, match="--tokenizer"):
            llm.generate("text")
        with pytest.raises(RequestError, match="stop_token_ids"):
            llm.generate([1], SamplingParams(stop="x"))


def test_float16_and_a_contradiction(tiny_model: Factory) -> None:
    with LLM(str(tiny_model("llama")), dtype="float16") as llm:
        assert llm.info.numerics == "fp16"
        assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids
