"""`rolloutd`: serve a model (the default), or look at a daemon that runs. Imports no torch: help is there at once."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rolloutd.config import CheckConfig, EngineConfig
from rolloutd.errors import (
    AddressInUse,
    ConfigError,
    InsecureBind,
    ModelNotFound,
    ModelUnsupported,
    PeerFailed,
    RolloutdError,
)
from rolloutd.version import __version__

from .bench import bench
from .options import Configs, Option, Resolved, all_options, resolve

EXIT_LIMIT, EXIT_CONFIG, EXIT_MODEL, EXIT_ADDRESS, EXIT_SECURITY, EXIT_PEER, EXIT_INTERNAL = 1, 2, 3, 4, 5, 8, 70
_EXIT_CODES: tuple[tuple[type[RolloutdError], int], ...] = (
    (ModelNotFound, EXIT_MODEL),
    (ModelUnsupported, EXIT_MODEL),
    (AddressInUse, EXIT_ADDRESS),
    (InsecureBind, EXIT_SECURITY),
    (ConfigError, EXIT_CONFIG),
    (PeerFailed, EXIT_PEER),
)
_CONTEXT = {"token_normalize_func": lambda token: token.replace("_", "-"), "max_content_width": 110}


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="rolloutd")
def cli() -> None:
    """Rollout generation for RL training.

    `rolloutd --model DIR` serves a model; it is short for `rolloutd serve --model DIR`. Every option of `serve` can
    also be set as an environment variable (ROLLOUTD_MODEL, ...) or in a YAML file (--config).
    """


def _parameters(*configs: Configs) -> list[click.Parameter]:
    """Return the flags of a command, made from the config classes."""
    return [_parameter(option) for option in all_options(*configs).values()]


def _parameter(option: Option) -> click.Parameter:
    flag = f"--{option.name.replace('_', '-')}"
    names = [f"{flag}/--no-{flag.removeprefix('--')}"] if option.kind is bool else [flag]
    kind: Any = click.Choice(option.choices) if option.choices else option.kind
    shown = "" if option.default is None else f"  [default: {option.default}]"
    if option.kind is bool:
        return click.Option([option.name, *names], default=None, help=option.help + shown)
    return click.Option([option.name, *names], type=kind, default=None, help=option.help + shown)


def _serve(config: Path | None, print_config: bool, engine_factory: str | None, **flags: Any) -> None:
    """Serve a model until asked to stop.

    Exit codes: 0 stopped as asked, 2 command line or config, 3 the model cannot be loaded, 4 address taken, 5 refused
    for security, 6 the engine died or hung, 7 requests were cut off after --grace, 70 a defect of rolloutd.
    """
    resolved = resolve(flags, config)
    if print_config:
        click.echo("\n".join(resolved.lines()))
        return
    logging.basicConfig(
        level=resolved.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    if engine_factory is None:
        precheck(resolved.engine)
    raise SystemExit(_run(resolved, engine_factory))


def _run(resolved: Resolved, engine_factory: str | None) -> int:
    from rolloutd.serve.daemon import serve

    def report(line: str) -> None:
        click.echo(line, err=True)

    return serve(resolved.engine, resolved.server, report=report, factory=engine_factory)


def precheck(config: EngineConfig) -> None:
    """Refuse in milliseconds what the engine process, which imports torch first, would refuse after seconds."""
    from rolloutd.models.config import check_architecture
    from rolloutd.weights.locate import local_path

    path = local_path(config.model)
    if path is None:
        return
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelUnsupported(f"config.json is not valid JSON ({error}). Download or save it again.") from None
    check_architecture(content.get("architectures"), config.model, config.model_impl)


_PATH = click.Path(path_type=Path)
serve_command = click.Command(
    "serve",
    callback=_serve,
    help=_serve.__doc__,
    context_settings=_CONTEXT,
    params=[
        *_parameters(),
        click.Option(["--config"], type=_PATH, help="A YAML file of `option: value` lines."),
        click.Option(["--print-config"], is_flag=True, help="Show every value and its source, and end."),
        click.Option(["--engine-factory"], hidden=True),
    ],
)
cli.add_command(serve_command)
cli.add_command(bench)


def _check(config: Path | None, as_json: bool, **flags: Any) -> None:
    """Compare the engine's log-probabilities with a trainer's own forward, and that with itself.

    Loads the model in this process, samples, and computes the same log-probabilities with transformers as TRL would.
    The engine's options come from flags, environment and --config, as for `serve`. Exit codes: 0, 1 where --max-mean is
    exceeded, 2 command line or config, 3 the model cannot be loaded.
    """
    own = {name: flags.pop(name) for name in all_options((CheckConfig,))}
    options = CheckConfig.from_dict({name: value for name, value in own.items() if value is not None})
    engine = resolve(flags, config).engine
    precheck(engine)

    from rolloutd.check import check

    report = check(engine, options)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        click.echo("\n".join(report.lines()))
    if options.max_mean is not None and not report.ours.mean <= options.max_mean:
        click.echo(f"mean |difference| {report.ours.mean:.1e} is above --max-mean {options.max_mean:g}", err=True)
        raise SystemExit(EXIT_LIMIT)


cli.add_command(
    click.Command(
        "check",
        callback=_check,
        help=_check.__doc__,
        context_settings=_CONTEXT,
        params=[
            *_parameters((CheckConfig, EngineConfig)),
            click.Option(["--config"], type=_PATH, help="A YAML file of `option: value` lines."),
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document."),
        ],
    )
)


@cli.command()
@click.argument("address", required=False)
def status(address: str | None) -> None:
    """Show health and load of a running daemon; ADDRESS is an endpoint or a connection file, default the newest."""
    from dataclasses import asdict

    from rolloutd.serve.client import RolloutClient

    with RolloutClient(address) as client:
        health = client.health()
        click.echo(f"state           {health.state}  {health.detail}".rstrip())
        click.echo(f"pid             {health.pid}  (engine {health.engine_pid})")
        click.echo(f"uptime          {health.uptime_s:.1f} s")
        if health.info is None:
            return
        click.echo(f"model           {health.info.model}  {health.info.architecture}  {health.info.numerics}")
        for name, value in asdict(client.stats()).items():
            click.echo(f"{name:<15} {value}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors are one line `error: CODE: message` and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_command = arguments and arguments[0] in {*cli.commands, "--help", "--version"}
    if not is_command and (arguments or "ROLLOUTD_MODEL" in os.environ):
        arguments.insert(0, "serve")
    try:
        cli.main(arguments, prog_name="rolloutd", standalone_mode=True)
    except RolloutdError as error:
        click.echo(f"error: {error}", err=True)
        codes = (code for kind, code in _EXIT_CODES if isinstance(error, kind))
        raise SystemExit(next(codes, EXIT_INTERNAL)) from None


if __name__ == "__main__":
    main()
