"""Options of `rolloutd` from the config classes: flags, environment, YAML and defaults, in that order of priority."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rolloutd.config import CheckConfig, EngineConfig, ServerConfig
from rolloutd.errors import ConfigError, did_you_mean

CONFIGS = (EngineConfig, ServerConfig)
"""What environment and YAML may set, and the flags of `serve`."""
Configs = tuple[type[EngineConfig | ServerConfig | CheckConfig], ...]
PREFIX = "ROLLOUTD_"


@dataclass(frozen=True, slots=True)
class Option:
    """One field of a config class as an option."""

    name: str
    kind: type
    """bool, int, float or str."""
    choices: tuple[str, ...]
    default: Any
    help: str


def all_options(configs: Configs = CONFIGS) -> dict[str, Option]:
    """Return every field of the configs, by name."""
    result = {}
    for config in configs:
        hints, texts = get_type_hints(config), _field_docs(config)
        for field in fields(config):
            hint = hints[field.name]
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            kinds = (str,) if choices else tuple(k for k in (get_args(hint) or (hint,)) if k is not NoneType)
            default = None if field.default is MISSING else field.default
            result[field.name] = Option(field.name, kinds[0], choices, default, texts.get(field.name, ""))
    return result


def _field_docs(config: type) -> dict[str, str]:
    """Return the string under each field, which Python itself drops."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef), "the source of a class is a class"
    docs = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


@dataclass(frozen=True, slots=True)
class Resolved:
    """Both configs, and where each value came from."""

    engine: EngineConfig
    server: ServerConfig
    sources: Mapping[str, str]

    def lines(self) -> list[str]:
        """Return `name = value  (source)` for every option."""
        values = {**self.engine.to_dict(), **self.server.to_dict()}
        return [f"{name} = {value!r}  ({self.sources[name]})" for name, value in values.items()]


def resolve(flags: Mapping[str, Any], config_file: Path | None) -> Resolved:
    """Return validated configs from flags (None: not given), environment and YAML; `ConfigError` says what is wrong."""
    options = all_options()
    values: dict[str, Any] = {}
    sources = dict.fromkeys(options, "default")
    layers = (
        ("config file", _from_yaml(config_file, options)),
        ("environment", _from_environment(options)),
        ("command line", {name: value for name, value in flags.items() if value is not None}),
    )
    for source, layer in layers:
        for name, value in layer.items():
            values[name], sources[name] = value, source
    if "model" not in values:
        raise ConfigError("no model given. Pass --model DIR or a hub id, set ROLLOUTD_MODEL, or put model in --config.")
    parts = []
    for config in CONFIGS:
        names = {field.name for field in fields(config)}
        parts.append(config.from_dict({name: value for name, value in values.items() if name in names}))
    engine, server = parts
    assert isinstance(engine, EngineConfig), "the first config is the engine's"
    assert isinstance(server, ServerConfig), "the second config is the server's"
    return Resolved(engine, server, sources)


def _from_environment(options: Mapping[str, Option]) -> dict[str, Any]:
    values = {}
    for variable, text in os.environ.items():
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in options:
            raise ConfigError(f"unknown environment variable {variable}.{did_you_mean(name, options)}")
        values[name] = parse(options[name], text)
    return values


def _from_yaml(path: Path | None, options: Mapping[str, Option]) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"config={str(path)!r} cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config={str(path)!r} is not valid YAML ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config={str(path)!r} must hold `option: value` lines.")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in options:
            raise ConfigError(f"unknown option {key!r} in {path}.{did_you_mean(name, options)}")
        values[name] = value
    return values


def parse(option: Option, text: str) -> Any:
    """Return the value that a flag's or variable's text means; `ConfigError` if it means none."""
    if option.kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{option.name}={text!r} is not a bool. Use true or false.")
    try:
        return option.kind(text)
    except ValueError:
        raise ConfigError(f"{option.name}={text!r} is not a number of type {option.kind.__name__}.") from None
