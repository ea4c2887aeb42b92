"""Bytes that are no message: in process by the hundred thousand, and on the live socket beside good traffic."""

from __future__ import annotations

import dataclasses
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import zmq

from rolloutd import RolloutClient, SamplingParams
from rolloutd.errors import ProtocolError, ProtocolMismatch
from rolloutd.serve import protocol as wire
from rolloutd.serve.arrays import join_finished, split_finished, split_prompts
from rolloutd.serve.rundir import Connection
from rolloutd.serve.sockets import configure
from rolloutd.serve.spawn import Daemon
from tests.fakes import expected_tokens

MESSAGES: list[wire.Message] = [
    wire.Hello(call=1, client="ab", version="0.1.0"),
    wire.Generate(items=[wire.PromptItem(request_id="aa", num_ids=3)], params=[SamplingParams(n=2).to_dict()]),
    wire.WeightsStage(
        update_id="x", items=[wire.StageItem(name="a", dtype="float32", shape=[2, 2], offset=0, num_bytes=16)]
    ),
    wire.WeightsCommit(
        update_id="x",
        digests={"a": 2**64 - 1},
        num_bytes=16,
        scaling={"a": 2.0},
        mode="exact",
        version=None,
        running="keep",
    ),
    wire.Completions(
        items=[
            wire.CompletionItem(
                request_id="aa",
                index=0,
                num_tokens=2,
                finish_reason="stop",
                stop_reason=5,
                text="é",
                is_last=True,
            )
        ]
    ),
    wire.Failed(code="INTERNAL", message="m"),
    wire.BasePlan(parameters=[wire.Parameter(name="w", dtype="float32", shape=[2, 3])]),
    wire.BasePlanned(sizes=[24], places=[(0, 0)], base_version=1),
    wire.BaseToClient(
        share_id="s", memory=[wire.DeviceMemory(gpu="g", num_bytes=24, allocation=b"a", offset=0)], base_version=1
    ),
    wire.BaseToDaemon(share_id="s"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_round_trip(message: wire.Message) -> None:
    decoded, frames = wire.decode(wire.encode(message, [b"abcd"]))
    assert decoded == message
    assert [bytes(frame) for frame in frames] == [b"abcd"]


def test_golden_bytes() -> None:
    """What version 1.0 sends: a later minor version must still read it, and differs in its number alone."""
    golden = bytes.fromhex(
        "524c44310100000084a474797065a548656c6c6fa776657273696f6ea5302e312e30a463616c6c01a6636c69656e74a26162"
    )
    assert wire.encode(MESSAGES[0]) == [golden[:6] + bytes([wire.MINOR, 0]) + golden[8:]]
    assert wire.decode([golden])[0] == MESSAGES[0]


def test_another_version_is_named() -> None:
    head = bytearray(wire.encode(MESSAGES[0])[0])
    head[4] = 9
    with pytest.raises(ProtocolMismatch, match=rf"9\.{wire.MINOR}.*1\.{wire.MINOR}.*pip install"):
        wire.decode([bytes(head)])


def test_mutated_messages_are_refused_or_well_formed() -> None:
    rng = random.Random(0)
    refused = 0
    originals = [bytes(wire.encode(message)[0]) for message in MESSAGES]
    for _ in range(30_000):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randrange(1, 6)):
            match rng.randrange(4):
                case 0:
                    data[rng.randrange(len(data))] = rng.randrange(256)
                case 1:
                    del data[rng.randrange(len(data)) :]
                case 2:
                    data.insert(rng.randrange(len(data) + 1), rng.randrange(256))
                case _:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            if not data:
                data = bytearray(b"\0")
        try:
            wire.decode([bytes(data)])
        except ProtocolError:
            refused += 1
    assert refused > 15_000


@pytest.mark.parametrize(
    "nesting", [b"\x91" * 100_000, b"\x81" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_nested_and_oversized_headers_are_refused(nesting: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.decode([b"RLD1\x01\0\0\0" + nesting])


def test_frames_must_be_as_long_as_the_header_says() -> None:
    items = [wire.PromptItem(request_id="a", num_ids=3)]
    for frames in ([], [memoryview(b"\0" * 8)], [memoryview(b"\0" * 12)] * 2):
        with pytest.raises(ProtocolError):
            split_prompts(items, frames)
    with pytest.raises(ProtocolError):
        split_prompts([wire.PromptItem(request_id="a", num_ids=-1)], [memoryview(b"")])
    head, columns = join_finished([])
    assert list(split_finished(head, [memoryview(c) for c in columns])) == []
    item = MESSAGES[4]
    assert isinstance(item, wire.Completions)
    with pytest.raises(ProtocolError):
        list(split_finished(item.items, [memoryview(b"")] * 6))


VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, float("inf"), float("nan")),
    *("", "x" * 1000, b"\xff", [], [1], [None], ["a"], {}, {"a": [1]}, [float("nan")], [2**63], [b"x"]),
    *({5: 1.0}, {"5": -1}, {-1: 0.0}, {b"5": 1.0}, {2**63: 1.0}, {1.5: 1.0}, {7: None}, dict.fromkeys(range(2000), 1)),
]


TOP = {"index": 0, "finish_reason": "stop", "stop_reason": None, "text": "", "is_last": True}


@pytest.mark.parametrize(
    ("item", "sizes"),
    [
        ({"num_tokens": 2, "num_top": 3}, [8, 8, 8, 16, 0, 0]),
        ({"num_tokens": 2, "num_top": 3}, [8, 8, 8, 16, 0, 0, 24, 20, 0, 0]),
        ({"num_tokens": 2}, [8, 8, 8, 16, 0, 0, 0, 0, 0, 0]),
        ({"num_tokens": 0, "num_top": -3}, [0] * 10),
        ({"num_tokens": 0, "num_top": 21}, [0] * 10),
        ({"num_tokens": 0, "num_prompt_top": 1 << 40}, [0] * 10),
        ({"num_tokens": -1, "num_top": -1}, [-4 % 4, 0, 0, 0, 0, 0, 4, 4, 0, 0]),
        ({"num_tokens": 0, "num_prompt_logprobs": 1, "num_prompt_top": 2}, [0, 0, 0, 0, 0, 4, 0, 0, 8, 4]),
    ],
)
def test_top_logprobs_must_be_as_long_as_the_header_says(item: dict[str, int], sizes: list[int]) -> None:
    items = [wire.CompletionItem(request_id="a", **TOP, **item)]  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="frames"):
        list(split_finished(items, [memoryview(bytes(size)) for size in sizes]))


def hostile(rng: random.Random) -> tuple[wire.Message, list[wire.Frame]]:
    """Return a message that can be read and makes no sense."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    params = [{rng.choice([*names, "x"]): rng.choice(VALUES) for _ in range(rng.randrange(4))} for _ in range(2)]
    items = [
        wire.PromptItem(
            request_id=rng.choice(["", "a", "b" * 100, f"{rng.random()}"]),
            text=rng.choice([None, None, "", "ab"]),
            num_ids=rng.choice([-1, 0, 1, 2, 1 << 40]),
            params=rng.choice([-1, 0, 1, 2, 1 << 40]),
        )
        for _ in range(rng.randrange(3))
    ]
    message: wire.Message = rng.choice(
        [
            wire.Generate(call=rng.randrange(3), items=items, params=params),
            wire.Abort(request_ids=["", "nobody's"]),
            wire.Submit(items=items, params=params),
            wire.EngineReady(info={}, seconds=0.0),
            wire.Done(value=1 << 60),
            wire.WeightsAbort(update_id="nobody's"),
            wire.Bye(client=rng.choice(["", "somebody"])),
        ]
    )
    length = 4 * sum(max(0, min(item.num_ids, 9)) for item in items)
    return message, [rng.randbytes(rng.choice([length, length, length, 3]))] * rng.choice([1, 1, 1, 0, 2])


def test_messages_that_make_no_sense_harm_nobody(daemon: Daemon) -> None:
    rng = random.Random(2)
    context = zmq.Context()
    peer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    configure(peer, 1 << 30)
    peer.connect(Connection.read(Path(daemon.address)).address)
    with RolloutClient(daemon.address) as client:
        client.wait_ready(20.0)
        before = resident_bytes(daemon.pid)
        for i in range(3_000):
            message, frames = hostile(rng)
            peer.send_multipart(wire.encode(message, frames))
            if i % 20 == 0:
                while peer.poll(0):
                    peer.recv_multipart()
            if i % 300 == 0:
                output = client.generate([[i + 1 if i < 899 else 7]], SamplingParams(max_tokens=3))[0].outputs[0]
                assert len(output.token_ids) == 3
        assert client.health().state == "ready"
        assert resident_bytes(daemon.pid) - before < 64 << 20
    peer.close()
    context.term()


def resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_garbage_on_the_socket_harms_nobody(daemon: Daemon) -> None:
    address = Connection.read(Path(daemon.address)).address
    rng = random.Random(1)
    context = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(address)
    with RolloutClient(daemon.address) as client:
        for i in range(300):
            parts = [rng.randbytes(rng.randrange(0, 60)) for _ in range(rng.randrange(1, 5))]
            if i % 3 == 0:
                parts[0] = bytes(wire.encode(rng.choice(MESSAGES))[0])
            peer.send_multipart(parts)
            if i % 30 == 0:
                output = client.generate([[i + 1]], SamplingParams(max_tokens=3))[0].outputs[0]
                assert output.token_ids == expected_tokens("checkpoint", [i + 1], 0, 0, 3)
        answers = 0
        while peer.poll(300):
            message, _ = wire.decode(peer.recv_multipart())
            answers += isinstance(message, wire.Failed)
        assert answers >= 200
        assert client.health().state == "ready"
    peer.close()
    context.term()
