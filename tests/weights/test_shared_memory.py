"""Shared segments: owner-only, refused unless they are exactly what was named, and reclaimed after a kill."""

from __future__ import annotations

import os
import secrets
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rolloutd.errors import ManifestMismatch
from rolloutd.weights import shared_memory
from rolloutd.weights.shared_memory import KeptSegment, Segment, available, reclaim_stale

CREATOR = """
import sys
from pathlib import Path
from rolloutd.weights import shared_memory
shared_memory.DIRECTORY = Path(sys.argv[1])
segment = shared_memory.Segment.create(4096)
segment.buffer[:5] = b"hello"
print(segment.name, flush=True)
sys.stdin.read()
segment.close()
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the test's own, so that segments of other processes are neither seen nor reclaimed."""
    monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path)
    return tmp_path


@pytest.fixture
def creator(directory: Path, root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds a segment of 4096 bytes, and that segment's name."""
    process = subprocess.Popen(
        [sys.executable, "-c", CREATOR, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], 30)[0], "the creator did not start within 30 s"
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def new_name() -> str:
    return f"rolloutd-{secrets.token_hex(16)}"


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_both_sides_see_one_memory(directory: Path) -> None:
    with Segment.create(10_000) as created, Segment.attach(created.name, 10_000) as attached:
        assert bytes(created.buffer) == bytes(10_000)
        created.buffer[9_990:] = b"0123456789"
        assert bytes(attached.buffer[9_990:]) == b"0123456789"
        attached.buffer[0] = 7
        assert created.buffer[0] == 7
    assert list(directory.iterdir()) == []


def test_the_systems_own_directory_serves() -> None:
    assert available()
    with Segment.create(4096) as created, Segment.attach(created.name, 4096) as attached:
        attached.buffer[:2] = b"ok"
        assert bytes(created.buffer[:2]) == b"ok"
        path = Path("/dev/shm") / created.name
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_file_is_its_owners_alone(directory: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Segment.create(16) as segment:
            status = (directory / segment.name).stat()
            assert stat.S_IMODE(status.st_mode) == 0o600
            assert status.st_uid == os.geteuid()
            assert status.st_size == 16
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "other",
        "rolloutd-",
        "rolloutd-" + "0" * 31,
        "rolloutd-" + "0" * 33,
        "rolloutd-" + "G" * 32,
        "rolloutd-" + "A" * 32,
        "rolloutd-" + "0" * 32 + "\n",
        "../rolloutd-" + "0" * 32,
        "rolloutd-" + "0" * 32 + "/../x",
        "rolloutd-../../../../etc/passwd0000000",
        "/etc/passwd",
        "rolloutd-" + "0" * 31 + "\0",
    ],
)
def test_foreign_names_and_paths_are_refused_unopened(directory: Path, name: str) -> None:
    before = open_descriptors()
    with pytest.raises(ManifestMismatch, match="is not the name of a shared segment"):
        Segment.attach(name, 16)
    assert open_descriptors() == before


def test_a_missing_segment_is_a_named_error(directory: Path) -> None:
    with pytest.raises(ManifestMismatch, match=r"cannot be opened \(No such file"):
        Segment.attach(new_name(), 16)


def test_a_symlink_is_refused(directory: Path) -> None:
    target, name = directory / "secret", new_name()
    target.write_bytes(bytes(16))
    (directory / name).symlink_to(target)
    with pytest.raises(ManifestMismatch, match="cannot be opened"):
        Segment.attach(name, 16)


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file_is_refused_without_waiting(directory: Path, kind: str) -> None:
    name = new_name()
    if kind == "directory":
        (directory / name).mkdir()
    else:
        os.mkfifo(directory / name, 0o600)
    before = open_descriptors()
    with pytest.raises(ManifestMismatch, match="segment"):
        Segment.attach(name, 16)
    assert reclaim_stale() == 0
    assert open_descriptors() == before


def test_another_users_file_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Segment.create(16) as segment:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
        with pytest.raises(ManifestMismatch, match="is not this user's file"):
            Segment.attach(segment.name, 16)
        assert reclaim_stale() == 0


@pytest.mark.parametrize("num_bytes", [-1, 0, 1, 15, 17, 4096, 1 << 70])
def test_another_size_is_refused(directory: Path, num_bytes: int) -> None:
    with Segment.create(16) as segment:
        before = open_descriptors()
        with pytest.raises(ManifestMismatch, match=f"file of {num_bytes} bytes"):
            Segment.attach(segment.name, num_bytes)
        assert open_descriptors() == before


def test_an_empty_file_is_refused(directory: Path) -> None:
    name = new_name()
    (directory / name).touch(mode=0o600)
    with pytest.raises(ManifestMismatch, match="file of 0 bytes"):
        Segment.attach(name, 0)


@pytest.mark.parametrize("num_bytes", [0, -4096])
def test_a_segment_holds_something(directory: Path, num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"num_bytes={num_bytes}"):
        Segment.create(num_bytes)
    assert list(directory.iterdir()) == []


def test_memory_that_is_not_to_be_had_leaves_nothing_behind(directory: Path) -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match=r"No space left|File too large|Invalid argument"):
        Segment.create(1 << 62)
    assert list(directory.iterdir()) == []
    assert open_descriptors() == before


def test_close_is_idempotent_and_gives_back_the_descriptor(directory: Path) -> None:
    before = open_descriptors()
    segment = Segment.create(64)
    attached = Segment.attach(segment.name, 64)
    attached.close()
    assert (directory / segment.name).exists(), "only its creator removes a segment"
    segment.close()
    segment.close()
    assert list(directory.iterdir()) == []
    assert open_descriptors() == before


def test_unlink_leaves_the_memory_to_those_who_have_it(directory: Path) -> None:
    with Segment.create(64) as segment, Segment.attach(segment.name, 64) as attached:
        attached.unlink()
        assert (directory / segment.name).exists()
        segment.unlink()
        segment.unlink()
        assert list(directory.iterdir()) == []
        segment.buffer[:2] = b"ok"
        assert bytes(attached.buffer[:2]) == b"ok"


def test_a_view_left_on_it_does_not_leave_the_file(directory: Path) -> None:
    segment = Segment.create(64)
    view = memoryview(segment.buffer)
    with pytest.raises(BufferError):
        segment.close()
    assert list(directory.iterdir()) == []
    view.release()
    segment.close()


def test_a_living_processes_segment_is_not_reclaimed(
    directory: Path, creator: tuple[subprocess.Popen[str], str]
) -> None:
    process, name = creator
    assert reclaim_stale() == 0
    with Segment.attach(name, 4096) as attached:
        assert bytes(attached.buffer[:5]) == b"hello"
    assert reclaim_stale() == 0, "an attach and a close must not take the creator's lock away"
    process.communicate("", timeout=10)
    assert process.returncode == 0
    assert list(directory.iterdir()) == []


def test_a_killed_processes_segment_is_reclaimed(directory: Path, creator: tuple[subprocess.Popen[str], str]) -> None:
    process, name = creator
    other = directory / "not-a-segment"
    other.touch()
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    with Segment.attach(name, 4096) as attached, Segment.create(16) as live:
        assert reclaim_stale() == 1
        assert bytes(attached.buffer[:5]) == b"hello", "whoever has it mapped keeps it"
        assert {path.name for path in directory.iterdir()} == {other.name, live.name}
    assert reclaim_stale() == 0


def test_reclaim_without_the_directory_finds_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "DIRECTORY", directory / "absent")
    assert reclaim_stale() == 0
    assert not available()


def test_a_segment_is_kept_between_uses(directory: Path) -> None:
    kept = KeptSegment()
    with kept.lend(4096) as first, kept.lend(4096) as second:
        assert second.name != first.name, "one that is in use is not given out again"
        names = {first.name, second.name}
    assert len(list(directory.iterdir())) == 1
    with kept.lend(100) as again:
        assert again.name in names
    with kept.lend(8192) as larger:
        assert larger.name not in names
        assert larger.num_bytes == 8192
        assert len(list(directory.iterdir())) == 1
    kept.close()
    assert not list(directory.iterdir())
    with kept.lend(4096):
        assert len(list(directory.iterdir())) == 1
    assert not list(directory.iterdir()), "nothing is kept any more"


def test_a_kept_segment_that_was_removed_is_made_anew(directory: Path) -> None:
    kept = KeptSegment()
    with kept.lend(4096) as first:
        pass
    (directory / first.name).unlink()
    with kept.lend(4096) as second:
        assert [path.name for path in directory.iterdir()] == [second.name]
    kept.close()


def test_a_fork_does_not_remove_what_it_inherits(directory: Path) -> None:
    kept = KeptSegment()
    with kept.lend(4096) as segment:
        pass
    child = os.fork()
    if not child:
        kept.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert [path.name for path in directory.iterdir()] == [segment.name]
    kept.close()
    assert not list(directory.iterdir())


def test_a_kept_segment_goes_with_its_owner(directory: Path) -> None:
    kept = KeptSegment()
    with kept.lend(4096):
        pass
    assert list(directory.iterdir())
    del kept
    assert not list(directory.iterdir())
