"""The command line as a user meets it, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from rolloutd import RolloutClient
from rolloutd.cli.options import CONFIGS, all_options, resolve
from rolloutd.config import CheckConfig, EngineConfig, ServerConfig
from rolloutd.errors import ConfigError
from rolloutd.serve.spawn import start_daemon

COMMAND = [sys.executable, "-m", "rolloutd.cli.main"]


def run(*arguments: str, root: Path, timeout_s: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.parametrize("command", ["serve", "check"])
def test_help_needs_no_torch(command: str, root: Path) -> None:
    script = (
        "import sys\n"
        "from rolloutd.cli.main import main\n"
        "try:\n"
        f"    main([{command!r}, '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in all_options(CONFIGS if command == "serve" else (EngineConfig, CheckConfig)):
        assert name.replace("_", "-") in done.stdout


def test_every_field_is_an_option_with_a_text() -> None:
    options = all_options()
    assert set(options) == {field.name for config in (EngineConfig, ServerConfig) for field in fields(config)}
    options |= all_options((CheckConfig,))
    without = [name for name, option in options.items() if not option.help]
    assert without == ["log_level"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--blok-size", "16"], 2, "--block-size"),
        (["--model", "x", "--block-size", "many"], 2, "block-size"),
        (["--model", "x", "--block-size", "0"], 2, "CONFIG_INVALID: block_size=0 is outside"),
        ([], 2, "Usage: rolloutd"),
        (["serve"], 2, "no model given"),
        (["--model", "/no/such/folder"], 3, "MODEL_NOT_FOUND: the directory '/no/such/folder' does not exist"),
        (["--model", "x", "--listen", "tcp://0.0.0.0:1"], 5, "--allow-remote"),
        (["--model", "x", "--listen", "http://y"], 2, "listen='http://y'"),
        (["status", "/no/such/file.json"], 2, "NO_LISTENER"),
        (["bench", "--shape", "qwen2.5-0.5"], 2, "--shape='qwen2.5-0.5' is not known. Did you mean 'qwen2.5-0.5b'?"),
        (["bench", "--workloads", "W9"], 2, "--workloads='W9' is not known"),
        (["bench", "--batch", "12"], 2, "--batch=12 is no multiple of --samples=8"),
        (["bench", "--batch", "8", "--workloads", "W1"], 2, "Drop one"),
        (["bench", "--new-tokens", "8"], 2, "--new-tokens goes with --batch"),
        (["bench", "--peers", "generate"], 2, "has none of rolloutd, daemon"),
        (["bench", "--peers", "rolloutd,hf", "--shape", "tiny"], 2, "--peers='hf' is not known"),
        (["bench", "--peers", "rolloutd,vllm", "--shape", "tiny"], 2, "needs --vllm-python"),
        (["bench", "--compare", "/nowhere.json", "/nowhere.json"], 2, "/nowhere.json holds no report"),
        (["bench", "--simulate", "--requests", "1k"], 2, "--requests='1k' is not a list of numbers"),
        (["bench", "--simulate", "--requests", "0"], 2, "--requests=0 is below 1"),
        (["bench", "--simulate", "--num-blocks", "3"], 2, "--num-blocks=3 cannot hold the longest request"),
    ],
)
def test_mistakes_are_named(root: Path, arguments: list[str], code: int, words: str) -> None:
    started = time.monotonic()
    done = run(*arguments, root=root)
    assert time.monotonic() - started < 3.0
    assert words in done.stderr
    assert done.returncode == code


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--connection-file", "/no/such/folder/c.json"], "c.json cannot be written"),
        (["--ready-fd", "99"], "ready_fd=99"),
    ],
)
def test_a_daemon_that_cannot_tell_its_address_ends(root: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    """After the socket is bound and the engine started: nothing of that may keep it."""
    fake = ["--model", "fake", "--engine-factory", "tests.fakes:FakeEngine"]
    started = time.monotonic()
    done = run(*fake, *flags, root=root, XDG_RUNTIME_DIR=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 10.0
    assert not list((tmp_path / "rolloutd").iterdir())


def test_status_shows_a_running_daemon(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with start_daemon({"model": "fake"}, factory="tests.fakes:FakeEngine") as daemon:
        with RolloutClient(daemon.address) as client:
            client.wait_ready(20.0)
        done = run("status", root=root)
    assert done.returncode == 0, done.stderr
    for line in ("state           ready", "FakeForCausalLM", "weight_version"):
        assert line in done.stdout
    none = run("status", root=root)
    assert none.returncode == 2
    assert "no daemon of this user is running" in none.stderr


def test_help_and_version_are_there_at_once(root: Path) -> None:
    for flag in ("--help", "--version"):
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            assert run(flag, root=root).returncode == 0
            seconds.append(time.monotonic() - started)
        assert min(seconds) < 0.6


def test_an_unsupported_model_is_named_before_torch_loads(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    done = run("--model", str(tmp_path), "--model-impl", "native", root=root)
    assert done.returncode == 3
    assert "MambaForCausalLM, which is not native" in done.stderr
    (tmp_path / "config.json").write_text("{}")
    done = run("--model", str(tmp_path), root=root)
    assert done.returncode == 3
    assert "names no architecture" in done.stderr


def test_print_config_shows_each_value_with_its_source(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "rolloutd.yaml"
    file.write_text("block-size: 32\nmax_num_seqs: 8\nseed: 1\n")
    done = run(
        *("--model", "x", "--config", str(file), "--max_num_seqs", "9", "--print-config"),
        root=root,
        ROLLOUTD_SEED="5",
        ROLLOUTD_ENABLE_PREFIX_CACHING="no",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "model = 'x'  (command line)",
        "block_size = 32  (config file)",
        "max_num_seqs = 9  (command line)",
        "seed = 5  (environment)",
        "enable_prefix_caching = False  (environment)",
        "lease_s = 30.0  (default)",
    ):
        assert line in lines


def test_bad_files_and_variables_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("blok_size: 3\n")
    with pytest.raises(ConfigError, match="Did you mean 'block_size'"):
        resolve({"model": "x"}, file)
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="option: value"):
        resolve({"model": "x"}, file)
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve({"model": "x"}, tmp_path / "none.yaml")
    monkeypatch.setenv("ROLLOUTD_SEAD", "1")
    with pytest.raises(ConfigError, match="ROLLOUTD_SEAD"):
        resolve({"model": "x"}, None)


def test_the_scheduler_is_measured_without_torch(root: Path) -> None:
    done = run("bench", "--simulate", "--requests", "20,50", "--samples", "2", root=root)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [report["num_completions"] for report in result["reports"]] == [40, 100]
    assert all(report["leaked_blocks"] == 0 for report in result["reports"])


def test_weight_updates_are_measured_by_every_transport(root: Path) -> None:
    done = run("bench", "--weights", "--shape", "tiny", "--repeats", "1", root=root, timeout_s=240.0)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    full = {row["transport"]: row["num_bytes"] for row in rows if row["update"] == "full"}
    assert full.keys() == {"in_process", "shared_memory", "collective", "inline"}
    assert len(set(full.values())) == 1
    deltas = {row["update"]: row["num_bytes"] / full["inline"] for row in rows if row["update"].startswith("delta")}
    assert deltas == pytest.approx({"delta 1%": 0.02, "delta 5%": 0.1, "delta 30%": 0.3625}, rel=0.05)
    assert all(sum(row["parts"].values()) <= row["seconds"] * 1.01 for row in rows)
