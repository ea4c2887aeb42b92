"""`rolloutd bench`: what it counts, how it compares, and one small run from end to end."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rolloutd.benchmarks.peers import Peer, tree_of
from rolloutd.benchmarks.report import compare, read_report
from rolloutd.benchmarks.run import Setup, floor_seconds
from rolloutd.benchmarks.shapes import SHAPES, ModelShape, write_checkpoint
from rolloutd.benchmarks.workloads import WORKLOADS, grid_workload, lognormal_lengths
from rolloutd.errors import ConfigError, PeerFailed


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 4.85), ("s", 47.2), ("qwen2.5-0.5b", 494), ("qwen2.5-1.5b", 1543)]
)
def test_shapes_have_the_parameters_of_the_models_they_are_named_after(name: str, millions: float) -> None:
    assert SHAPES[name].num_parameters / 1e6 == pytest.approx(millions, rel=2e-3)


def test_a_checkpoint_has_what_the_shape_counts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = ModelShape(name="x", layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64, tied=False)
    write_checkpoint(shape, tmp_path, "float32", max_len=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters() if p.ndim == 2) == shape.num_parameters
    assert model.config.max_position_embeddings == 64
    assert model.lm_head.weight.abs().mean() > 0.01


def test_workloads_say_what_they_generate() -> None:
    assert [WORKLOADS[name].num_sequences for name in ("W1", "W2", "W3", "W4")] == [64, 64, 128, 192]
    assert WORKLOADS["W2"].num_tokens == 4 * 16 * 64
    assert min(WORKLOADS["W3"].new_tokens) >= 8
    assert max(WORKLOADS["W3"].new_tokens) <= 128
    first, again, other = (WORKLOADS["W1"].prompts(100, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [len(prompt) for prompt in first] == [128] * 8
    assert grid_workload(64, 32, 16, 8, "equal").new_tokens == (16,) * 8
    lengths = sorted(lognormal_lengths(1001, 100, 800))
    assert lengths[500] == pytest.approx(100, rel=0.1)
    assert lengths[-1] == 800


def test_the_floor_is_counted_by_hand() -> None:
    shape = ModelShape(name="x", layers=1, hidden=8, heads=2, kv_heads=1, ffn=8, vocab=10)
    workload = grid_workload(4, 3, 2, 2, "equal")  # two prompts of 3 tokens, two samples of 2 tokens each
    setup = Setup(shape=shape, workloads=(workload,), peers=("rolloutd",), device="cuda", dtype="bfloat16")
    weights = 16 * 8 + 8 * 8 + 16 * 8 + 8 * 8 + 10 * 8
    kv_tokens = 2 * (2 * 3 + 2 * (1 + 2))  # per prompt: the prompt in both steps, and what each sample has written
    expected = 2 * (2 * weights + kv_tokens * 8) / 1e9
    assert floor_seconds(setup, workload, {"copy_bytes_per_s": 1e9}) == pytest.approx(expected)
    on_cpu = Setup(shape=shape, workloads=(workload,), peers=("rolloutd",), device="cpu", dtype="float32")
    products = {"4": {"layers": 3.0, "head": 5.0}, "512": {"layers": 20.0, "head": 9.0}}
    assert floor_seconds(on_cpu, workload, {"step_product_s": products}) == pytest.approx(6 * 20 / 512 + 8 * 8 / 4)


def report(**changes: Any) -> dict[str, Any]:
    def row(peer: str, speed: float, ratio: float) -> dict[str, Any]:
        def spread(value: float) -> dict[str, float]:
            return {"median": value, "min": 0.98 * value, "max": 1.02 * value}

        return {"workload": "W1", "peer": peer, "tokens_per_s": spread(speed), "ratio": spread(ratio)}

    rows = [row("rolloutd", 1000.0, 1.0), row("generate", 250.0, 4.0)]
    base: dict[str, Any] = {"bench": "throughput", "format": 1, "model": {"name": "s"}, "dtype": "float32"}
    return base | {"machine": {"processor": "A"}, "rows": rows} | changes


def slower(factor: float, **changes: Any) -> dict[str, Any]:
    changed = copy.deepcopy(report(**changes))
    ours, theirs = changed["rows"]
    for row, measure in ((ours, "tokens_per_s"), (theirs, "ratio")):
        row[measure] = {name: value * factor for name, value in row[measure].items()}
    return changed


@pytest.mark.parametrize("machine", ["A", "B"])
@pytest.mark.parametrize(("factor", "loses"), [(0.5, True), (0.93, True), (0.97, False), (1.0, False), (1.4, False)])
def test_a_loss_is_seen_beyond_tolerance_and_noise(machine: str, factor: float, loses: bool) -> None:
    changes = compare(report(), slower(factor, machine={"processor": machine}))
    assert [change.measure for change in changes] == ["tokens_per_s" if machine == "A" else "ratio"]
    assert changes[0].ratio == pytest.approx(factor)
    assert changes[0].is_loss(0.05) == loses
    assert not changes[0].is_loss(0.6)


def test_noise_widens_what_is_no_loss() -> None:
    noisy = slower(0.9)
    noisy["rows"][0]["tokens_per_s"] |= {"min": 700.0, "max": 1100.0}
    assert not compare(report(), noisy)[0].is_loss(0.05)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model is"):
        compare(report(), report(model={"name": "tiny"}))
    with pytest.raises(ConfigError, match="share no workload and peer"):
        compare(report(), report(rows=[]))
    (tmp_path / "other.json").write_text('{"bench": "simulate"}\n')
    with pytest.raises(ConfigError, match="no throughput report of format 1"):
        read_report(tmp_path / "other.json")


def test_a_peer_that_fails_is_named_with_what_it_printed(tmp_path: Path) -> None:
    options = {"model": str(tmp_path / "none"), "device": "cpu", "dtype": "float32"}
    ended = pytest.raises(PeerFailed, match=r"generate ended with code 1. It printed:\n(?s:.)*max_num_seqs")
    with Peer("generate", options) as peer, ended:
        peer.wait_ready()


def test_a_run_that_is_told_to_end_leaves_no_peer_behind(root: Path, tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--workloads", "W1", "--repeats", "999"]
    command = [sys.executable, "-m", "rolloutd.cli", "bench", *options]
    env = os.environ | {"PYTHONPATH": str(root)}
    bench = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    assert bench.stderr is not None
    try:
        assert [bench.stderr.readline() for _ in range(2)] == ["starting rolloutd\n", "starting generate\n"]
        peers = tree_of(bench.pid).keys() - {bench.pid}
        assert peers, "the first one is ready by now, and stopped"
        bench.terminate()
        assert bench.wait(60) == 128 + signal.SIGTERM
    finally:
        bench.kill()
        bench.stderr.close()
    assert not [peer for peer in peers if Path(f"/proc/{peer}").exists()]


def test_a_run_from_end_to_end(root: Path, tmp_path: Path) -> None:
    grid = ["--batch", "4", "--samples", "2", "--prompt-len", "9", "--new-tokens", "5"]
    files = ["--output", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    peers = ["--peers", "rolloutd,daemon,generate", "--repeats", "1", "--breakdown"]
    command = [sys.executable, "-m", "rolloutd.cli", "bench", "--shape", "tiny", *grid, *files, *peers]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == read_report(tmp_path / "a.json")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [row["peer"] for row in found["rows"]] == ["rolloutd", "daemon", "generate"]
    ours = found["rows"][0]
    assert ours["max_logprob_difference"] < 1e-4
    assert ours["stats"]["prefill_tokens"] == 2 * 9
    assert 0 < ours["fraction_of_limit"] < 1
    assert ours["num_tokens"] == 4 * 5
    assert all(peer["ready_s"] > 0 for peer in found["peers"].values())
    parts = found["breakdown"]["B4 p9 n5"]
    assert sum(parts["parts"].values()) == pytest.approx(parts["seconds"])
    assert {"products", "attention", "sampling", "scheduling"} < set(parts["parts"])
    assert parts["daemon"]["num_steps"] == parts["num_steps"]
    assert 0 < parts["daemon"]["wire_s"] < parts["daemon"]["seconds"]
    assert "through the daemon, outside the steps" in done.stdout
    assert "this machine: copies" in done.stdout
    again = [sys.executable, "-m", "rolloutd.cli", "bench", "--compare", *[str(tmp_path / "a.json")] * 2]
    assert subprocess.run(again, env=env, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
