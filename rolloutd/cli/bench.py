"""`rolloutd bench`: what the machine in front of you reaches, beside peers and limits of the same run."""

from __future__ import annotations

import json
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rolloutd.errors import ConfigError
from rolloutd.version import __version__

if TYPE_CHECKING:
    from rolloutd.benchmarks.run import Setup
    from rolloutd.benchmarks.workloads import Workload

EXIT_SLOWER = 1
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"shape": "s", "workloads": "W1,W2,W3,W4", "peers": "rolloutd,generate"},
    "h200": {
        "shape": "qwen2.5-0.5b",
        "batch": "64,256,1024",
        "prompt_len": "128,512,2048,8192",
        "new_tokens": 1024,
        "peers": "rolloutd,generate_batch",
    },
}

_PATH = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Options under a name; flags win over them.")
@click.option("--shape", help="Model of random weights: tiny, s, qwen2.5-0.5b, -1.5b, -7b.  [default: s]")
@click.option("--workloads", help="W1, W2, W3, W4, separated by commas.  [default: W1]")
@click.option("--batch", help="Instead of workloads: sequences at once, separated by commas.")
@click.option("--prompt-len", help="Tokens of a prompt, with --batch; several separated by commas.  [default: 512]")
@click.option("--new-tokens", type=int, help="Tokens of a completion, with --batch.  [default: 128]")
@click.option("--samples", type=int, help="Completions of a prompt, with --batch.  [default: 8]")
@click.option("--lengths", type=click.Choice(["equal", "lognormal"]), help="Of completions, with --batch.")
@click.option(
    "--peers",
    help="rolloutd, daemon, deterministic, generate, generate_batch, vllm; ours first.  [default: rolloutd,generate]",
)
@click.option("--vllm-python", help="Interpreter of an environment that has vllm.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True)
@click.option("--lora", type=click.Choice(["off", "merged", "exact"]), default="off", show_default=True)
@click.option("--repeats", type=click.IntRange(1, 1000), default=3, show_default=True, help="Runs of each peer.")
@click.option("--limits/--no-limits", default=True, help="Measure what the machine can do.  [default: limits]")
@click.option("--breakdown", is_flag=True, help="Show where the time goes.")
@click.option("--output", type=_PATH, help="Write the report, JSON, here too.")
@click.option("--plot", type=_PATH, help="Draw it as PNG; needs matplotlib.")
@click.option("--compare", nargs=2, type=_PATH, help="Compare two reports; exit code 1 where the second is slower.")
@click.option("--tolerance", type=click.FloatRange(0.0, 1.0), default=0.05, show_default=True, help="With --compare.")
@click.option("--weights", is_flag=True, help="Measure weight updates instead, by every transport.")
@click.option("--simulate", is_flag=True, help="Run the scheduler alone, with a runner that computes nothing.")
@click.option("--requests", default="1000,10000,100000", show_default=True, help="With --simulate.")
@click.option("--max-num-seqs", default=256, show_default=True, help="With --simulate: sequences at once.")
@click.option("--completion-len", default=16, show_default=True, help="With --simulate: mean tokens of a completion.")
@click.option("--num-blocks", default=4096, show_default=True, help="With --simulate: KV blocks of 16 tokens.")
def bench(
    preset: str | None,
    compare: tuple[Path, Path] | None,
    tolerance: float,
    weights: bool,
    simulate: bool,
    **options: Any,
) -> None:
    """Measure tokens per second beside peers, each in its own process, interleaved; the last line is JSON.

    Exit code 1 with --compare where ours is slower than the tolerance and the noise of both reports allow.
    """
    if compare is not None:
        _compare(*compare, tolerance)
    elif weights:
        _weights(options)
    elif simulate:
        _simulate(options)
    else:
        _throughput(PRESETS.get(preset or "", {}), options)


def _throughput(preset: dict[str, Any], options: dict[str, Any]) -> None:
    from rolloutd.benchmarks.report import breakdown_lines, plot
    from rolloutd.benchmarks.run import run

    setup = _setup({name: preset.get(name) if value is None else value for name, value in options.items()})
    # As Ctrl-C does it: peers that are stopped would be left behind otherwise, stopped for ever.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = run(setup, lambda text: click.echo(text, err=text.startswith("starting")))
    for text in breakdown_lines(report):
        click.echo(text)
    if options["output"] is not None:
        options["output"].write_text(json.dumps(report) + "\n")
    if options["plot"] is not None:
        plot(report, options["plot"])
    click.echo(json.dumps(report))


def _weights(options: dict[str, Any]) -> None:
    from rolloutd.benchmarks.run import resolved
    from rolloutd.benchmarks.weight_sync import lines, measure

    dtype = "bfloat16" if options["dtype"] == "auto" else options["dtype"]
    device, dtype = resolved(options["device"], dtype)
    report = measure(options["shape"] or "qwen2.5-0.5b", dtype, options["repeats"], device)
    for text in lines(report):
        click.echo(text)
    if options["output"] is not None:
        options["output"].write_text(json.dumps(report) + "\n")
    click.echo(json.dumps(report))


def _setup(options: dict[str, Any]) -> Setup:
    from rolloutd.benchmarks.peers import check_peers
    from rolloutd.benchmarks.run import Setup, resolved
    from rolloutd.benchmarks.shapes import shape_named

    shape, workloads = shape_named(options["shape"] or "s"), _workloads(options)
    peers = tuple((options["peers"] or "rolloutd,generate").split(","))
    check_peers(peers, options["vllm_python"], options["lora"])
    device, dtype = resolved(options["device"], options["dtype"])
    return Setup(
        shape=shape,
        workloads=workloads,
        peers=peers,
        device=device,
        dtype=dtype,
        repeats=options["repeats"],
        lora=options["lora"],
        with_limits=options["limits"],
        with_breakdown=options["breakdown"],
        vllm_python=options["vllm_python"],
    )


def _workloads(options: dict[str, Any]) -> tuple[Workload, ...]:
    from rolloutd.benchmarks.workloads import grid_workload, workload_named

    grid = {name: options[name] for name in ("batch", "prompt_len", "new_tokens", "samples", "lengths")}
    if options["batch"] is None:
        needless = [name for name, value in grid.items() if value is not None]
        if needless:
            raise ConfigError(f"--{needless[0].replace('_', '-')} goes with --batch. Add it, or use --workloads.")
        return tuple(workload_named(name) for name in (options["workloads"] or "W1").split(","))
    if options["workloads"] is not None:
        raise ConfigError("--workloads and --batch are two ways to say what is generated. Drop one.")
    new_tokens = _positive("new-tokens", grid["new_tokens"] or 128)
    samples = _positive("samples", grid["samples"] or 8)
    return tuple(
        grid_workload(batch, prompt_len, new_tokens, samples, grid["lengths"] or "equal")
        for prompt_len in _numbers("prompt-len", grid["prompt_len"] or "512")
        for batch in _numbers("batch", grid["batch"])
    )


def _compare(before: Path, after: Path, tolerance: float) -> None:
    from rolloutd.benchmarks.report import compare, read_report

    changes = compare(read_report(before), read_report(after))
    losses = [change for change in changes if change.is_loss(tolerance)]
    for change in changes:
        beside = "" if change.measure == "tokens_per_s" else f" beside {change.peer}"
        verdict = "SLOWER" if change in losses else "ok"
        click.echo(f"{change.workload:<16} {change.ratio:.3f}{beside}  noise {change.noise:.1%}  {verdict}")
    rows = [vars(change) | {"is_loss": change in losses} for change in changes]
    click.echo(json.dumps({"bench": "compare", "tolerance": tolerance, "changes": rows}))
    if losses:
        raise SystemExit(EXIT_SLOWER)


def _simulate(options: dict[str, Any]) -> None:
    from rolloutd.engine.garbage import relax_collector
    from rolloutd.engine.simulation import Load
    from rolloutd.engine.simulation import simulate as run

    num_blocks = options["num_blocks"]
    load = Load(
        1,
        samples=_positive("samples", options["samples"] or 4),
        mean_prompt_len=_numbers("prompt-len", options["prompt_len"] or "24")[0],
        mean_completion_len=_positive("completion-len", options["completion_len"]),
        max_num_seqs=_positive("max-num-seqs", options["max_num_seqs"]),
        num_blocks=num_blocks,
    )
    longest = -(-10 * (load.mean_prompt_len + load.mean_completion_len) // load.block_size)
    if num_blocks < longest:
        raise ConfigError(f"--num-blocks={num_blocks} cannot hold the longest request. Pass {longest} or more.")
    counts, reports = _numbers("requests", options["requests"]), []
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


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [_positive(name, int(part)) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name}={text!r} is not a list of numbers. Write 64,256.") from None


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"--{name}={value} is below 1.")
    return value
