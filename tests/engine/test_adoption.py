"""A trainer's parameters as views of the engine's memory: one copy, no bytes moved, and no token from a mix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rolloutd import LLM, SamplingParams
from rolloutd.errors import ConfigError, StaleWeights
from rolloutd.weights.names import canonical_name
from rolloutd.weights.tensors import digest_of, digest_on_device, flat_bytes, spec_of

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
PARAMS = SamplingParams(n=2, max_tokens=6, seed=3, ignore_eos=True)


@pytest.fixture(params=["qwen2", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(request.param, tie=request.param == "qwen2")


@pytest.fixture(params=["auto", "transformers"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), model_impl=request.param) as llm:
        yield llm


def trainer_of(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def train(model: Any, optimizer: Any, seed: int) -> float:
    """Do a step that changes every parameter; return the loss."""
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def tokens(llm: LLM) -> list[Any]:
    return [(c.token_ids, c.logprobs) for output in llm.generate(PROMPTS, PARAMS) for c in output.outputs]


def lies_in(llm: LLM, model: Any) -> bool:
    places = ((p, llm.engine.parameter(canonical_name(n), p.dtype)) for n, p in model.named_parameters())
    return all(place is not None and p.data_ptr() == place.data_ptr() for p, place in places)


def test_training_and_generation_share_one_copy(llm: LLM, folder: Path) -> None:
    model, twin = trainer_of(folder), trainer_of(folder)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    with LLM(str(folder), model_impl=llm.config.model_impl) as plain:
        assert llm.adopt(model).digest == plain.update_weights(twin.named_parameters()).digest
        addresses = [p.data_ptr() for p in model.parameters()]
        assert lies_in(llm, model)
        for step in range(3):
            assert train(model, optimizers[0], step) == train(twin, optimizers[1], step)
            update = llm.update_weights(model.named_parameters())
            assert update.digest == plain.update_weights(twin.named_parameters()).digest
            assert (update.version, update.num_bytes) == (step + 2, 0)
            assert tokens(llm) == tokens(plain)
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert lies_in(llm, model)
        llm.release()
        assert not lies_in(llm, model)
        before = tokens(llm)
        train(model, optimizers[0], 9)
        assert tokens(llm) == before
        train(twin, optimizers[1], 9)
        assert llm.update_weights(model.named_parameters()).num_bytes > 0
        plain.update_weights(twin.named_parameters())
        assert tokens(llm) == tokens(plain)


def test_a_step_without_a_sync_is_named(llm: LLM, folder: Path) -> None:
    model = trainer_of(folder)
    llm.adopt(model)
    tokens(llm)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    with pytest.raises(StaleWeights, match="was changed since version 1 began to serve"):
        tokens(llm)
    with pytest.raises(StaleWeights):
        llm.score(PROMPTS, [[1], [2]])
    llm.update_weights(model.named_parameters(), version=7)
    assert llm.generate(PROMPTS, PARAMS)[0].outputs[0].weight_versions == [7] * 6


def test_other_parameters_are_refused(llm: LLM, folder: Path) -> None:
    model = trainer_of(folder)
    llm.adopt(model)
    before = tokens(llm)
    with pytest.raises(ConfigError, match="is not the parameter that was adopted"):
        llm.update_weights(trainer_of(folder).named_parameters())
    with pytest.raises(ConfigError, match="adopted parameters did not come"):
        llm.update_weights(list(model.named_parameters())[:-1])
    with pytest.raises(ConfigError, match="a module is adopted already"):
        llm.adopt(model)
    with pytest.raises(ConfigError, match="version=1 is not above"):
        llm.update_weights(model.named_parameters(), version=1)
    model.to(torch.float64).to(torch.float32)
    with pytest.raises(ConfigError, match="was moved since"):
        llm.update_weights(model.named_parameters())
    llm.release()
    llm.adopt(model)
    assert tokens(llm) == before


def test_what_does_not_fit_is_named_and_left_alone(folder: Path) -> None:
    with LLM(str(folder), model_impl="native") as llm:
        model = trainer_of(folder, dtype=torch.bfloat16)
        addresses = [p.data_ptr() for p in model.parameters()]
        with pytest.raises(ConfigError, match=r"torch\.bfloat16.*does not lie in the engine as the trainer holds it"):
            llm.adopt(model)
        assert [p.data_ptr() for p in model.parameters()] == addresses
        llm.update_weights(trainer_of(folder).named_parameters())


def test_adapters_on_an_adopted_base(llm: LLM, folder: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(trainer_of(folder), config)
    llm.adopt(model)
    llm.update_lora(get_peft_model_state_dict(model), config)
    with LLM(str(folder), model_impl=llm.config.model_impl) as plain:
        plain.update_lora(get_peft_model_state_dict(model), config)
        assert tokens(llm) == tokens(plain)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        train(model, optimizer, 0)
        for one in (llm, plain):
            one.update_lora(get_peft_model_state_dict(model), config)
        assert tokens(llm) == tokens(plain)
    assert all(
        p.data_ptr() == llm.engine.parameter(canonical_name(n), p.dtype).data_ptr()  # type: ignore[union-attr]
        for n, p in model.named_parameters()
        if "lora_" not in n
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (2048,), (2049,), (3, 5, 7), (1 << 12, 513), (0, 4)])
def test_a_device_computes_the_same_digest(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    spec = spec_of("w", tensor)
    assert digest_on_device(spec, flat_bytes(tensor))() == digest_of(spec, tensor)
