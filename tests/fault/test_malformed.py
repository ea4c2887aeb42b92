"""Bytes that are no message: in process by the hundred thousand, and on the live socket beside good traffic."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import zmq

from rolloutd import RolloutClient, SamplingParams
from rolloutd.errors import ProtocolError, ProtocolMismatch
from rolloutd.serve import protocol as wire
from rolloutd.serve.arrays import join_finished, pack_finished, split_finished, split_prompts
from rolloutd.serve.rundir import Connection
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
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_round_trip(message: wire.Message) -> None:
    decoded, frames = wire.decode(wire.encode(message, [b"abcd"]))
    assert decoded == message
    assert [bytes(frame) for frame in frames] == [b"abcd"]


def test_golden_bytes() -> None:
    """What version 1.0 sends: a later minor version must still read it."""
    golden = bytes.fromhex(
        "524c44310100000084a474797065a548656c6c6fa776657273696f6ea5302e312e30a463616c6c01a6636c69656e74a26162"
    )
    assert wire.encode(MESSAGES[0]) == [golden]
    assert wire.decode([golden])[0] == MESSAGES[0]


def test_another_version_is_named() -> None:
    head = bytearray(wire.encode(MESSAGES[0])[0])
    head[4] = 9
    with pytest.raises(ProtocolMismatch, match=r"9\.0.*1\.0.*pip install"):
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
    assert pack_finished is not None


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
