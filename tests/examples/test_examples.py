"""Every example, run as a user runs it, with few steps; and the parts they share."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rolloutd import RolloutClient
from rolloutd.serve.spawn import start_daemon

Factory = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons of these tests do not lie among the user's."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Callable[..., str]:
    """`run("x.py", arguments...)` runs an example away from the checkout and returns what it printed."""

    def call(script: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(root / "examples" / script), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return call


@pytest.fixture
def shared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples' own modules become importable."""
    monkeypatch.syspath_prepend(str(root / "examples"))


@pytest.mark.usefixtures("shared")
def test_the_task_is_verifiable_and_held_out_problems_are_not_trained_on() -> None:
    import arithmetic

    train, held_out = arithmetic.split(300)
    assert 8100 - 300 - 1 <= len(train) <= 8100 - 300  # of the last pair one order may be left out
    assert len(held_out) == 300

    def pairs(problems: list[arithmetic.Problem]) -> set[frozenset[str]]:
        return {frozenset(one.prompt.removesuffix("=").split("+")) for one in problems}

    # 38+47 in training would give 47+38 away.
    assert not pairs(train) & pairs(held_out)
    assert arithmetic.split(300) == (train, held_out)
    for one in random.Random(0).sample(train, 50):
        a, b = one.prompt.removesuffix("=").split("+")
        assert one.answer == str(int(a) + int(b))
    assert arithmetic.is_right("85", "85")
    assert not arithmetic.is_right("085", "85")
    assert not arithmetic.is_right("8", "85")


@pytest.mark.usefixtures("shared")
def test_the_tokenizer_has_one_token_a_character() -> None:
    import arithmetic

    tokenizer = arithmetic.build_tokenizer()
    ids = tokenizer("47+38=")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "47+38="
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "47+38="


@pytest.mark.usefixtures("shared")
def test_gsm8k_answers_are_compared_as_numbers() -> None:
    import grpo_gsm8k

    assert grpo_gsm8k.last_number("so 1,234 apples\n#### 1,234") == "1234"
    assert grpo_gsm8k.is_right("3 + 4 is 7.0", "7")
    assert not grpo_gsm8k.is_right("no number", "7")


@pytest.mark.usefixtures("shared")
def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    import grpo_run

    grpo_run.plot_rewards([i / 50 for i in range(50)], tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_generate_shares_the_prompts(run: Callable[..., str]) -> None:
    printed = run("generate.py")
    assert "prompt tokens computed: 2,048 (one by one they would be 32,768)" in printed


def test_the_demo_runs_end_to_end(run: Callable[..., str], tmp_path: Path) -> None:
    options = ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--pretrain-steps", "5"]
    printed = run("grpo_arithmetic.py", "--steps", "3", "--prompts", "4", *options)
    for row in ("reward, mean", "held-out accuracy, sampled (300)", "rollout tokens/s", "weight sync", "|log p"):
        assert row in printed
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["num_syncs"] == 1 + 2 + 1  # before; at steps 1 and 2, since step 0 begins synced; after
    assert 0.0 < result["logprob_gap_max"] < 1e-4
    assert (tmp_path / "out" / "reward.png").is_file()


def test_the_hub_example_runs_on_local_files(run: Callable[..., str], tiny_model: Factory, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run(
        "grpo_gsm8k.py",
        *("--model", str(tiny_model("qwen2")), "--dataset", str(data), "--held-out", "4", "--steps", "2"),
        *("--prompts", "2", "--generations", "4", "--max-completion-length", "8", "--out", str(tmp_path / "out")),
    )
    assert "held-out accuracy, greedy (4)" in printed


def test_the_lora_example_checks_itself(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run(
        "grpo_lora.py",
        *("--steps", "3", "--prompts", "2", "--pretrain-steps", "5"),
        *("--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")),
    )
    before, after = re.findall(r"hash of the base +before (\w+), after (\w+)", printed)[0]
    assert before == after
    assert re.search(r"syncs +3\n", printed)


def test_the_client_streams_from_a_daemon(run: Callable[..., str], tiny_model: Factory) -> None:
    started = time.monotonic()
    with start_daemon({"model": str(tiny_model("qwen2"))}) as daemon:
        with RolloutClient(daemon.address) as client:
            assert client.health().state == "loading"
            assert time.monotonic() - started < 1.5  # under 1 s where nothing else runs; a test machine may be busy
            client.wait_ready()
            assert client.health().state == "ready"
        printed = run("client.py")
    lines = [line for line in printed.splitlines() if "sample" in line]
    assert len(lines) == 16
    assert "tokens/s" in printed
