"""The run directory: who may own it, what dead daemons leave, and which daemon an address means."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rolloutd.errors import AddressInUse, ConfigError, InsecureBind, NoListener
from rolloutd.serve.rundir import (
    MAX_SOCKET_PATH,
    Connection,
    Lease,
    claim,
    find_connection,
    live_connections,
    reclaim_stale,
    run_dir,
)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory of this test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return run_dir()


def published(lease: Lease, address: str = "ipc:///x") -> Connection:
    connection = Connection(address=address, pid=os.getpid(), incarnation=lease.incarnation, model="m")
    connection.write(lease.connection_file)
    return connection


def test_it_is_made_for_its_owner_alone(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert run_dir() == directory
    directory.chmod(0o755)
    with pytest.raises(InsecureBind, match="755"):
        run_dir()


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "rolloutd").symlink_to(tmp_path / target)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(InsecureBind, match="link"):
        run_dir()


def test_without_xdg_it_lies_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_dir() == tmp_path / f"rolloutd-{os.getuid()}"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        run_dir()


def test_a_lease_is_locked_from_its_first_moment(directory: Path) -> None:
    lease = Lease(directory)
    assert [file.suffix for file in directory.iterdir()] == [".lock"]
    assert reclaim_stale(directory) == 0
    lease.release()
    assert list(directory.iterdir()) == []


def test_what_a_dead_daemon_left_is_removed_and_not_found(directory: Path) -> None:
    dead, alive = Lease(directory), Lease(directory)
    expected = published(alive, "ipc:///alive")
    published(dead, "ipc:///dead")  # the newest file of all
    dead.client_socket.touch()
    os.close(dead._lock)  # as the end of the process does
    assert list(live_connections()) == [expected]
    assert find_connection(None, None) == expected
    assert find_connection("ipc:///dead", None).pid == 0, "only its address is known"
    assert reclaim_stale(directory) == 1
    assert all(file.name.startswith(alive.incarnation) for file in directory.iterdir())
    alive.release()
    with pytest.raises(NoListener, match="no daemon of this user"):
        find_connection(None, None)


def test_a_connection_file_of_a_living_daemon_is_not_taken(directory: Path, tmp_path: Path) -> None:
    first, second = Lease(directory), Lease(directory)
    path = tmp_path / "policy.json"
    assert claim(path, first) == path
    connection = published(first)
    connection.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(AddressInUse, match="running daemon"):
        claim(path, second)
    first.release()
    assert claim(path, second) == path
    second.release()


def test_a_token_is_three_keys_or_nothing(directory: Path) -> None:
    bare = Connection(address="ipc:///x", pid=1, incarnation="a", model="m")
    assert bare.token is None
    assert find_connection("tcp://127.0.0.1:1", "a b c").token == "a b c"


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * MAX_SOCKET_PATH)
    deep.mkdir()
    with pytest.raises(ConfigError, match="too long"):
        Lease(deep)
