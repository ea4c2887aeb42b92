"""Several adapters in one engine: each request is computed by the weights that it asked for, and labelled with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rolloutd import LLM, ParityProbe, SamplingParams
from rolloutd.engine.sequence import Request
from rolloutd.errors import ConfigError, ManifestMismatch, OutOfMemory, RequestError, StaleWeights
from rolloutd.outputs import FinishedCompletion
from tests.engine.forward_gap import largest_gap

Factory = Callable[..., Path]
PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
PARAMS = SamplingParams(n=2, max_tokens=6, seed=3, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(params=["auto", "transformers"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), model_impl=request.param) as llm:
        yield llm


@pytest.fixture
def folder(tiny_model: Factory) -> Path:
    return tiny_model("qwen2", tie=True)


def peft_model(folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()


def push(llm: LLM, model: Any, **options: Any) -> Any:
    return llm.update_lora(get_peft_model_state_dict(model), model.peft_config["default"], **options)


def tokens(llm: LLM, adapter: str | None = None) -> list[list[int]]:
    return [c.token_ids for output in llm.generate(PROMPTS, PARAMS, adapter=adapter) for c in output.outputs]


def gap(llm: LLM, model: Any, adapter: str | None) -> float:
    """Return the largest |log p difference| of what an adapter samples to a plain forward of `model`."""
    return largest_gap(llm, model, PROMPTS, PARAMS, adapter)


@pytest.mark.parametrize("mode", ["exact", "merged"])
def test_policy_reference_and_two_more_in_one_engine(llm: LLM, folder: Path, mode: Any) -> None:
    policy, first, second = (peft_model(folder, seed) for seed in range(3))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    push(llm, policy)
    assert push(llm, first, adapter="first", mode=mode).version == 1
    assert push(llm, second, adapter="second", mode=mode).version == 1
    assert llm.weight_version == 1
    for _ in range(2):
        for model, adapter in ((policy, None), (base, "base"), (first, "first"), (second, "second"), (policy, None)):
            assert gap(llm, model, adapter) <= 5e-5
    assert llm.stats().num_adapters == 2


def test_scores_of_the_reference(llm: LLM, folder: Path) -> None:
    completions = [[1, 2, 3], [4, 5]]
    before = llm.score(PROMPTS, completions)
    push(llm, peft_model(folder, 0))
    assert llm.score(PROMPTS, completions, adapter="base") == before
    assert llm.score(PROMPTS, completions) != before


def test_versions_of_their_own(llm: LLM, folder: Path) -> None:
    push(llm, peft_model(folder, 0), version=10)
    push(llm, peft_model(folder, 1), adapter="judge")
    assert push(llm, peft_model(folder, 2), adapter="judge").version == 2
    assert push(llm, peft_model(folder, 2), adapter="judge", version=7).version == 7
    assert llm.weight_version == 10

    def labels(adapter: str | None, **options: Any) -> set[int]:
        outputs = llm.generate(PROMPTS, PARAMS, adapter=adapter, **options)
        return {version for output in outputs for c in output.outputs for version in c.weight_versions}

    assert labels(None, min_version=10) == {10}
    assert labels("judge", min_version=7) == {7}
    assert labels("base") == {0}
    with pytest.raises(StaleWeights):
        labels("judge", min_version=8)
    with pytest.raises(ConfigError, match="version=7 of adapter 'judge' is not above"):
        push(llm, peft_model(folder, 2), adapter="judge", version=7)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm.update_weights(base.named_parameters())
    assert labels("base") == labels(None) == {11}
    assert labels("judge") == {8}, "on another base it is another model"


def test_an_adapter_follows_the_base(llm: LLM, folder: Path) -> None:
    judge = peft_model(folder, 1)
    push(llm, judge, adapter="judge")
    assert gap(llm, judge, "judge") <= 5e-5
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if "lora_" not in name:
                parameter.mul_(1.1)
    llm.update_weights([(name, p) for name, p in judge.named_parameters() if "lora_" not in name])
    assert gap(llm, judge, "judge") <= 5e-5
    assert gap(llm, judge.get_base_model(), None) > 1e-3, "peft's base carries its adapter: the policy has none"


def test_an_unknown_or_a_used_adapter_is_named(llm: LLM, folder: Path) -> None:
    push(llm, peft_model(folder, 1), adapter="judge")
    with pytest.raises(RequestError, match=r"no adapter 'juge'. Did you mean 'judge'\?"):
        tokens(llm, "juge")
    with pytest.raises(RequestError, match="no adapter 'juge'"):
        llm.remove_adapter("juge")
    with pytest.raises(RequestError, match="cannot name an adapter"):
        push(llm, peft_model(folder, 1), adapter="base")
    with pytest.raises(RequestError, match="cannot name an adapter"):
        push(llm, peft_model(folder, 1), adapter="")
    engine = llm.engine
    engine.add_request(Request("r", (1, 2), PARAMS, adapter="judge"))
    with pytest.raises(RequestError, match="'judge' is in use"):
        engine.remove_adapter("judge")
    engine.step()
    with pytest.raises(RequestError, match="'judge' is in use"):
        engine.remove_adapter("judge")
    engine.abort("r")
    llm.remove_adapter("judge")
    with pytest.raises(RequestError, match="no adapter 'judge'"):
        tokens(llm, "judge")
    assert llm.stats().num_adapters == 0


def test_a_wrong_adapter_leaves_the_one_before(llm: LLM, folder: Path) -> None:
    judge = peft_model(folder, 1)
    push(llm, judge, adapter="judge")
    tensors = get_peft_model_state_dict(judge)
    tensors.pop(next(iter(tensors)))
    with pytest.raises(ManifestMismatch):
        llm.update_lora(tensors, judge.peft_config["default"], adapter="judge")
    assert gap(llm, judge, "judge") <= 5e-5
    assert push(llm, judge, adapter="judge").version == 2, "the update that failed is closed"


def test_a_probe_of_a_kept_adapter(llm: LLM, folder: Path) -> None:
    judge = peft_model(folder, 1)
    outputs = llm.generate(PROMPTS, PARAMS)
    push(llm, judge, adapter="other")
    completions = [output.outputs[0].token_ids for output in outputs]
    probe = ParityProbe(PROMPTS, completions, llm.score(PROMPTS, completions, adapter="other"), max_mean=1e-5)
    assert push(llm, judge, adapter="judge", probe=probe).parity == 0.0


def run(llm: LLM) -> dict[str, list[FinishedCompletion]]:
    found: dict[str, list[FinishedCompletion]] = {}
    while llm.engine.has_unfinished():
        for done in llm.engine.step():
            found.setdefault(done.request_id, []).append(done)
        llm.engine.check_invariants()
    return found


def test_mixed_traffic_is_what_each_would_be_alone(folder: Path) -> None:
    """Requests of all lanes at once, some aborted: tokens and labels are those of a run of its own."""
    rng = random.Random(0)
    with LLM(str(folder), deterministic=True) as llm:
        push(llm, peft_model(folder, 0))
        for seed, name in enumerate(("a", "b"), start=1):
            push(llm, peft_model(folder, seed), adapter=name, version=10 * seed)
        lanes: dict[str | None, int] = {None: 1, "base": 0, "a": 10, "b": 20}
        alone = {lane: llm.generate([[3, 1, 4]], GREEDY, adapter=lane)[0].outputs[0].token_ids for lane in lanes}
        assert len(set(map(tuple, alone.values()))) == 4, "the lanes differ"
        wanted = {f"r{i}": rng.choice(list(lanes)) for i in range(60)}
        aborted = set(rng.sample(sorted(wanted), 10))
        found: dict[str, list[FinishedCompletion]] = {}
        for request_id, lane in wanted.items():
            llm.engine.add_request(Request(request_id, (3, 1, 4), GREEDY, adapter=lane))
            for _ in range(rng.randrange(3)):
                for done in llm.engine.step():
                    found.setdefault(done.request_id, []).append(done)
            if request_id in aborted:
                for done in llm.engine.abort(request_id):
                    found.setdefault(done.request_id, []).append(done)
        found |= run(llm)
        assert found.keys() == wanted.keys()
        for request_id, (done,) in found.items():
            lane, completion = wanted[request_id], done.completion
            if completion.finish_reason == "abort":
                assert request_id in aborted
            else:
                assert completion.token_ids == alone[lane]
            assert set(completion.weight_versions) <= {lanes[lane]}


def test_a_full_update_while_another_lane_runs(folder: Path) -> None:
    """What runs goes on under the new base; the policy, which waits, gets the new weights."""
    judge = peft_model(folder, 1)
    with LLM(str(folder)) as llm:
        push(llm, judge, adapter="judge")
        params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
        for request_id, lane in (("policy", None), ("judge", "judge"), ("base", "base")):
            llm.engine.add_request(Request(request_id, (1, 2, 3), params, adapter=lane))
        found: dict[str, list[FinishedCompletion]] = {}
        assert llm.engine.version_of("judge") == 1
        while llm.engine._lanes.current != "judge":
            for done in llm.engine.step():
                found.setdefault(done.request_id, []).append(done)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.mul_(0.9)
        assert llm.update_weights(base.named_parameters()).version == 1
        found |= run(llm)
        assert set(found["policy"][0].completion.weight_versions) == {0}
        assert set(found["judge"][0].completion.weight_versions) == {1, 2}, "it had begun"
        assert set(found["base"][0].completion.weight_versions) == {1}
        assert gap(llm, base.eval(), None) <= 5e-5
        assert gap(llm, base, "base") <= 5e-5


def test_a_lane_that_finds_no_memory_fails_its_requests_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(folder)) as llm:
        push(llm, peft_model(folder, 1), adapter="judge")
        engine = llm.engine
        for request_id, lane in (("policy", None), ("judge", "judge"), ("late", None)):
            engine.add_request(Request(request_id, (1, 2), PARAMS, adapter=lane))
        whole = engine._weights_of

        def weights_of(lane: str | None) -> Any:
            if lane == "judge":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return whole(lane)

        monkeypatch.setattr(engine, "_weights_of", weights_of)
        found = run(llm)
        assert found.keys() == {"policy", "late"}
        (error,) = [engine.take_failures().pop("judge")]
        assert isinstance(error, OutOfMemory)
        monkeypatch.undo()
        assert tokens(llm, "judge")


def test_samples_of_a_request_that_waits(folder: Path) -> None:
    with LLM(str(folder)) as llm:
        llm.engine.add_request(Request("r", (1, 2), PARAMS, adapter="base"))
        assert llm.stats().num_waiting == 2
        with pytest.raises(RequestError, match="waits for its adapter"):
            llm.engine.abort("r", [0])
        assert len(llm.engine.abort("r")) == 2
        assert not llm.engine.has_unfinished()
        assert not llm.engine.abort("r")
