"""Kill, stop and hang every process while work is in flight: a named error in time, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rolloutd import RolloutClient, SamplingParams
from rolloutd.errors import DaemonUnreachable, EngineDied, EngineStalled, RolloutdError, ShuttingDown
from rolloutd.serve.spawn import Daemon
from rolloutd.weights import shared_memory
from tests.fakes import HANGING_TEXT, Orders

StartFake = Callable[..., Daemon]
LONG = SamplingParams(max_tokens=50_000)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@contextlib.contextmanager
def generating(client: RolloutClient, prompt: list[int] | None = None) -> Iterator[list[BaseException]]:
    """Run an endless request in a thread; the list holds its error once it has ended."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            client.generate([prompt or [Orders.SLOW]], LONG)
        except BaseException as error:
            errors.append(error)

    client.wait_ready(20.0)
    worker = threading.Thread(target=work, daemon=True)  # one that hangs must not keep the test run
    worker.start()
    assert_within(10.0, lambda: client.stats().num_running == 1)
    yield errors
    worker.join(15.0)
    assert not worker.is_alive(), "the call hangs"


def test_killing_the_front_ends_the_call_and_the_engine(start_fake: StartFake, own_run_dir: Path) -> None:
    daemon = start_fake()
    with RolloutClient(daemon.address, timeout=30.0) as client:
        engine_pid = client.health().engine_pid
        with generating(client) as errors:
            os.kill(daemon.pid, signal.SIGKILL)
            killed = time.monotonic()
        assert time.monotonic() - killed < 5.0
        assert isinstance(errors[0], DaemonUnreachable)
        assert str(daemon.pid) in str(errors[0])
        assert daemon.log_path in str(errors[0])
        with pytest.raises(DaemonUnreachable):
            client.health()
    assert_within(5.0, lambda: not is_alive(engine_pid))
    left = {file.stem.removesuffix("-engine") for file in own_run_dir.iterdir()}
    other = start_fake()
    incarnation = Path(other.address).stem
    now = {file.stem.removesuffix("-engine") for file in own_run_dir.iterdir()}
    assert now & left <= {incarnation} | now - {Path(daemon.address).stem}
    assert Path(daemon.address).stem not in now, "the next daemon did not clear the dead one's files"


def test_killing_the_engine_names_it(start_fake: StartFake) -> None:
    daemon = start_fake()
    with RolloutClient(daemon.address, timeout=30.0) as client:
        with generating(client) as errors:
            os.kill(client.health().engine_pid, signal.SIGKILL)
            killed = time.monotonic()
        assert time.monotonic() - killed < 5.0
    assert isinstance(errors[0], EngineDied)
    assert "signal 9" in str(errors[0])
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 6


def test_an_engine_that_kills_itself_in_a_step(start_fake: StartFake) -> None:
    daemon = start_fake()
    with RolloutClient(daemon.address) as client, pytest.raises(EngineDied):
        client.generate([[Orders.DIE]], LONG)
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 6


def test_a_hanging_step_is_named_by_the_client(start_fake: StartFake) -> None:
    daemon = start_fake()
    with RolloutClient(daemon.address, timeout=2.0) as client:
        started = time.monotonic()
        with pytest.raises(EngineStalled, match="has not moved"):
            client.generate([[Orders.HANG]], LONG)
        assert time.monotonic() - started < 4.0


def test_a_hanging_step_is_ended_by_the_front(start_fake: StartFake) -> None:
    daemon = start_fake(stall_s=1.0)
    with RolloutClient(daemon.address, timeout=30.0) as client:
        engine_pid = client.health().engine_pid
        with pytest.raises(EngineStalled, match="--stall-s"):
            client.generate([[Orders.HANG]], LONG)
    assert_within(5.0, lambda: not daemon.is_running and not is_alive(engine_pid))
    assert daemon.stop() == 6


def test_an_engine_that_hangs_on_a_message_is_ended_too(start_fake: StartFake) -> None:
    daemon = start_fake(stall_s=1.0)
    with RolloutClient(daemon.address, timeout=30.0) as client:
        client.wait_ready(20.0)
        with pytest.raises(EngineStalled, match="--stall-s"):
            client.generate(HANGING_TEXT, LONG)
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 6


def test_a_stopped_front_is_named(start_fake: StartFake) -> None:
    daemon = start_fake()
    with RolloutClient(daemon.address, timeout=2.0) as client:
        try:
            with generating(client) as errors:
                os.kill(daemon.pid, signal.SIGSTOP)
                stopped = time.monotonic()
            assert time.monotonic() - stopped < 5.0
            assert isinstance(errors[0], DaemonUnreachable)
            assert "silent" in str(errors[0])
        finally:
            os.kill(daemon.pid, signal.SIGCONT)


def test_a_stopped_engine_is_named(start_fake: StartFake) -> None:
    daemon = start_fake()
    with RolloutClient(daemon.address, timeout=2.0) as client:
        engine_pid = client.health().engine_pid
        try:
            with generating(client) as errors:
                os.kill(engine_pid, signal.SIGSTOP)
        finally:
            os.kill(engine_pid, signal.SIGCONT)
        assert isinstance(errors[0], EngineStalled)


def test_a_dead_clients_work_is_cancelled(start_fake: StartFake, root: Path) -> None:
    daemon = start_fake()
    script = (
        "import sys\n"
        "from rolloutd import RolloutClient, SamplingParams\n"
        "client = RolloutClient(sys.argv[1])\n"
        "print('connected', flush=True)\n"
        "client.generate([[901]], SamplingParams(max_tokens=50_000))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, daemon.address], stdout=subprocess.PIPE, cwd=root)
    with RolloutClient(daemon.address) as client:
        assert child.stdout is not None
        assert child.stdout.readline()
        assert_within(10.0, lambda: client.stats().num_running == 1)
        child.kill()
        child.wait(10.0)
        child.stdout.close()
        assert_within(5.0, lambda: client.stats().num_running == 0)


@pytest.mark.parametrize("transport", ["shared_memory", "inline", "collective"])
def test_a_dead_clients_update_is_closed(start_fake: StartFake, root: Path, transport: str) -> None:
    daemon = start_fake()  # far sooner than its lease of 30 s ends
    script = (
        "import os, sys, torch\n"
        "from rolloutd import RolloutClient\n"
        "client = RolloutClient(sys.argv[1])\n"
        "def tensors():\n"
        "    yield 'a', torch.zeros(30_000_000)\n"
        "    os._exit(9)\n"
        "client.update_weights(tensors(), transport=sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, daemon.address, transport]
    done = subprocess.run(command, cwd=root, timeout=60, check=False)
    assert done.returncode == 9
    with RolloutClient(daemon.address) as client:

        def update() -> bool:
            try:
                return client.update_weights({"a": torch.ones(3)}).version == 1
            except RolloutdError:
                return False

        assert_within(8.0, update)
    assert not list(shared_memory.DIRECTORY.glob("rolloutd-*")), "a dead client's segment is left"


def test_sigterm_drains_and_ends_with_0(start_fake: StartFake) -> None:
    daemon = start_fake(grace=20.0)
    results: list[int] = []
    with RolloutClient(daemon.address) as client:
        worker = threading.Thread(
            target=lambda: results.append(
                len(client.generate([[Orders.SLOW]], SamplingParams(max_tokens=20))[0].outputs[0].token_ids)
            )
        )
        client.wait_ready(20.0)
        worker.start()
        assert_within(10.0, lambda: client.stats().num_running == 1)
        os.kill(daemon.pid, signal.SIGTERM)
        assert_within(5.0, lambda: client.health().state == "stopping")
        with pytest.raises(ShuttingDown):
            client.generate([[1]], SamplingParams(max_tokens=1))
        worker.join(10.0)
    assert results == [20]
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 0
    assert not Path(daemon.address).exists()


def test_grace_exceeded_is_named_and_ends_with_7(start_fake: StartFake) -> None:
    daemon = start_fake(grace=0.3)
    with RolloutClient(daemon.address) as client, generating(client) as errors:
        os.kill(daemon.pid, signal.SIGTERM)
    assert isinstance(errors[0], ShuttingDown)
    assert "--grace" in str(errors[0])
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 7


def test_an_engine_that_dies_while_the_daemon_drains_is_no_clean_stop(start_fake: StartFake) -> None:
    daemon = start_fake(grace=60.0)
    with RolloutClient(daemon.address, timeout=30.0) as client:
        engine_pid = client.health().engine_pid
        with generating(client) as errors:
            os.kill(daemon.pid, signal.SIGTERM)
            assert_within(5.0, lambda: client.health().state == "stopping")
            os.kill(engine_pid, signal.SIGKILL)
    assert isinstance(errors[0], EngineDied)
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 6


def test_a_second_signal_ends_the_grace_and_still_tells(start_fake: StartFake) -> None:
    daemon = start_fake(grace=60.0)
    with RolloutClient(daemon.address, timeout=30.0) as client, generating(client) as errors:
        os.kill(daemon.pid, signal.SIGINT)
        assert_within(5.0, lambda: client.health().state == "stopping")
        os.kill(daemon.pid, signal.SIGINT)
    assert isinstance(errors[0], ShuttingDown)
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 7


def test_a_drain_ends_when_the_last_client_leaves(start_fake: StartFake) -> None:
    daemon = start_fake(grace=60.0)
    script = (
        "import sys\n"
        "from rolloutd import RolloutClient, SamplingParams\n"
        "client = RolloutClient(sys.argv[1])\n"
        "client.generate([[901]], SamplingParams(max_tokens=50_000))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, daemon.address])
    with RolloutClient(daemon.address) as client:
        assert_within(20.0, lambda: client.stats().num_running == 1)
    os.kill(daemon.pid, signal.SIGTERM)
    child.kill()
    child.wait(10.0)
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 0


def test_a_forked_child_leaves_its_parents_daemon_alone(start_fake: StartFake) -> None:
    daemon = start_fake()
    child = os.fork()
    if child == 0:
        os._exit(daemon.stop())
    assert os.waitpid(child, 0)[1] == 0
    assert daemon.is_running
    with RolloutClient(daemon.address) as client:
        assert client.health().pid == daemon.pid


def test_a_daemon_ends_with_the_process_that_started_it(root: Path, own_run_dir: Path) -> None:
    script = (
        "import os\n"
        "from rolloutd.serve.spawn import start_daemon\n"
        "daemon = start_daemon({'model': 'fake'}, {'die_with_parent': True}, factory='tests.fakes:FakeEngine')\n"
        "print(daemon.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    pid = int(child.stdout)
    assert_within(10.0, lambda: not is_alive(pid))
