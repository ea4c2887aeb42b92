"""Processes that generate: started, asked, measured and ended, each wait with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rolloutd.errors import ConfigError, PeerFailed

READY_TIMEOUT_S = 900.0
RUN_TIMEOUT_S = 1800.0
OURS = ("rolloutd", "daemon", "deterministic")
PEERS = (*OURS, "generate", "generate_batch", "vllm")


def check_peers(peers: Sequence[str], vllm_python: str | None, lora: str) -> None:
    """Raise `ConfigError` for what cannot be measured together."""
    for name in peers:
        if name not in PEERS:
            raise ConfigError(f"--peers={name!r} is not known. Known: {', '.join(PEERS)}.")
    if not any(name in OURS for name in peers):
        raise ConfigError(f"--peers={','.join(peers)} has none of {', '.join(OURS)}. Add one.")
    if "vllm" in peers and vllm_python is None:
        raise ConfigError("--peers=vllm needs --vllm-python, the interpreter of an environment that has vllm.")
    if peers[0] not in OURS:
        raise ConfigError(
            f"--peers={','.join(peers)}: the first is what the others are compared with. Begin with ours."
        )
    if "daemon" in peers and lora != "off":
        raise ConfigError(f"--lora={lora} is measured in process. Use --peers=rolloutd.")


def tree_of(pid: int) -> dict[int, int]:
    """Return a process and those that it started, each with the most bytes of memory that it has held."""
    parents: dict[int, int] = {}
    peaks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "status").read_text().splitlines()
            except OSError:
                continue  # it has ended
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
            parents[int(entry.name)] = int(facts["PPid"])
            peaks[int(entry.name)] = 1024 * int(facts.get("VmHWM", "0 kB").split()[0])
    tree = {pid}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return {member: peaks.get(member, 0) for member in tree}


class Peer:
    """One worker. A context manager."""

    def __init__(self, name: str, options: dict[str, Any], vllm_python: str | None = None) -> None:
        command = [sys.executable, "-m", "rolloutd.benchmarks.worker", name]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if name == "vllm":
            assert vllm_python is not None
            environment = dict(os.environ)
            command = [vllm_python, str(Path(__file__).with_name("vllm_worker.py"))]
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._buffer = b""
        self.ready_s = 0.0

    def wait_ready(self) -> None:
        """Wait for the first token; `ready_s` is how long the process took to it."""
        self._read(READY_TIMEOUT_S)
        self.ready_s = time.perf_counter() - self._started
        self._signal(signal.SIGSTOP)

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """Return the answer; `PeerFailed` with the end of what the process printed."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("has ended") from None
        answer = self._read(RUN_TIMEOUT_S)
        if "error" in answer:
            raise self._failure(str(answer["error"]))
        if not answer.get("on_gpu"):
            answer["peak_bytes"] = sum(tree_of(self._process.pid).values())
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        """Stop or continue the process and its children: what polls while it waits would take the others' cores.

        A daemon of ours goes on: it only waits, and its clients' leases go by the clock.
        """
        if self.name == "daemon" or self._process.poll() is not None:
            return
        for member in tree_of(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, number)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.perf_counter() + timeout_s
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.perf_counter()))
            if not readable:
                raise self._failure(f"gave no answer in {timeout_s:.0f} s")
            data = os.read(fd, 1 << 20)
            if not data:
                raise self._failure(f"ended with code {self._process.wait(10)}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> PeerFailed:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 2000))
        tail = self._log.read().decode(errors="replace").strip()
        return PeerFailed(f"{self.name} {what}. It printed:\n{tail}")

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
