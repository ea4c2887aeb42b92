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

from rolloutd import LLM, RolloutClient, SamplingParams
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


def test_groups_and_samples_end_while_others_go_on(tiny_model: Factory, own_run_dir: Path) -> None:
    """Beams too come through the daemon as they come from `LLM`."""
    model = str(tiny_model("qwen2", tie=True))
    search = SamplingParams(beam_width=3, n=2, max_tokens=5)
    with start_daemon({"model": model, "max_num_seqs": 16}) as daemon, RolloutClient(daemon.address) as client:
        params = [
            SamplingParams(n=3, max_tokens=900, ignore_eos=True),
            SamplingParams(n=2, max_tokens=12, ignore_eos=True),
        ]
        stream = client.stream([[5, 6], [7]], params)
        with pytest.raises(RequestError, match=r"prompt=2 is outside 0 to 1"):
            stream.abort(2)
        ended: list[tuple[int, int, str]] = []
        for number, completion in stream:
            ended.append((number, completion.index, completion.finish_reason))
            if len(ended) == 2:  # the short ones: now one sample of the long group, then the rest of it
                assert stream.abort(0, samples=[1]) == 1
            if len(ended) == 3:
                assert stream.abort(0) == 1
        assert sorted(ended[:2]) == [(1, 0, "length"), (1, 1, "length")]
        assert ended[2] == (0, 1, "abort")
        assert sorted(ended[3:]) == [(0, 0, "abort"), (0, 2, "abort")]
        through_the_daemon = client.generate([[5, 6, 7]], search)[0].outputs
    with LLM(model) as llm:
        in_process = llm.generate([[5, 6, 7]], search)[0].outputs
    assert [c.token_ids for c in through_the_daemon] == [c.token_ids for c in in_process]
    assert [c.beam_score for c in through_the_daemon] == pytest.approx([c.beam_score for c in in_process])


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
