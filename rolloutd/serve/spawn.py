"""Start a daemon as a child process, wait until it answers, and reap it."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rolloutd.errors import DeadlineExceeded, EngineDied, RolloutdError, error_from_wire

LAUNCHER_VARIABLES = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_RANK|ROLE_WORLD_SIZE|ROLE_NAME"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*|TORCH_FR_DUMP_TEMP_FILE|TORCH_NCCL_ASYNC_ERROR_HANDLING|NCCL_DEBUG_FILE"
    r"|ACCELERATE_.*|FSDP_.*|OMP_NUM_THREADS"
)
"""What torchrun and accelerate set for their children: a daemon that inherits it joins the trainer's process group."""

_ERROR_LINE = re.compile(r"^error: ([A-Z_]+): (.*)$", re.MULTILINE)
_LOG_TAIL_BYTES = 4_000


class Daemon:
    """A daemon that this process started. A context manager; it is also stopped when this process exits."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self._process = process
        self.log_path = str(log_path)
        self.address = ""
        """Its connection file."""
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self, grace_s: float = 5.0) -> int:
        """End the daemon, kill it if it takes longer than `grace_s`, and return its exit code.

        A forked child runs the same exit handlers; there the process is not a child's own, and nothing is ended.
        """
        atexit.unregister(self.stop)
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait(10.0)

    def failure(self) -> RolloutdError:
        """Return why the daemon ended: its own error where it printed one, else the end of its log."""
        text = self.log_tail()
        found = _ERROR_LINE.findall(text)
        if found:
            code, message = found[-1]
            return error_from_wire(code, f"{message} (log: {self.log_path})")
        return EngineDied(
            f"the daemon ended with exit code {self._process.returncode} before it was ready. Its log {self.log_path} "
            f"ends:\n{text}"
        )

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        with contextlib.suppress(OSError):
            return Path(self.log_path).read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_daemon(
    engine_options: Mapping[str, Any],
    server_options: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 30.0,
    factory: str | None = None,
) -> Daemon:
    """Start `rolloutd` with these options and return once its address answers; the model may still be loading.

    The child gets a session of its own, none of a launcher's variables, and a log file that every error names. Raises
    the daemon's own error if it ends before, `DeadlineExceeded` after `timeout_s`.
    """
    descriptor, name = tempfile.mkstemp(prefix="rolloutd-", suffix=".log")
    read_end, write_end = os.pipe()
    options = {**engine_options, **(server_options or {}), "ready_fd": write_end}
    command = [sys.executable, "-m", "rolloutd.cli.main", "serve", *_flags(options)]
    if factory is not None:
        command += ["--engine-factory", factory]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=child_environment(),
            pass_fds=(write_end,),
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
        os.close(write_end)
    daemon = Daemon(process, Path(name))
    try:
        daemon.address = _wait_for_address(daemon, read_end, time.monotonic() + timeout_s, timeout_s)
    except BaseException:
        daemon.stop(0.0)
        raise
    finally:
        os.close(read_end)
    return daemon


def _wait_for_address(daemon: Daemon, read_end: int, deadline: float, timeout_s: float) -> str:
    """Return the line that the daemon writes when it answers; an end of file means that it died."""
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([read_end], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise DeadlineExceeded(f"the daemon did not answer within {timeout_s:g} s. Read its log {daemon.log_path}.")
        part = os.read(read_end, 4096)
        if not part:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon._process.wait(5.0)
            raise daemon.failure()
        line += part
    return line.decode().strip()


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Return options as command-line flags; None means not given."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags.append(f"--{flag}={value}")
    return flags


def child_environment() -> dict[str, str]:
    """Return this process's environment without what a launcher put there, and with our packages importable."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root not in paths and root not in sys.path[1:]:
        kept["PYTHONPATH"] = os.pathsep.join([*paths, root])
    return kept
