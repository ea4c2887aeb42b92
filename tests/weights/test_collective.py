"""The channel between two processes: bytes in order, and a named error wherever the other side is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rolloutd.errors import ConfigError, RolloutdError, TransportFailed
from rolloutd.weights.collective import Channel


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


def pair(timeout_s: float = 5.0) -> tuple[Channel, Channel]:
    trainer = Channel.host("127.0.0.1", timeout_s=timeout_s)
    _, daemon = side_by_side(trainer.connect, lambda: Channel.join(trainer.meeting, timeout_s=timeout_s))
    assert isinstance(daemon, Channel)
    return trainer, daemon


def test_bytes_arrive_in_order() -> None:
    sent = [bytes([i]) * (1 + 1000 * i) for i in range(20)]
    trainer, daemon = pair()

    def send() -> None:
        for data in sent:
            trainer.send(memoryview(bytearray(data)))

    def receive() -> list[bytes]:
        rooms = [bytearray(len(data)) for data in sent]
        for room in rooms:
            daemon.receive(memoryview(room))
        return [bytes(room) for room in rooms]

    with trainer, daemon:
        assert side_by_side(send, receive)[1] == sent


def test_who_hangs_up_ends_the_others_wait() -> None:
    trainer, daemon = pair()
    started = time.monotonic()
    (error, _) = side_by_side(lambda: daemon.receive(memoryview(bytearray(8))), trainer.close)
    assert isinstance(error, TransportFailed)
    assert "the trainer does not send" in str(error)
    assert time.monotonic() - started < 5.0
    daemon.close()


def test_nobody_comes() -> None:
    started = time.monotonic()
    with Channel.host("127.0.0.1", timeout_s=1.0) as trainer:
        with pytest.raises(TransportFailed, match="the other side did not come"):
            trainer.connect()
        elsewhere = replace(trainer.meeting, name="another")
        with pytest.raises(TransportFailed, match="the other side did not come"):
            Channel.join(elsewhere, timeout_s=1.0)
    with pytest.raises(TransportFailed, match=r"the trainer cannot be reached at 127\.0\.0\.1:1 "):
        Channel.join(replace(trainer.meeting, port=1), timeout_s=1.0)
    assert time.monotonic() - started < 15.0


def test_nothing_is_sent() -> None:
    trainer, daemon = pair(timeout_s=1.0)
    started = time.monotonic()
    with trainer, daemon, pytest.raises(TransportFailed, match="push again"):
        daemon.receive(memoryview(bytearray(8)))
    assert time.monotonic() - started < 10.0


def test_an_address_of_another_host_is_named() -> None:
    with (
        pytest.raises((ConfigError, TransportFailed), match=r"203\.0\.113\.1"),
        Channel.host("203.0.113.1", timeout_s=1.0) as trainer,
    ):
        trainer.connect()
