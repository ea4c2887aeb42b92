"""Two ranks: one daemon, one error for all, and no rank that hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TIMEOUT_S = 10.0


@pytest.fixture
def environment(root: Path) -> Iterator[dict[str, str]]:
    """The environment of a launched script; its temporary files lie in a short path, as sockets must."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PYTEST_"))}
    with tempfile.TemporaryDirectory(prefix="two-") as folder:
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"  # DeepSpeed looks for ninja there
        yield {**kept, "PYTHONPATH": str(root), "TMPDIR": folder, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def daemons(environment: dict[str, str]) -> list[str]:
    """Return the ids of live processes that were started with this test's temporary folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            started_with = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"TMPDIR={environment['TMPDIR']}".encode() in started_with and b"rolloutd" in command:
            found.append(folder.name)
    return found


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_example(
    launcher: list[str], root: Path, environment: dict[str, str], *options: str
) -> tuple[int, list[tuple[float, str]]]:
    """Return exit code and (seconds, line) of the example."""
    command = [*launcher, str(root / "examples" / "accelerate_two_processes.py"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, cwd=environment["TMPDIR"], text=True, **pipes) as process:  # type: ignore[call-overload]
        lines = [(time.monotonic(), line) for line in process.stdout]
        return process.wait(60), lines


def test_two_ranks_train_with_one_daemon(root: Path, environment: dict[str, str]) -> None:
    code, lines = run_example(ACCELERATE, root, environment, "--steps", "3")
    text = "".join(line for _, line in lines)
    assert code == 0, text[-3000:]
    assert sorted(re.findall(r"rank (\d) done: (\d) syncs, version (\d)", text)) == [("0", "3", "3"), ("1", "3", "3")]
    assert text.count("rollout tokens/s") == 1, "rank 0 alone prints the table"
    logs = list(Path(environment["TMPDIR"]).glob("rolloutd-*.log"))
    assert len(logs) == 1, "one daemon was started"
    assert not daemons(environment), "and it went with the run"
    assert not list(Path(environment["TMPDIR"]).glob("rolloutd-model-*")), "so did its copy of the model"


def test_a_killed_daemon_ends_every_rank_with_the_named_error(root: Path, environment: dict[str, str]) -> None:
    code, lines = run_example(TORCHRUN, root, environment, "--kill-daemon-at-step", "2", "--timeout", str(TIMEOUT_S))
    text = "".join(line for _, line in lines)
    assert code != 0
    killed = [at for at, line in lines if "killing the daemon" in line]
    ended = {match[1]: (at, match[2]) for at, line in lines if (match := re.search(r"rank (\d) ended: (\w+)", line))}
    assert len(killed) == 1, text[-3000:]
    assert set(ended) == {"0", "1"}, text[-3000:]
    assert len({error for _, error in ended.values()}) == 1, "the same error on both"
    assert {error for _, error in ended.values()} <= {"DAEMON_UNREACHABLE", "ENGINE_DIED"}
    took_s = max(at for at, _ in ended.values()) - killed[0]
    assert took_s < TIMEOUT_S + 5.0
    assert not daemons(environment)


def launch(script: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in two ranks."""
    return subprocess.run(
        [*TORCHRUN, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_an_error_of_one_rank_is_raised_on_all(environment: dict[str, str], root: Path, model: Path) -> None:
    result = launch(root / "tests" / "integrations" / "two_ranks.py", environment, str(model), environment["TMPDIR"])
    assert "rank 1 step 1: ENGINE_STALLED: planted\n" in result.stdout, result.stderr[-3000:]
    assert "rank 0 step 1: ENGINE_STALLED: planted (on rank 1)\n" in result.stdout


def test_sharded_models_are_gathered_whole(
    environment: dict[str, str], root: Path, tiny_model: Callable[..., Path]
) -> None:
    folders = [str(tiny_model("qwen2", tie=tie)) for tie in (False, True)]
    result = launch(root / "tests" / "integrations" / "sharded_walk.py", environment, *folders)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = sorted(line for line in result.stdout.splitlines() if " lora=" in line)
    kinds = [f"{kind} lora={lora}" for kind in ("ddp", "fsdp1", "fsdp2", "zero2", "zero3") for lora in (False, True)]
    expected = [f"{kind} [True, True]" for kind in kinds]
    assert lines == sorted(expected * 4), "two models on two ranks, each in every way; full weights served by digest"


@pytest.mark.parametrize("what", ["full", "lora"])
def test_a_policy_that_deepspeed_has_split_trains(
    environment: dict[str, str], root: Path, model: Path, what: str
) -> None:
    del environment["ACCELERATE_USE_CPU"]  # accelerate would leave DeepSpeed out
    script = root / "tests" / "integrations" / "zero3_training.py"
    result = launch(script, environment, str(model), environment["TMPDIR"], what)
    assert result.returncode == 0, result.stderr[-3000:]
    found = re.findall(r"rank (\d) moved=(\w+) serves it=(\w+) gap (\S+)", result.stdout)
    assert sorted(line[:3] for line in found) == [("0", "True", "True"), ("1", "True", "True")]
    assert all(float(line[3]) < 1e-4 for line in found), "of log-probabilities to those of the split policy"
    assert not daemons(environment)


@pytest.mark.parametrize("ending", ["dead", "silent"])
def test_ranks_agree_or_raise_the_same(environment: dict[str, str], root: Path, ending: str) -> None:
    script = str(root / "tests" / "integrations" / "two_talkers.py")
    store = str(Path(environment["TMPDIR"]) / "store")
    processes = [
        subprocess.Popen(
            [sys.executable, script, rank, store, ending], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    first, second = (process.communicate(timeout=60)[0].splitlines() for process in processes)
    assert second == [
        "[0, 1]",
        "MaxModelLen MAX_MODEL_LEN: too long",
        "ValueError odd",
        "LimitError " + ("INTERNAL: " + "x" * 100)[:60],
    ]
    assert first[:3] == [
        "[0, 1]",
        "MaxModelLen MAX_MODEL_LEN: too long (on rank 1)",
        "RuntimeError ValueError: odd (on rank 1)",
    ]
    assert first[-1] == "DEADLINE_EXCEEDED True"
