"""`rolloutd --model DIR` as a user starts it, with a real tiny model."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rolloutd import RolloutClient, SamplingParams
from rolloutd.errors import ModelUnsupported, RequestError
from rolloutd.serve.spawn import start_daemon

Factory = Callable[..., Path]


@contextlib.contextmanager
def rolloutd(*arguments: str, log: Path, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command with its output in a file."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rolloutd.cli.main", *arguments], cwd=root, stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10.0)


def test_from_the_command_to_the_exit_code(tiny_model: Factory, tmp_path: Path, root: Path, own_run_dir: Path) -> None:
    model, file, log = tiny_model("qwen2", tie=True), tmp_path / "policy.json", tmp_path / "log"
    started = time.monotonic()
    with rolloutd("--model", str(model), "--connection-file", str(file), "--max-num-seqs=8", log=log, root=root) as it:
        while not file.exists():
            assert time.monotonic() - started < 5.0
            time.sleep(0.01)
        with RolloutClient(str(file)) as client:
            health = client.health()
            assert time.monotonic() - started < 2.0, "health answers long before torch is loaded"
            assert health.uptime_s < 1.0
            assert health.state == "loading"
            output = client.generate("abc", SamplingParams(n=2, max_tokens=4))[0]
            assert [len(completion.logprobs) for completion in output.outputs] == [
                len(completion.token_ids) for completion in output.outputs
            ]
            assert client.health().state == "ready"
            info = client.wait_ready()
            assert (info.architecture, info.max_model_len) == ("Qwen2ForCausalLM", 1024)
        it.send_signal(signal.SIGTERM)
        assert it.wait(10.0) == 0
    assert not file.exists()
    lines = log.read_text().splitlines()
    assert len(lines) <= 12
    for word in ("model", "numerics", "weights", "kv cache", "room", "address", "connection", "ready", "trainer"):
        assert any(word in line for line in lines), f"{word} is missing from the start-up summary"


def test_a_model_without_a_tokenizer_serves_token_ids(tiny_model: Factory, tmp_path: Path, own_run_dir: Path) -> None:
    model = tmp_path / "bare"
    model.mkdir()
    for file in tiny_model("qwen2", tie=True).iterdir():
        if "token" not in file.name:
            (model / file.name).symlink_to(file)
    with (
        start_daemon({"model": str(model), "max_num_seqs": 4}) as daemon,
        RolloutClient(daemon.address) as client,
    ):
        assert client.generate([[1, 2]], SamplingParams(max_tokens=2))[0].outputs[0].text == ""
        with pytest.raises(RequestError, match="tokenizer"):
            client.generate("abc")


def test_a_refused_model_carries_the_daemons_own_error(tmp_path: Path, own_run_dir: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    with pytest.raises(ModelUnsupported, match=r"MambaForCausalLM, which is not native.*log: "):
        start_daemon({"model": str(tmp_path), "model_impl": "native"})
    with (
        start_daemon({"model": str(tmp_path)}) as daemon,
        RolloutClient(daemon.address) as client,
        pytest.raises(ModelUnsupported, match=r"MambaForCausalLM cannot run.*recurrent state"),
    ):
        client.generate([[1, 2]], SamplingParams(max_tokens=2))
