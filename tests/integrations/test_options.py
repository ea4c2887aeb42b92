"""Config fields, their precedence and conflicts; sampling options; grouping and seeds. No training."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl

from rolloutd.errors import ConfigError, MaxModelLen
from rolloutd.integrations import contract
from rolloutd.integrations import trl as ours
from rolloutd.integrations.options import RolloutOptions, check_args, is_enabled, warn_about_unused
from rolloutd.integrations.sampling import Sampling, group_prompts, group_seed
from rolloutd.integrations.trl import GRPOConfig, GRPOTrainer, RLOOTrainer
from rolloutd.sampling_params import MAX_N
from tests.integrations.in_process import DAEMONS, InProcessGRPOTrainer, config, trainer


@pytest.mark.parametrize(
    ("keyword", "field", "expected"),
    [
        (None, False, False),
        (None, True, True),
        (True, False, True),
        (False, True, False),
        (True, True, True),
    ],
)
def test_the_keyword_wins_over_the_field(keyword: bool | None, field: bool, expected: bool) -> None:
    assert is_enabled(keyword, GRPOConfig(use_cpu=True, bf16=False, use_rollout_server=field)) is expected


def test_without_any_the_default_is_no() -> None:
    assert is_enabled(None, None) is False
    assert is_enabled(None, trl.GRPOConfig(use_cpu=True, bf16=False)) is False
    assert RolloutOptions.from_args(None) == RolloutOptions()


def test_the_token_is_masked_and_the_fields_are_flags(tmp_path: Path) -> None:
    args = config(tmp_path, rollout_server_token="secret")
    assert args.to_dict()["rollout_server_token"] == "<ROLLOUT_SERVER_TOKEN>"
    assert "secret" not in repr(RolloutOptions.from_args(args))
    flags = ["--output_dir", str(tmp_path), "--use_rollout_server", "--rollout_server_timeout", "7", "--use_cpu"]
    (parsed,) = trl.TrlParser((GRPOConfig,)).parse_args_and_config([*flags, "--bf16", "false"])
    assert parsed.use_rollout_server is True
    assert parsed.rollout_server_timeout == 7.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout_server_timeout": 0}, "rollout_server_timeout=0"),
        ({"rollout_server_numerics": "fp8"}, "rollout_server_numerics='fp8'.*autocast"),
        ({"rollout_server_max_logprob_gap": -1.0}, "rollout_server_max_logprob_gap=-1.0"),
        (
            {"rollout_server_max_logprob_gap": 0.1, "vllm_importance_sampling_correction": False},
            "vllm_importance_sampling_correction=True",
        ),
        ({"rollout_server_lora": "fused"}, "rollout_server_lora='fused'.*merged"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RolloutOptions.from_args(config(tmp_path, **options))


def test_fields_without_the_switch_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_about_unused(config(tmp_path, rollout_server_address="ipc:///nowhere"))
        assert "rollout_server_address without use_rollout_server=True" in caplog.text
    caplog.clear()
    warn_about_unused(config(tmp_path))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_vllm": True}, "use_vllm=True and use_rollout_server=True"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True"),
        ({"loss_type": "vespo"}, "vespo.*token_truncate"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_conflicts_are_raised_before_trl_does_anything(
    tmp_path: Path, model: Path, options: dict[str, Any], words: str
) -> None:
    num_daemons = len(DAEMONS)
    with pytest.raises(ConfigError, match=words):
        trainer(model, config(tmp_path, **options))
    assert len(DAEMONS) == num_daemons


def test_vespo_with_a_token_mode_passes(tmp_path: Path) -> None:
    args = config(tmp_path, loss_type="vespo", vllm_importance_sampling_mode="token_mask")
    check_args(args, "GRPOTrainer")
    assert args.loss_type == "vespo"


# --------------------------------------------------------------------- contract


def test_the_contract_holds_for_the_installed_trl() -> None:
    contract.check_class(GRPOTrainer)
    contract.check_class(RLOOTrainer)
    assert issubclass(GRPOTrainer, trl.GRPOTrainer)
    assert GRPOTrainer._name == trl.GRPOTrainer._name


def test_a_moved_seam_is_one_error_that_names_it(tmp_path: Path, model: Path) -> None:
    class Moved(InProcessGRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *rest: Any) -> Any:
            return self.vllm_generation.run(prompt_ids)

    with pytest.raises(ConfigError, match=rf"trl {trl.__version__}.*does not mention vllm_generation\.generate"):
        trainer(model, config(tmp_path), cls=Moved)


def test_a_new_parameter_of_generate_is_seen() -> None:
    def generate(self: Any, prompts: Any, images: Any, num_generations: int, stream: bool) -> None: ...

    with pytest.raises(ConfigError, match="new parameter stream"):
        contract.check_class(GRPOTrainer, generate)
    with pytest.raises(ConfigError, match="SimpleNamespace has no attribute accelerator"):
        contract.check_instance(SimpleNamespace())


def test_eos_ids_of_old_versions_are_the_tokenizers_alone() -> None:
    old = SimpleNamespace(processing_class=SimpleNamespace(eos_token_id=7))
    assert contract.eos_token_ids(old) == [7]
    assert contract.eos_token_ids(SimpleNamespace(eos_token_ids=[7, 9])) == [7, 9]


def test_install_replaces_the_names_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.grpo_config
    import trl.trainer.grpo_trainer

    for module in (trl, trl.trainer, trl.trainer.grpo_config):
        monkeypatch.setattr(module, "GRPOConfig", trl.GRPOConfig)
    for module in (trl, trl.trainer, trl.trainer.grpo_trainer):
        monkeypatch.setattr(module, "GRPOTrainer", trl.GRPOTrainer)
    ours.install()
    ours.install()
    assert trl.GRPOTrainer is GRPOTrainer
    assert trl.trainer.grpo_config.GRPOConfig is GRPOConfig


# --------------------------------------------------------------------- sampling


def fake_trainer(**options: Any) -> Any:
    generation_kwargs = options.pop("generation_kwargs", None)
    defaults: dict[str, Any] = {
        "max_completion_length": 32,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "args": SimpleNamespace(generation_kwargs=generation_kwargs, seed=5),
        "accelerator": SimpleNamespace(is_main_process=True),
    }
    return SimpleNamespace(**{**defaults, **options})


def test_trainer_options_and_generation_kwargs_become_sampling_params(caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"top_p": 0.8, "presence_penalty": 0.5, "max_tokens": 16, "stop_token_ids": [3], "logprobs": 1}
    with caplog.at_level(logging.WARNING):
        sampling = Sampling.of(fake_trainer(top_k=-1, generation_kwargs=kwargs), [7, 9])
    params = sampling.params(n=3, seed=11, prompt_len=10, max_model_len=100)
    assert (params.n, params.seed, params.max_tokens) == (3, 11, 16)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.9, 0.8, 0, 0.0)
    assert params.presence_penalty == 0.5
    assert params.stop_token_ids == (7, 9, 3)
    assert params.ignore_eos, "the trainer's stop ids decide, not the checkpoint's"
    assert "penalties change the sampler only" in caplog.text


def test_token_options_pass_through_also_as_a_command_line_writes_them(caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {
        "logit_bias": {"5": -2},  # from JSON
        "allowed_token_ids": [5, 6, 7],
        "bad_token_ids": [6],
        "bad_words": ["a"],
        "stop": ["x"],
        "include_stop_str_in_output": True,
    }
    with caplog.at_level(logging.WARNING):
        sampling = Sampling.of(fake_trainer(generation_kwargs=kwargs), [7])
    params = sampling.params(n=3, seed=11, prompt_len=10, max_model_len=100)
    assert params.logit_bias == {5: -2.0}
    assert (params.allowed_token_ids, params.bad_token_ids, params.bad_words) == ((5, 6, 7), (6,), ("a",))
    assert params.include_stop_str_in_output
    assert "bad_words change the sampler only" in caplog.text


def test_max_tokens_is_clamped_to_the_room_left() -> None:
    sampling = Sampling.of(fake_trainer(), [7])
    assert sampling.params(n=1, seed=0, prompt_len=90, max_model_len=100).max_tokens == 10
    with pytest.raises(MaxModelLen, match=r"100 tokens.*context of 100.*rollout_server_max_model_len"):
        sampling.params(n=1, seed=0, prompt_len=100, max_model_len=100)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"n": 4}, r"\['n'\].*num_generations"),
        ({"seed": 1}, r"\['seed'\].*clones"),
        ({"max_new_tokens": 4}, "max_completion_length"),
        ({"best": {}}, "'best'.*not supported"),
        ({"logits_processors": [print]}, r"\['logits_processors'\].*do not travel"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias of token='x'"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"topp": 0.5}, "Did you mean 'top_p'"),
        ({"temperature": 0.5}, "0.5 differs from temperature=0.9"),
        ({"max_tokens": 64}, "max_tokens=64 > max_completion_length=32"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_generation_kwargs_that_cannot_be_served_are_refused_by_name(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling.of(fake_trainer(generation_kwargs=kwargs), [7])


# ------------------------------------------------------------- groups and seeds


def test_groups_are_found_by_content_wherever_they_stand() -> None:
    a, b, c = [1, 2], [3], [1, 2, 3]
    groups = group_prompts([a, b, a, c, b, a])
    assert [(group.prompt, group.positions) for group in groups] == [
        ((1, 2), (0, 2, 5)),
        ((3,), (1, 4)),
        ((1, 2, 3), (3,)),
    ]


def test_every_position_is_answered_once_under_random_ragged_calls() -> None:
    rng = random.Random(0)
    for _ in range(300):
        prompts = [[rng.randrange(3)] * rng.randrange(1, 3) for _ in range(rng.randrange(0, 20))]
        groups = group_prompts(prompts)
        assert sorted(at for group in groups for at in group.positions) == list(range(len(prompts)))
        assert all(tuple(prompts[at]) == group.prompt for group in groups for at in group.positions)
        assert len({group.prompt for group in groups}) == len(groups)


def test_more_samples_than_one_request_takes_are_split() -> None:
    assert [len(group.positions) for group in group_prompts([[1]] * (MAX_N + 2))] == [MAX_N, 2]


def test_seeds_differ_in_every_argument() -> None:
    ranges = {"run_seed": 3, "weight_version": 4, "call": 5, "rank": 3, "index": 6}
    keys = [{}]
    for name, count in ranges.items():
        keys = [{**key, name: value} for key in keys for value in range(count)]
    seeds = {group_seed(**key) for key in keys}
    assert len(seeds) == len(keys)
    assert len({seed % (1 << 32) for seed in seeds}) == len(keys), "generators that read 32 bits see them differ too"
