"""The channel between two processes: bytes in order, and a named error wherever the other side is missing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from rolloutd.errors import ConfigError, RolloutdError, TransportFailed
from rolloutd.weights import collective
from rolloutd.weights.collective import Channel
from tests.cpu_as_gpu import gloo_as_nccl


def side_by_side(*works: Callable[[], Any]) -> list[Any]:
    """Run each in a thread; return what each gave or raised."""
    results: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        try:
            results[i] = works[i]()
        except RolloutdError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive(), "a wait without an end"
    return results


@pytest.fixture(params=["gloo", "nccl"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device | None:
    """Where bytes are sent from: the host, or a GPU, in whose place is a CPU and gloo."""
    if request.param == "gloo":
        return None
    gloo_as_nccl(monkeypatch)
    return torch.device("cpu")


def pair(device: torch.device | None, timeout_s: float = 5.0) -> tuple[Channel, Channel]:
    trainer = Channel.host("127.0.0.1", device=device, timeout_s=timeout_s)
    _, daemon = side_by_side(trainer.connect, lambda: Channel.join(trainer.meeting, timeout_s=timeout_s))
    assert isinstance(daemon, Channel)
    return trainer, daemon


def test_bytes_arrive_in_order(device: torch.device | None) -> None:
    sent = [bytes([i]) * (1 + 1000 * i) for i in range(20)]
    trainer, daemon = pair(device)

    def send() -> None:
        for data in sent:
            memory = memoryview(bytearray(data))
            trainer.send(memory if device is None else torch.frombuffer(memory, dtype=torch.uint8))

    def receive() -> list[bytes]:
        arrived = []
        for data in sent:
            memory = daemon.receive(len(data))
            assert isinstance(memory, memoryview if device is None else torch.Tensor)
            arrived.append(bytes(memory.tolist()))
        return arrived

    with trainer, daemon:
        assert side_by_side(send, receive)[1] == sent


def test_who_hangs_up_ends_the_others_wait(device: torch.device | None) -> None:
    trainer, daemon = pair(device)
    started = time.monotonic()
    (error, _) = side_by_side(lambda: daemon.receive(8), trainer.close)
    assert isinstance(error, TransportFailed)
    assert "the trainer does not send" in str(error)
    assert time.monotonic() - started < 5.0
    daemon.close()


def test_nobody_comes(device: torch.device | None) -> None:
    started = time.monotonic()
    with Channel.host("127.0.0.1", device=device, timeout_s=1.0) as trainer:
        with pytest.raises(TransportFailed, match="the other side did not come"):
            trainer.connect()
        elsewhere = replace(trainer.meeting, name="another")
        with pytest.raises(TransportFailed, match="the other side did not come"):
            Channel.join(elsewhere, timeout_s=1.0)
    with pytest.raises(TransportFailed, match=r"the trainer cannot be reached at 127\.0\.0\.1:1 "):
        Channel.join(replace(trainer.meeting, port=1), timeout_s=1.0)
    assert time.monotonic() - started < 15.0


def test_nothing_is_sent(device: torch.device | None) -> None:
    trainer, daemon = pair(device, timeout_s=1.0)
    started = time.monotonic()
    with trainer, daemon, pytest.raises(TransportFailed, match="push again"):
        daemon.receive(8)
    assert time.monotonic() - started < 10.0


def test_an_address_of_another_host_is_named() -> None:
    with (
        pytest.raises((ConfigError, TransportFailed), match=r"203\.0\.113\.1"),
        Channel.host("203.0.113.1", timeout_s=1.0) as trainer,
    ):
        trainer.connect()


class Silent:
    """A group of NCCL whose GPUs never find each other; it notes how it was made."""

    Options = SimpleNamespace
    blocking: ClassVar[list[str | None]] = []

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        self.blocking.append(os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))
        assert options._timeout == timedelta(seconds=1.0)
        self.aborted = threading.Event()

    def send(self, tensors: Any, rank: int, tag: int) -> None:
        self.aborted.wait(30.0)
        raise RuntimeError("aborted")

    def abort(self) -> None:
        self.aborted.set()


@pytest.mark.parametrize("before", [None, "0"])
def test_gpus_that_do_not_find_each_other_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Silent, raising=False)
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: True)
    monkeypatch.setattr(Silent, "blocking", [])
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
    started = time.monotonic()
    with Channel.host("127.0.0.1", device=torch.device("cpu"), timeout_s=1.0) as trainer:
        assert trainer.meeting.backend == "nccl"
        with pytest.raises(TransportFailed, match="no greeting in 1 s"):
            trainer.connect()
        group = trainer._group
    assert group.aborted.is_set(), "or a GPU would wait for ever"
    assert time.monotonic() - started < 5.0
    assert Silent.blocking == ["1"], "else a thread of NCCL's ends the process on a timeout"
    assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == before


def test_a_torch_without_nccl_is_named() -> None:
    if dist.is_nccl_available():
        pytest.skip("this torch has it")
    with pytest.raises(ConfigError, match="transport='nccl' needs a torch with nccl at both ends"):
        Channel.host("127.0.0.1", device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="transport='nccl' needs"):
        Channel.join(collective.Meeting("127.0.0.1", 1, "x", "nccl"))
