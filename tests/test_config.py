"""EngineConfig and ServerConfig: every wrong value is refused with its name, and what is right passes unchanged."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from typing import Any

import pytest

from rolloutd import EngineConfig, ServerConfig
from rolloutd import config as config_module
from rolloutd.errors import ConfigError

INTEGERS = ["max_model_len", "block_size", "kv_cache_bytes", "max_num_seqs", "max_num_batched_tokens", "seed"]
BOOLS = ["enable_prefix_caching", "enforce_eager", "deterministic"]
CHOICES = ["device", "dtype", "numerics", "model_impl", "shared_prefix_attention"]


def engine(**values: Any) -> EngineConfig:
    return EngineConfig(**{"model": "somewhere", **values})


def test_defaults_need_only_a_model() -> None:
    config = engine()
    assert config.model == "somewhere"
    assert (config.device, config.dtype, config.block_size, config.seed) == ("auto", "auto", 16, 0)
    assert config.enable_prefix_caching
    assert ServerConfig().listen == "ipc"
    with pytest.raises(TypeError, match="model"):
        EngineConfig()  # type: ignore[call-arg]


def test_it_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine().block_size = 8  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        EngineConfig("somewhere")  # type: ignore[misc]


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_field_is_explained(cls: type[EngineConfig] | type[ServerConfig]) -> None:
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    explained = {
        before.target.id
        for before, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    missing = {field.name for field in dataclasses.fields(cls)} - explained
    assert missing <= {"log_level"}


@pytest.mark.parametrize(
    "config", [engine(max_model_len=64, seed=-1), ServerConfig(listen="tcp://127.0.0.1:0", ready_fd=3)]
)
def test_plain_values_there_and_back(config: EngineConfig | ServerConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config
    assert list(values) == [field.name for field in dataclasses.fields(config)]


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'blok_size'. Did you mean 'block_size'\?"):
        EngineConfig.from_dict({"model": "m", "blok_size": 8})
    with pytest.raises(ConfigError, match="Known: listen, connection_file"):
        ServerConfig.from_dict({"zzzzzz": 1})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["8", 8.0, True, [8], b"8", {}])
def test_an_integer_must_be_one(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* wrong type; expected .*int"):
        engine(**{name: value})


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("value", ["yes", 1, 0, None, 1.0])
def test_a_bool_must_be_one(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* wrong type; expected bool"):
        engine(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["", "AUTO", "nope", 1, None, True])
def test_a_choice_must_be_known(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.* is not known. Use one of auto"):
        engine(**{name: value})


@pytest.mark.parametrize("value", [None, 3, b"m", ["m"], True])
def test_the_model_is_a_string(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"model=.* wrong type; expected str"):
        EngineConfig(model=value)


def test_an_empty_model_names_nothing() -> None:
    with pytest.raises(ConfigError, match="Pass a directory or a hub id"):
        EngineConfig(model="")


def ranges() -> list[tuple[type, str, float, float]]:
    return [(cls, name, low, high) for cls in (EngineConfig, ServerConfig) for name, (low, high) in cls._RANGES.items()]


def make(cls: type, **values: Any) -> Any:
    return engine(**values) if cls is EngineConfig else ServerConfig(**values)


@pytest.mark.parametrize(("cls", "name", "low", "high"), ranges(), ids=lambda value: str(value))
def test_the_ends_of_a_range_are_inside_and_the_next_value_is_not(
    cls: type, name: str, low: float, high: float
) -> None:
    kind = type(getattr(make(cls), name) or low)
    for value in (kind(low), kind(high)):
        assert getattr(make(cls, **{name: value}), name) == value
    step = 1 if kind is int else 0.001
    for value in (low - step, high + step):
        with pytest.raises(ConfigError, match=f"{name}=.* is outside"):
            make(cls, **{name: kind(value)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["lease_s", "stall_s", "grace"])
def test_a_number_must_be_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**{name: value})  # type: ignore[arg-type]


def test_a_number_may_be_an_integer() -> None:
    assert ServerConfig(lease_s=5).lease_s == 5
    assert engine(gpu_memory_utilization=1).gpu_memory_utilization == 1


def test_every_range_belongs_to_a_field() -> None:
    for cls in (EngineConfig, ServerConfig):
        assert set(cls._RANGES) <= {field.name for field in dataclasses.fields(cls)}


def test_no_field_name_is_used_twice() -> None:
    engine_names = {field.name for field in dataclasses.fields(EngineConfig)}
    server_names = {field.name for field in dataclasses.fields(ServerConfig)}
    assert not engine_names & server_names, "each is a flag of one command line"
    assert config_module.__doc__
