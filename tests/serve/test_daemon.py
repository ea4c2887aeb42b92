"""The real daemon and client over the fake engine: answers, bad input, streaming, control, access."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rolloutd import AsyncRolloutClient, RolloutClient, SamplingParams
from rolloutd.errors import (
    AuthRequired,
    ConfigError,
    EngineLoading,
    InsecureBind,
    InternalError,
    MaxModelLen,
    ModelUnsupported,
    NoListener,
    RequestError,
    RolloutdError,
    TokenOutOfRange,
    TooManyClients,
)
from rolloutd.serve.rundir import Connection
from rolloutd.serve.spawn import Daemon, start_daemon
from rolloutd.weights.tensors import bytes_of
from tests.fakes import Orders, expected_tokens, weights_digest

StartFake = Callable[..., Daemon]


def test_answers_come_in_order_with_every_sample(client: RolloutClient) -> None:
    prompts = [[i, i + 1] for i in range(1, 20)]
    outputs = client.generate(prompts, SamplingParams(n=3, max_tokens=5, seed=7))
    assert [output.prompt_token_ids for output in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        assert [completion.index for completion in output.outputs] == [0, 1, 2]
        for completion in output.outputs:
            assert completion.token_ids == expected_tokens("checkpoint", prompt, 7, completion.index, 5)
            assert completion.logprobs == [-1.0] * 5
            assert completion.sampling_logprobs == [-0.5] * 5
            assert completion.weight_versions == [0] * 5


def test_each_prompt_may_have_its_own_parameters(client: RolloutClient) -> None:
    params = [SamplingParams(max_tokens=i + 1) for i in range(4)]
    outputs = client.generate([[5]] * 4, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4]
    assert client.generate([], SamplingParams()) == []


def test_text_is_tokenised_by_the_daemon(client: RolloutClient) -> None:
    output = client.generate("abc", SamplingParams(max_tokens=2))[0]
    assert output.prompt_token_ids == [97, 98, 99]


def test_completions_stream_as_they_finish(client: RolloutClient) -> None:
    params = [SamplingParams(max_tokens=40), SamplingParams(max_tokens=1), SamplingParams(max_tokens=20)]
    order = [index for index, _ in client.stream([[Orders.SLOW], [2], [3]], params)]
    assert order == [1, 2, 0]


def test_leaving_a_stream_cancels_the_rest(client: RolloutClient) -> None:
    for _ in client.stream([[Orders.SLOW], [2]], [SamplingParams(max_tokens=10_000), SamplingParams(max_tokens=1)]):
        break
    assert_within(5.0, lambda: client.stats().num_running == 0)


def assert_within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def test_the_async_client_runs_calls_side_by_side(daemon: Daemon) -> None:
    async def run() -> list[int]:
        async with AsyncRolloutClient(daemon.address) as client:
            calls = [client.generate([[i]], SamplingParams(max_tokens=i)) for i in range(1, 6)]
            results = await asyncio.gather(*calls)
            streamed = [c async for _, c in client.stream([[1], [2]], SamplingParams(max_tokens=2))]
            assert len(streamed) == 2
            return [len(result[0].outputs[0].token_ids) for result in results]

    assert asyncio.run(run()) == [1, 2, 3, 4, 5]


def test_several_threads_share_a_client(client: RolloutClient) -> None:
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        results[i] = client.generate([[i]], SamplingParams(max_tokens=4))[0].outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert results == {i: expected_tokens("checkpoint", [i], 0, 0, 4) for i in range(1, 9)}


BAD: list[tuple[Any, dict[str, Any], type[RolloutdError], str]] = [
    ([1] * 99_990, {"max_tokens": 20}, MaxModelLen, "max_model_len 100000"),
    ([], {}, RequestError, "empty"),
    ([1, 1000], {}, TokenOutOfRange, "1000"),
    ([1, -5], {}, TokenOutOfRange, "-5"),
    ("", {}, RequestError, "empty"),
]


@pytest.mark.parametrize(("prompt", "params", "error", "words"), BAD)
def test_a_bad_request_fails_alone_within_a_second(
    daemon: Daemon, client: RolloutClient, prompt: Any, params: dict[str, Any], error: type[RolloutdError], words: str
) -> None:
    with RolloutClient(daemon.address) as other:
        good: list[Any] = []
        worker = threading.Thread(
            target=lambda: good.extend(other.generate([[Orders.SLOW]], SamplingParams(max_tokens=10)))
        )
        worker.start()
        started = time.monotonic()
        with pytest.raises(error, match=words):
            client.generate([[7], prompt], SamplingParams(**{"max_tokens": 5, **params}))
        assert time.monotonic() - started < 1.0
        worker.join(10.0)
    assert len(good[0].outputs[0].token_ids) == 10


@pytest.mark.parametrize(
    "values",
    [{"n": 0}, {"n": 10**9}, {"temperature": float("nan")}, {"temprature": 1.0}, {"top_k": "many"}],
    ids=["n=0", "n=10^9", "NaN", "unknown", "type"],
)
def test_parameters_are_checked_by_the_daemon_too(daemon: Daemon, values: dict[str, Any]) -> None:
    """A client that does not check: the message is made by hand."""
    from rolloutd.serve import protocol as wire

    async def send() -> wire.Message:
        async with AsyncRolloutClient(daemon.address) as client:
            message = wire.Generate(items=[wire.PromptItem(request_id="00", num_ids=1)], params=[values])
            async with client._link.open_call(message, [b"\1\0\0\0"]) as queue:
                answer, _ = await asyncio.wait_for(queue.get(), 1.0)
                return answer

    answer = asyncio.run(send())
    assert isinstance(answer, wire.Failed)
    assert answer.code == "INVALID_REQUEST"
    assert answer.request_id == "00"
    assert next(iter(values)) in answer.message


def test_the_same_id_is_answered_once_and_another_content_is_refused(daemon: Daemon) -> None:
    from rolloutd.serve import protocol as wire
    from rolloutd.serve.arrays import split_finished

    async def run() -> None:
        async with AsyncRolloutClient(daemon.address) as client:
            before = (await client.stats()).num_finished

            async def send(token: bytes) -> wire.Message:
                items = [wire.PromptItem(request_id="aa" * 16, num_ids=1)]
                message = wire.Generate(items=items, params=[SamplingParams(n=2, max_tokens=3).to_dict()])
                async with client._link.open_call(message, [token + b"\0\0\0"]) as queue:
                    answer, frames = await asyncio.wait_for(queue.get(), 2.0)
                    if isinstance(answer, wire.Completions):
                        assert len(list(split_finished(answer.items, frames))) == 2
                    return answer

            assert isinstance(await send(b"\5"), wire.Completions)
            assert isinstance(await send(b"\5"), wire.Completions)
            assert (await client.stats()).num_finished == before + 2, "the retry was computed again"
            refused = await send(b"\6")
            assert isinstance(refused, wire.Failed)
            assert refused.code == "ID_REUSE"

    asyncio.run(run())


def test_a_failing_step_fails_its_requests_and_no_others(client: RolloutClient) -> None:
    with pytest.raises(InternalError, match="daemon's log"):
        client.generate([[Orders.RAISE]], SamplingParams(max_tokens=3))
    assert client.generate([[3]], SamplingParams(max_tokens=2))[0].outputs[0].token_ids


def test_health_answers_while_the_model_loads(own_run_dir: Path) -> None:
    started = time.monotonic()
    with (
        start_daemon({"model": "slow-to-load"}, factory="tests.fakes:FakeEngine") as daemon,
        RolloutClient(daemon.address) as client,
    ):
        health = client.health()
        assert time.monotonic() - started < 1.0
        assert health.state == "loading"
        assert health.info is None
        with pytest.raises(EngineLoading):
            client.sleep()
        output = client.generate([[4]], SamplingParams(max_tokens=2))[0]  # waits for the model
        assert len(output.outputs[0].token_ids) == 2
        assert client.health().state == "ready"
        with pytest.raises(MaxModelLen):
            client.generate([[1] * 99_999], SamplingParams(max_tokens=5))


def test_a_model_that_cannot_load_is_named(start_fake: StartFake) -> None:
    daemon = start_fake("unsupported")
    with pytest.raises(ModelUnsupported, match="FakeForCausalLM"), RolloutClient(daemon.address) as client:
        client.wait_ready(10.0)
    assert_within(5.0, lambda: not daemon.is_running)
    assert daemon.stop() == 3


def test_pause_holds_new_requests(daemon: Daemon, client: RolloutClient) -> None:
    client.pause()
    try:
        assert client.health().state == "paused"
        results: list[Any] = []
        worker = threading.Thread(target=lambda: results.extend(client.generate([[5]], SamplingParams(max_tokens=2))))
        worker.start()
        time.sleep(0.3)
        assert not results
    finally:
        client.resume()
    worker.join(5.0)
    assert len(results) == 1


def test_abort_returns_what_there_is(client: RolloutClient) -> None:
    results: list[Any] = []
    params = SamplingParams(n=2, max_tokens=10_000)
    worker = threading.Thread(target=lambda: results.extend(client.generate([[Orders.SLOW]], params)))
    worker.start()
    assert_within(5.0, lambda: client.stats().num_running == 1)
    assert client.abort() == 1
    worker.join(5.0)
    assert [completion.finish_reason for completion in results[0].outputs] == ["abort"] * 2


def test_sleep_needs_an_idle_engine(client: RolloutClient) -> None:
    client.sleep()
    client.wake_up()
    assert client.generate([[5]], SamplingParams(max_tokens=1))


@pytest.mark.parametrize("transport", ["inline", "shared_memory", "auto"])
def test_weights_arrive_bit_for_bit(start_fake: StartFake, transport: Any) -> None:
    tensors = {
        "module.a": torch.randn(300, 7),
        "b": torch.randn(64, 64).to(torch.bfloat16),
        "c": torch.randn(9, 5).t(),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(1.5),
    }
    landed = {name.removeprefix("module."): bytes(bytes_of(tensor)) for name, tensor in tensors.items()}
    with RolloutClient(start_fake().address) as client:
        update = client.update_weights(tensors.items(), transport=transport)
        assert update.version == 1
        assert update.num_tensors == 5
        assert update.num_bytes == sum(len(data) for data in landed.values())
        tokens = client.generate([[9]], SamplingParams(max_tokens=3))[0].outputs[0]
        assert tokens.token_ids == expected_tokens(weights_digest(landed), [9], 0, 0, 3)
        assert tokens.weight_versions == [1, 1, 1]
        assert client.health().weight_version == 1
        assert client.update_weights(iter(tensors.items()), transport=transport).digest == update.digest
    assert not list(Path("/dev/shm").glob("rolloutd-*"))


def test_a_tensor_larger_than_a_bucket_is_cut(start_fake: StartFake, monkeypatch: pytest.MonkeyPatch) -> None:
    from rolloutd.serve import push_steps

    monkeypatch.setattr(push_steps, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(push_steps, "INLINE_BYTES", 700)
    tensors = {"a": torch.randn(1000), "b": torch.randn(3), "c": torch.randn(700)}
    expected = weights_digest({name: bytes(bytes_of(tensor)) for name, tensor in tensors.items()})
    with RolloutClient(start_fake().address) as client:
        for transport in ("inline", "shared_memory"):
            client.update_weights(tensors, transport=transport)  # type: ignore[arg-type]
            tokens = client.generate([[9]], SamplingParams(max_tokens=3))[0].outputs[0].token_ids
            assert tokens == expected_tokens(expected, [9], 0, 0, 3)


def test_a_failing_push_leaves_the_old_weights(client: RolloutClient) -> None:
    def tensors() -> Any:
        yield "a", torch.zeros(3)
        raise RuntimeError("the trainer failed")

    version = client.health().weight_version
    with pytest.raises(RuntimeError, match="the trainer failed"):
        client.update_weights(tensors())
    assert client.health().weight_version == version
    assert client.generate([[9]], SamplingParams(max_tokens=1))[0].outputs[0].weight_versions == [version]
    with pytest.raises(RolloutdError, match="int32"):
        client.update_weights({"a": torch.zeros(3, dtype=torch.int32)})


def test_only_the_owner_can_connect(daemon: Daemon, own_run_dir: Path) -> None:
    connection = Connection.read(Path(daemon.address))
    path = Path(connection.address.removeprefix("ipc://"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(daemon.address).stat().st_mode) == 0o600
    assert path.parent == own_run_dir
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in own_run_dir.iterdir())


def test_no_tcp_listener_unless_asked(daemon: Daemon) -> None:
    engine_pid = RolloutClient(daemon.address)
    with engine_pid as client:
        pids = {daemon.pid, client.health().engine_pid}
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        rows = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        listening += [row.split()[9] for row in rows if row.split()[3] == "0A"]
    assert not inodes & set(listening)


def test_tcp_asks_for_keys(start_fake: StartFake) -> None:
    daemon = start_fake(listen="tcp://127.0.0.1:0")
    connection = Connection.read(Path(daemon.address))
    assert connection.address.startswith("tcp://127.0.0.1:")
    for address, token in ((daemon.address, None), (connection.address, None), (connection.address, connection.token)):
        with RolloutClient(address, token=token) as client:
            assert client.generate([[3]], SamplingParams(max_tokens=1))
    from rolloutd.serve.sockets import new_keys

    public, secret = new_keys()
    with pytest.raises(AuthRequired, match="connection file"):
        RolloutClient(connection.address, token=f"{connection.server_key} {public} {secret}", connect_timeout=1.0)
    with pytest.raises(ConfigError, match="token"):
        RolloutClient(connection.address, token="nonsense")


def test_nothing_listens(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for address in (f"ipc://{tmp_path}/none.sock", f"tcp://127.0.0.1:{port}", str(tmp_path / "none.json")):
        started = time.monotonic()
        with pytest.raises(NoListener):
            RolloutClient(address)
        assert time.monotonic() - started < 1.0
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="not a rolloutd connection file"):
        RolloutClient(str(tmp_path / "other.json"))


def test_a_remote_listener_is_refused() -> None:
    with pytest.raises(InsecureBind, match="--allow-remote"):
        start_daemon({"model": "fake"}, {"listen": "tcp://0.0.0.0:0"}, factory="tests.fakes:FakeEngine")


def test_one_client_too_many_is_told(start_fake: StartFake) -> None:
    daemon = start_fake(max_clients=1)
    with RolloutClient(daemon.address), pytest.raises(TooManyClients, match="--max-clients"):
        RolloutClient(daemon.address)


def test_a_closed_client_says_so(daemon: Daemon) -> None:
    client = RolloutClient(daemon.address)
    client.close()
    client.close()
    with pytest.raises(RequestError, match="closed"):
        client.health()
