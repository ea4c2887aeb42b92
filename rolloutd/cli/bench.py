"""`rolloutd bench`: what the machine in front of you reaches."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import click

from rolloutd.errors import ConfigError
from rolloutd.version import __version__

DEFAULT_REQUESTS = "1000,10000,100000"


@click.command()
@click.option("--simulate", is_flag=True, help="Run the scheduler alone, with a runner that computes nothing.")
@click.option(
    "--requests", default=DEFAULT_REQUESTS, show_default=True, help="Numbers of requests, separated by commas."
)
@click.option("--samples", default=4, show_default=True, help="Completions of each request.")
@click.option("--max-num-seqs", default=256, show_default=True, help="Most sequences that run at once.")
@click.option("--prompt-len", default=24, show_default=True, help="Mean tokens of a prompt.")
@click.option("--completion-len", default=16, show_default=True, help="Mean tokens of a completion.")
@click.option("--num-blocks", default=4096, show_default=True, help="KV blocks of 16 tokens.")
def bench(
    simulate: bool,
    requests: str,
    samples: int,
    max_num_seqs: int,
    prompt_len: int,
    completion_len: int,
    num_blocks: int,
) -> None:
    """Measure. With --simulate: what scheduling costs per scheduled token, in CPU time; the last line is JSON."""
    if not simulate:
        raise ConfigError("bench measures the scheduler only in this version. Pass --simulate.")
    from rolloutd.engine.garbage import relax_collector
    from rolloutd.engine.simulation import Load
    from rolloutd.engine.simulation import simulate as run

    load = Load(
        1,
        samples=_positive("samples", samples),
        mean_prompt_len=_positive("prompt-len", prompt_len),
        mean_completion_len=_positive("completion-len", completion_len),
        max_num_seqs=_positive("max-num-seqs", max_num_seqs),
        num_blocks=num_blocks,
    )
    longest = -(-10 * (load.mean_prompt_len + load.mean_completion_len) // load.block_size)
    if num_blocks < longest:
        raise ConfigError(f"--num-blocks={num_blocks} cannot hold the longest request. Pass {longest} or more.")
    counts, reports = _counts(requests), []
    relax_collector()  # as the engine process does
    click.echo(f"{'requests':>10} {'completions':>12} {'tokens':>12} {'steps':>8} {'us/token':>9} {'KV waste':>9}")
    for count in counts:
        report = run(replace(load, num_requests=count))
        reports.append(report.to_dict())
        click.echo(
            f"{report.num_requests:>10,} {report.num_completions:>12,} {report.scheduled_tokens:>12,} "
            f"{report.num_steps:>8,} {report.us_per_scheduled_token:>9.2f} {report.kv_waste:>9.2%}"
        )
    machine = {"python": platform.python_version(), "machine": platform.machine(), "rolloutd": __version__}
    click.echo(json.dumps({"bench": "simulate", **machine, "reports": reports}))


def _counts(requests: str) -> list[int]:
    try:
        return [_positive("requests", int(part)) for part in requests.split(",")]
    except ValueError:
        raise ConfigError(f"--requests={requests!r} is not a list of numbers. Write 1000,10000.") from None


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"--{name}={value} is below 1.")
    return value
