"""A client's connection: last words, another protocol, errors without a call, places that become free, pauses."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from rolloutd import AsyncRolloutClient, RolloutClient, SamplingParams
from rolloutd.errors import AuthRequired, MessageTooLarge, ProtocolError, ProtocolMismatch, RequestError
from rolloutd.serve import protocol as wire
from rolloutd.serve.rundir import Connection
from rolloutd.serve.sockets import configure, new_keys
from rolloutd.serve.spawn import Daemon
from tests.fakes import Orders

StartFake = Callable[..., Daemon]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[str, zmq.Socket[bytes]]]:
    """A ROUTER that a test plays the daemon with."""
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    configure(socket, 1 << 20)
    address = f"ipc://{tmp_path}/s"
    socket.bind(address)
    yield address, socket
    socket.close()
    context.term()


def test_what_arrived_before_a_hang_up_is_read_after_it(listener: tuple[str, zmq.Socket[bytes]]) -> None:
    """Why a daemon ends is its last message; a client that was busy meanwhile must still find it."""
    address, router = listener
    context = zmq.Context()
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    configure(dealer, 1 << 20)
    dealer.connect(address)
    dealer.send(b"question")
    assert router.poll(2_000)
    routing_id, _ = router.recv_multipart()
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    router.send_multipart([routing_id, b"last words"])
    router.close(linger=1_000)
    assert monitor.poll(2_000), "the hang-up was not seen"
    assert dealer.poll(2_000)
    assert dealer.recv() == b"last words"
    dealer.disable_monitor()
    dealer.close()
    context.destroy(linger=0)


def answer_with(router: zmq.Socket[bytes], message: wire.Message, major: int) -> threading.Thread:
    """Answer the next question so, in a thread."""

    def answer() -> None:
        if router.poll(5_000):
            routing_id, *_ = router.recv_multipart()
            head = bytearray(wire.encode(message)[0])
            head[4] = major
            router.send_multipart([routing_id, bytes(head)])

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_a_daemon_of_another_protocol_is_named_at_once(listener: tuple[str, zmq.Socket[bytes]]) -> None:
    address, router = listener
    thread = answer_with(router, wire.Failed(code="PROTOCOL_MISMATCH", message="theirs"), major=9)
    started = time.monotonic()
    with pytest.raises(ProtocolMismatch, match=rf"protocol 9\.{wire.MINOR}, this side 1\.{wire.MINOR}.*pip"):
        RolloutClient(address)
    assert time.monotonic() - started < 1.0
    thread.join(5.0)


def test_an_error_that_names_no_call_ends_the_call(listener: tuple[str, zmq.Socket[bytes]]) -> None:
    """A daemon that cannot read a message cannot say which one it was."""
    address, router = listener
    thread = answer_with(router, wire.Failed(code="MALFORMED", message="unreadable"), major=wire.MAJOR)
    started = time.monotonic()
    with pytest.raises(ProtocolError, match="unreadable"):
        RolloutClient(address)
    assert time.monotonic() - started < 1.0
    thread.join(5.0)


def test_a_client_of_another_protocol_is_told(daemon: Daemon) -> None:
    context = zmq.Context()
    peer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    configure(peer, 1 << 20)
    peer.connect(Connection.read(Path(daemon.address)).address)
    head = bytearray(wire.encode(wire.Hello(version="9"))[0])
    head[4] = 9
    peer.send(bytes(head))
    assert peer.poll(1_000)
    answer, _ = wire.decode(peer.recv_multipart())
    assert isinstance(answer, wire.Failed)
    assert answer.code == "PROTOCOL_MISMATCH"
    assert f"9.{wire.MINOR}" in answer.message
    peer.close()
    context.term()


def test_a_wrong_key_is_refused_without_waiting_for_a_deadline(start_fake: StartFake) -> None:
    connection = Connection.read(Path(start_fake(listen="tcp://127.0.0.1:0").address))
    public, secret = new_keys()
    started = time.monotonic()
    with pytest.raises(AuthRequired, match="connection file"):
        RolloutClient(connection.address, token=f"{connection.server_key} {public} {secret}", connect_timeout=30.0)
    assert time.monotonic() - started < 2.0


def test_a_client_that_closes_leaves_its_place_to_others(start_fake: StartFake) -> None:
    daemon = start_fake(max_clients=2)
    for _ in range(20):
        with RolloutClient(daemon.address) as client:
            assert client.health().pid == daemon.pid


def test_closing_cancels_what_still_runs(daemon: Daemon, client: RolloutClient) -> None:
    async def leave() -> None:
        async with AsyncRolloutClient(daemon.address) as other:
            call = asyncio.create_task(other.generate([[Orders.SLOW]], SamplingParams(max_tokens=50_000)))
            await asyncio.sleep(0.3)
            assert (await other.stats()).num_running == 1
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    asyncio.run(leave())
    deadline = time.monotonic() + 2.0
    while client.stats().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_pause_ends_with_its_client(daemon: Daemon, client: RolloutClient, root: Path) -> None:
    """A trainer that dies in a pause must not leave a daemon that takes requests and never answers."""
    with RolloutClient(daemon.address) as other:
        other.pause()
        assert client.health().state == "paused"
    assert client.generate([[5]], SamplingParams(max_tokens=1))
    assert client.health().state == "ready"
    script = (
        "import os, sys\n"
        "from rolloutd import RolloutClient\n"
        "RolloutClient(sys.argv[1]).pause()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, daemon.address], cwd=root, timeout=60, check=False)
    assert done.returncode == -9
    started = time.monotonic()
    assert client.generate([[5]], SamplingParams(max_tokens=1))
    assert time.monotonic() - started < 4.0


def test_a_message_over_the_limit_is_refused_before_it_is_sent(start_fake: StartFake) -> None:
    with RolloutClient(start_fake(max_message_bytes=1 << 16).address) as client:
        with pytest.raises(MessageTooLarge, match="--max-message-bytes 65536"):
            client.generate([[1] * 20_000], SamplingParams(max_tokens=1))
        # Requests that wait go to the engine together: that message may be larger than any client's.
        client.pause()
        results: list[int] = []
        workers = [
            threading.Thread(
                target=lambda: results.append(len(client.generate([[1] * 12_000], SamplingParams(max_tokens=1)))),
                daemon=True,
            )
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        time.sleep(0.3)
        client.resume()
        for worker in workers:
            worker.join(10.0)
        assert results == [1] * 4


def test_a_failed_connect_leaves_nothing_behind(tmp_path: Path, start_fake: StartFake) -> None:
    daemon = start_fake(max_clients=1)

    async def refused() -> int:
        client = AsyncRolloutClient(daemon.address)
        with pytest.raises(Exception, match="--max-clients"):
            await client.connect()
        return len(asyncio.all_tasks())

    with RolloutClient(daemon.address):
        descriptors = len(os.listdir("/proc/self/fd"))
        assert asyncio.run(refused()) == 1, "only the test's own task is left"
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_request_id_has_a_length(daemon: Daemon) -> None:
    async def send() -> wire.Message:
        async with AsyncRolloutClient(daemon.address) as client:
            message = wire.Generate(
                items=[wire.PromptItem(request_id="a" * 65, num_ids=1)], params=[SamplingParams().to_dict()]
            )
            async with client._link.open_call(message, [b"\1\0\0\0"]) as queue:
                return (await asyncio.wait_for(queue.get(), 1.0))[0]

    answer = asyncio.run(send())
    assert isinstance(answer, wire.Failed)
    assert answer.code == "MALFORMED"


def test_a_closed_async_client_connects_anew(daemon: Daemon) -> None:
    async def twice() -> list[str]:
        client = AsyncRolloutClient(daemon.address)
        states = []
        for _ in range(2):
            states.append((await client.health()).state)
            await client.close()
        with pytest.raises(RequestError):
            await client.generate([[]])
        await client.close()
        return states

    assert asyncio.run(twice()) == ["ready", "ready"]
