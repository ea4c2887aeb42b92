"""A daemon over the fake engine, shared by the tests that leave it as it was, and run directories of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rolloutd import RolloutClient
from rolloutd.serve.spawn import Daemon, start_daemon

FACTORY = "tests.fakes:FakeEngine"

StartFake = Callable[..., Daemon]


@pytest.fixture(scope="session", autouse=True)
def own_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sockets of tests do not lie among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("run")
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        yield directory / "rolloutd"


@pytest.fixture(scope="session")
def daemon(own_run_dir: Path) -> Iterator[Daemon]:
    with start_daemon({"model": "fake"}, factory=FACTORY) as daemon:
        yield daemon


@pytest.fixture
def start_fake(own_run_dir: Path) -> Iterator[StartFake]:
    """`start_fake(model="fake", **server options)` starts a daemon that ends with the test."""
    started: list[Daemon] = []

    def start(model: str = "fake", **options: Any) -> Daemon:
        started.append(start_daemon({"model": model}, options, factory=FACTORY))
        return started[-1]

    yield start
    for one in started:
        one.stop(1.0)


@pytest.fixture
def client(daemon: Daemon) -> Iterator[RolloutClient]:
    with RolloutClient(daemon.address, timeout=10.0) as client:
        yield client
