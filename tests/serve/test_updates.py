"""Weight updates over the wire: refusals keep their names and the old version, and no update is left open."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rolloutd import LLM, AsyncRolloutClient, RolloutClient, SamplingParams
from rolloutd.engine.sequence import Request
from rolloutd.errors import ConfigError, DigestMismatch, LoraUnsupported, ManifestMismatch, RequestError, UpdateConflict
from rolloutd.outputs import CompletionOutput
from rolloutd.serve import protocol as wire
from rolloutd.serve import push_steps
from rolloutd.serve.spawn import Daemon, start_daemon
from rolloutd.serve.stream import RolloutStream
from rolloutd.weights import shared_memory
from tests.fakes import Orders

Named = list[tuple[str, torch.Tensor]]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
PARAMS = SamplingParams(n=2, max_tokens=4, seed=3, ignore_eos=True)
TRANSPORTS = ["inline", "shared_memory", "collective"]
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen2", tie=True)


@pytest.fixture(scope="module")
def real(own_run_dir: Path, folder: Path) -> Iterator[RolloutClient]:
    """A client of a daemon that serves a real tiny model."""
    with (
        start_daemon({"model": str(folder), "max_num_seqs": 8}) as daemon,
        RolloutClient(daemon.address, timeout=30.0) as client,
    ):
        client.wait_ready(60.0)
        yield client


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The served model as a trainer holds it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def changed(model: Any, seed: int) -> Named:
    """Return the parameters after a step of training, so to say."""
    generator = torch.Generator().manual_seed(seed)
    return [(n, p.detach() + 0.05 * torch.randn(p.shape, generator=generator)) for n, p in model.named_parameters()]


def tokens(source: RolloutClient | LLM) -> list[list[int]]:
    return [c.token_ids for output in source.generate(PROMPTS, PARAMS) for c in output.outputs]


def wrong_shape(named: Named) -> Named:
    return [(name, tensor[:1] if i == 3 else tensor) for i, (name, tensor) in enumerate(named)]


def wrong_name(named: Named) -> Named:
    return [*named, ("model.layers.7.mlp.up_proj.weight", named[0][1])]


def missing(named: Named) -> Named:
    return named[:-1]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("spoil", [wrong_shape, wrong_name, missing])
def test_a_wrong_update_is_named_and_the_old_version_serves_on(
    real: RolloutClient, model: Any, spoil: Callable[[Named], Named], transport: Any
) -> None:
    before, version = tokens(real), real.health().weight_version
    with pytest.raises(ManifestMismatch):
        real.update_weights(spoil(changed(model, 1)), transport=transport)
    assert tokens(real) == before
    assert real.health().weight_version == version
    if shared_memory.available():
        assert len(list(shared_memory.DIRECTORY.glob("rolloutd-*"))) <= 1, "a client keeps one"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_update_with_many_errors_is_not_left_open(
    real: RolloutClient, model: Any, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages run ahead of the first error, and fail too."""
    monkeypatch.setattr(push_steps, "SEGMENT_BYTES", 1 << 14)
    monkeypatch.setattr(push_steps, "INLINE_BYTES", 1 << 12)
    named, version = changed(model, 1), real.health().weight_version
    with pytest.raises(ManifestMismatch, match="shape"):
        real.update_weights([(name, tensor[..., :-1]) for name, tensor in named], transport=transport)
    assert real.update_weights(named, transport=transport).version == version + 1

    async def the_same() -> int:
        async with AsyncRolloutClient(real.address, timeout=30.0) as client:
            if transport == "collective":
                with pytest.raises(ConfigError, match="Use RolloutClient"):
                    await client.update_weights(named, transport=transport)
                return (await client.update_weights(named)).version
            with pytest.raises(ManifestMismatch, match="shape"):
                await client.update_weights([(name, t[..., :-1]) for name, t in named], transport=transport)
            return (await client.update_weights(named, transport=transport)).version

    assert asyncio.run(the_same()) == version + 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bytes_that_change_on_the_way_are_refused(
    real: RolloutClient, model: Any, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, version = tokens(real), real.health().weight_version
    honest = push_steps.PushSteps._commit

    def lying(steps: push_steps.PushSteps) -> wire.WeightsCommit:
        commit = honest(steps)
        name = sorted(commit.digests)[0]
        commit.digests[name] ^= 1
        return commit

    monkeypatch.setattr(push_steps.PushSteps, "_commit", lying)
    with pytest.raises(DigestMismatch, match="Push again"):
        real.update_weights(changed(model, 2), transport=transport)
    assert tokens(real) == before
    assert real.health().weight_version == version


HOSTILE: list[dict[str, Any]] = [
    {"shape": [1 << 40, 1 << 40], "num_bytes": 8},
    {"shape": [-1, -8], "num_bytes": 8},
    {"dtype": "object"},
    {"dtype": "float64"},
    {"offset": -4},
    {"offset": 1 << 62},
    {"name": ""},
    {"name": "../../etc/passwd"},
    {"num_bytes": 1 << 40},
    {"num_bytes": -8},
    {"encoding": "bitmap", "covered": -8},
    {"encoding": "positions", "covered": 1 << 62},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_hostile_pieces_of_weights_are_refused_by_name(real: RolloutClient, change: Any, shared: bool) -> None:
    """Sent by hand: no client of ours would."""
    with shared_memory.Segment.create(4096) as segment:
        item = wire.StageItem(
            **{"name": NORM, "dtype": "float32", "shape": [64], "offset": 0, "num_bytes": 8, **change}
        )
        stage = wire.WeightsStage(update_id="u", items=[item], segment=segment.name if shared else None)
        answers = exchange(
            real,
            (wire.WeightsBegin(update_id="u", kind="full"), []),
            (msgspec.structs.replace(stage, segment_bytes=4096), [] if shared else [b"\0" * 8]),
            (wire.WeightsAbort(update_id="u"), []),
        )
    assert [type(answer) for answer in answers] == [wire.Done, wire.Failed, wire.Done]
    assert isinstance(answers[1], wire.Failed)
    assert answers[1].code in ("MANIFEST_MISMATCH", "MALFORMED")
    assert real.stats().weight_version == real.health().weight_version


@pytest.mark.parametrize("name", ["../shm/rolloutd-x", "/etc/passwd", "rolloutd-" + "a" * 32, ""])
def test_only_a_segment_of_ours_is_opened(real: RolloutClient, name: str) -> None:
    stage = wire.WeightsStage(update_id="u", items=[], segment=name, segment_bytes=4096)
    begin, answer, abort = exchange(
        real,
        (wire.WeightsBegin(update_id="u", kind="full"), []),
        (stage, []),
        (wire.WeightsAbort(update_id="u"), []),
    )
    assert isinstance(begin, wire.Done)
    assert isinstance(abort, wire.Done)
    assert isinstance(answer, wire.Failed)
    assert answer.code == "MANIFEST_MISMATCH"


def exchange(client: RolloutClient, *messages: tuple[wire.Message, list[wire.Frame]]) -> list[wire.Message]:
    """Send messages as they are and return what was answered."""

    async def run() -> list[wire.Message]:
        answers = []
        for message, frames in messages:
            async with client._client._link.open_call(message, frames) as queue:
                answers.append((await asyncio.wait_for(queue.get(), 5.0))[0])
        return answers

    return client._do(run())


def test_a_daemon_that_cannot_open_the_segment_gets_the_bytes_inline(
    real: RolloutClient, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with a /dev/shm of its own."""
    monkeypatch.setattr(shared_memory.Segment, "create", lambda size: Hidden(size))
    named = changed(model, 3)
    with RolloutClient(real.address, timeout=30.0) as client:
        update = client.update_weights(named)
        assert update.num_tensors == len(named)
        with pytest.raises(ManifestMismatch, match="segment"):
            client.update_weights(named, transport="shared_memory")


class Hidden:
    """A segment that lies where the daemon does not look."""

    def __init__(self, num_bytes: int) -> None:
        self.name = "rolloutd-" + "0" * 32
        self.num_bytes = num_bytes
        self.buffer = memoryview(bytearray(num_bytes))

    def close(self) -> None:
        self.buffer.release()


def test_daemon_and_engine_in_process_compute_the_same(real: RolloutClient, folder: Path, model: Any) -> None:
    named = changed(model, 4)
    with LLM(str(folder), max_num_seqs=8) as llm:
        here = llm.update_weights(named)
        there = real.update_weights(dict(named))
        assert here.digest == there.digest
        assert tokens(real) == tokens(llm)
        assert real.score([[1, 2, 3]], [[4, 5]]) == [pytest.approx(llm.score([[1, 2, 3]], [[4, 5]])[0], abs=1e-5)]
        text = real.generate("abc", PARAMS)[0]
        assert text.prompt_token_ids == llm.generate("abc", PARAMS)[0].prompt_token_ids
        assert text.outputs[0].text == llm.generate("abc", PARAMS)[0].outputs[0].text


def test_an_adapter_travels_alone(real: RolloutClient, folder: Path, model: Any) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    real.update_weights(changed(model, 5))
    without = tokens(real)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    named = {name: tensor.detach() for name, tensor in get_peft_model_state_dict(peft).items()}
    for peft_config in (config, config.to_dict()):  # the object, or its dict
        update = real.update_lora(named, peft_config)
        assert update.num_tensors == len(named)
        assert update.num_bytes == sum(tensor.nbytes for tensor in named.values())
        assert tokens(real) != without
    with pytest.raises(LoraUnsupported, match="dora"):
        real.update_lora(named, {**config.to_dict(), "use_dora": True})
    real.update_weights(changed(model, 5))
    assert tokens(real) == without


def test_the_transport_is_logged_with_the_reason(
    real: RolloutClient, model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="rolloutd")
    with RolloutClient(real.address, timeout=30.0) as client:
        for _ in range(2):
            client.update_weights(changed(model, 60))
        assert caplog.text.count("weights travel by=shared_memory reason=the daemon is on this host") == 1
        monkeypatch.setattr(push_steps, "available", lambda: False)
        client.update_weights(changed(model, 60))
        assert "weights travel by=inline reason=/dev/shm cannot be written to" in caplog.text
        client.update_weights(changed(model, 60), transport="collective")
        assert "weights travel by=collective reason=asked for" in caplog.text


@pytest.mark.parametrize("option", ["transport", "running", "mode"])
def test_an_unknown_word_is_named_before_anything_is_sent(client: RolloutClient, option: str) -> None:
    options: dict[str, Any] = {option: "sideways"}
    with pytest.raises(ConfigError, match=f"{option}='sideways'"):
        client.update_lora({}, {"peft_type": "LORA", "r": 1, "lora_alpha": 1}, **options)


def test_versions_only_rise(real: RolloutClient, model: Any) -> None:
    named = changed(model, 6)
    version = real.health().weight_version
    assert real.update_weights(named, version + 5).version == version + 5
    with pytest.raises(ConfigError, match="not above"):
        real.update_weights(named, version + 5)
    assert real.update_weights(named).version == version + 6


# ------------------------------------------------------------------ over the fake engine


def test_an_interrupted_push_is_not_left_open(client: RolloutClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two tensors, and in the middle of a call."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.update_weights(tensors())
    assert client.update_weights({"a": torch.zeros(3)}).version > 0

    honest = client._client.try_control
    for kind in (wire.WeightsBegin, wire.WeightsStage, wire.WeightsCommit):
        with monkeypatch.context() as patch:
            patch.setattr(client, "_do", interrupting(client._do, kind))
            patch.setattr(client, "_submit", unmarked(client._submit))
            patch.setattr(client._client, "try_control", marked(honest))
            with pytest.raises(KeyboardInterrupt):
                client.update_weights({"a": torch.zeros(3)})
        assert client.update_weights({"a": torch.zeros(3)}).version > 0


def marked(call: Any) -> Any:
    """Return a coroutine function whose coroutines know their message."""

    def begin(message: wire.Message, frames: Any) -> Any:
        return Marked(call(message, frames), message)

    return begin


def unmarked(submit: Any) -> Any:
    """Return `_submit` that takes both."""
    return lambda work: submit(work.coroutine if isinstance(work, Marked) else work)


class Marked:
    def __init__(self, coroutine: Any, message: wire.Message) -> None:
        self.coroutine, self.message = coroutine, message


def interrupting(do: Any, kind: type) -> Any:
    """Return `_do` that is interrupted once its message has been sent."""

    def run(work: Any) -> Any:
        if not isinstance(work, Marked):
            return do(work)
        answer = do(work.coroutine)
        if isinstance(work.message, kind):
            raise KeyboardInterrupt
        return answer

    return run


def test_a_cancelled_async_push_is_not_left_open(daemon: Daemon) -> None:
    async def run() -> int:
        async with AsyncRolloutClient(daemon.address) as client:

            def tensors() -> Iterator[tuple[str, torch.Tensor]]:
                yield "a", torch.zeros(20_000_000)  # more than a bucket: some of it is on the way
                pushing.cancel()
                yield "b", torch.zeros(20_000_000)

            pushing = asyncio.create_task(client.update_weights(tensors()))
            with pytest.raises(asyncio.CancelledError):
                await pushing
            before = (await client.health()).weight_version
            return (await client.update_weights({"a": torch.zeros(3)})).version - before

    assert asyncio.run(run()) == 1


def test_one_writer_at_a_time(daemon: Daemon, client: RolloutClient) -> None:
    with RolloutClient(daemon.address) as other:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield "a", torch.zeros(3)
            with pytest.raises(UpdateConflict, match="is open"):
                client.update_weights({"b": torch.zeros(3)})
            yield "c", torch.zeros(3)

        update = other.update_weights(tensors())
    assert update.num_tensors == 2
    assert client.update_weights({"b": torch.zeros(3)}).version == update.version + 1


# ------------------------------------------------------------------ draining


def finished(stream: RolloutStream, into: list[CompletionOutput]) -> threading.Thread:
    """Read a stream to its end in a thread."""
    thread = threading.Thread(target=lambda: into.extend(completion for _, completion in stream))
    thread.start()
    return thread


def draining(client: RolloutClient) -> tuple[threading.Thread, list[int]]:
    """Push once something runs, and let it wait; the list gets the version."""
    while client.stats().num_running == 0:
        time.sleep(0.01)
    updates: list[int] = []

    def push() -> None:
        updates.append(client.update_weights({"a": torch.ones(3)}, running="drain").version)

    thread = threading.Thread(target=push)
    thread.start()
    time.sleep(0.2)
    return thread, updates


def test_a_draining_update_waits_for_what_runs_and_new_requests_wait_for_it(client: RolloutClient) -> None:
    before, running, late = client.health().weight_version, [], []  # type: ignore[var-annotated]
    params = SamplingParams(n=2, max_tokens=20, seed=1)
    first = finished(client.stream([[Orders.SLOW, 1]], params), running)
    push, updates = draining(client)
    second = finished(client.stream([[7, 8]], params), late)
    for thread in (first, push, second):
        thread.join(20.0)
    assert updates == [before + 1]
    assert {version for completion in running for version in completion.weight_versions} == {before}
    assert [len(completion.weight_versions) for completion in running] == [20, 20]
    assert {version for completion in late for version in completion.weight_versions} == {before + 1}


def test_a_draining_update_goes_on_when_what_runs_is_aborted(client: RolloutClient) -> None:
    before, running = client.health().weight_version, []  # type: ignore[var-annotated]
    with RolloutClient(client.address) as other:
        stream = other.stream([[Orders.SLOW, 2]], SamplingParams(max_tokens=2000, seed=1))
        reader = finished(stream, running)
        push, updates = draining(client)
        assert not updates
        stream.abort(0)
        for thread in (push, reader):
            thread.join(20.0)
    assert updates == [before + 1]
    assert running[0].finish_reason == "abort"


def test_new_requests_go_on_after_a_draining_update_that_was_dropped(daemon: Daemon) -> None:
    """Its client hangs up while it waits."""
    with RolloutClient(daemon.address) as other:
        running: list[CompletionOutput] = []
        reader = finished(other.stream([[Orders.SLOW, 3]], SamplingParams(max_tokens=40, seed=1)), running)
        while other.stats().num_running == 0:
            time.sleep(0.01)

        async def give_up() -> None:
            async with AsyncRolloutClient(daemon.address) as client:
                push = asyncio.create_task(client.update_weights({"a": torch.ones(3)}, running="drain"))
                await asyncio.sleep(0.3)
                push.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await push

        version = other.health().weight_version
        asyncio.run(give_up())
        (output,) = other.generate([[5]], SamplingParams(max_tokens=2, seed=1))
        assert output.outputs[0].weight_versions == [version] * 2
        reader.join(20.0)
        assert running[0].weight_versions == [version] * 40


def test_a_real_engine_drains(folder: Path, model: Any) -> None:
    with LLM(str(folder), max_num_seqs=2) as llm:
        engine = llm.engine
        for i in range(4):
            engine.add_request(Request(f"r{i}", (1, 2, 3 + i), SamplingParams(n=2, max_tokens=5, seed=1)))
        engine.step()
        assert not engine.drain()
        done = []
        while not engine.drain():
            done += engine.step()
        assert len(done) == 2, "the group that had begun, and no other"
        llm.update_weights(changed(model, 1))
        while engine.has_unfinished():
            done += engine.step()
        versions = [set(one.completion.weight_versions) for one in done]
        assert versions == [{0}] * 2 + [{1}] * 6


def test_each_request_says_what_an_update_does_to_it(folder: Path, model: Any) -> None:
    policies: dict[str, Any] = {"keep": "keep", "recompute": "recompute", "abort": "abort", "none": None}
    with LLM(str(folder), max_num_seqs=8) as llm:
        engine = llm.engine
        for name, policy in policies.items():
            params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
            engine.add_request(Request(name, (1, 2, 3), params, on_update=policy))
        for _ in range(3):
            engine.step()
        prefilled = engine.stats().prefill_tokens
        assert engine.drain("keep"), "nobody demands to be finished first"
        llm.update_weights(changed(model, 1))
        done = {}
        while engine.has_unfinished():
            done |= {one.request_id: one.completion for one in engine.step()}
        assert done["abort"].finish_reason == "abort"
        assert done["abort"].weight_versions == [0] * 3
        assert all(done[name].weight_versions == [0] * 3 + [1] * 5 for name in ("keep", "recompute", "none"))
        assert engine.stats().prefill_tokens - prefilled == 3 + 3, "one was computed anew: its prompt and its tokens"


def test_a_request_that_is_to_be_finished_first(client: RolloutClient) -> None:
    """The update waits for it though it says `keep`, and not for others."""
    slow, results = [Orders.SLOW, 3], {}

    def generate(name: str, max_tokens: int, on_update: Any) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        results[name] = client.generate([slow], params, on_update=on_update)[0].outputs[0]

    threads = [
        threading.Thread(target=generate, args=("drain", 8, "drain")),
        threading.Thread(target=generate, args=("keep", 60, "keep")),
    ]
    version = client.health().weight_version
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10.0
    while client.stats().num_running < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.update_weights({"a": torch.ones(3)}, running="keep").version == version + 1
    for thread in threads:
        thread.join(30.0)
    assert set(results["drain"].weight_versions) == {version}
    assert set(results["keep"].weight_versions) == {version, version + 1}
    with pytest.raises(ConfigError, match=r"on_update=.wait. is not known\. Use one of keep, recompute, drain, abort"):
        client.generate([slow], SamplingParams(max_tokens=1), on_update="wait")  # type: ignore[arg-type]


def stepped(named: Named, ratio: float, seed: int) -> Named:
    """Return the parameters with a share of their elements changed."""
    generator = torch.Generator().manual_seed(seed)
    return [(n, torch.where(torch.rand(t.shape, generator=generator) < ratio, t + 0.5, t)) for n, t in named]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_delta_carries_what_changed(
    real: RolloutClient, folder: Path, model: Any, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_steps, "INLINE_BYTES", 4096)  # some pieces of the embedding do not fit into a bucket
    named = changed(model, 20)
    with RolloutClient(real.address, timeout=30.0) as client, LLM(str(folder)) as llm:
        whole = client.update_weights(named, transport=transport, delta=True)
        assert whole.num_bytes == sum(tensor.nbytes for _, tensor in named)
        for step, (ratio, most) in enumerate([(0.01, 0.05), (0.0, 0.02), (0.3, 0.4), (0.05, 0.1)]):
            named = stepped(named, ratio, step)
            update = client.update_weights(named, transport=transport, delta=True)
            assert update.digest == llm.update_weights(named).digest == client.stats().weight_digest
            assert update.num_bytes < most * whole.num_bytes or transport == "inline"
            assert tokens(client) == tokens(llm)


def test_a_delta_falls_back_to_everything(
    real: RolloutClient, folder: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the daemon's base is not what this client sent last: another client, an error, another dtype."""
    named = changed(model, 30)
    size = sum(tensor.nbytes for _, tensor in named)

    def push(seed: int, **options: Any) -> int:
        nonlocal named
        named = stepped(named, 0.01, seed)
        with LLM(str(folder)) as llm:
            expected = llm.update_weights(named).digest if not options else None
            update = real.update_weights(named, delta=True, **options)
            assert expected is None or (update.digest, tokens(real)) == (expected, tokens(llm))
        return update.num_bytes

    with RolloutClient(real.address, timeout=30.0) as other:
        push(0)
        assert push(1) < size / 10
        other.update_weights(changed(model, 31))
        assert push(2) == size, "another client's weights are the base"
        assert "daemon holds other weights" in caplog.text
        assert push(3) < size / 10
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        lora = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        other.update_lora(get_peft_model_state_dict(lora), config)
        assert push(4) < size / 10, "an adapter is not part of the base"
        with pytest.raises(ManifestMismatch):
            real.update_weights(wrong_name(named), delta=True)
        assert push(5) == size, "after an error nobody knows what was sent"
        assert push(6) < size / 10
        assert push(7, dtype="bfloat16") == size // 2
        assert push(8, dtype="bfloat16") == size // 2, "the daemon holds fp32"
        assert push(9) == size


def test_a_dtype_to_send_in(real: RolloutClient, folder: Path, model: Any) -> None:
    named = changed(model, 40)
    update = real.update_weights(named, dtype=torch.bfloat16)
    assert update.num_bytes * 2 == sum(tensor.nbytes for _, tensor in named)
    with LLM(str(folder)) as llm:
        assert llm.update_weights([(n, t.bfloat16()) for n, t in named]).digest == update.digest
        assert tokens(real) == tokens(llm)
    with pytest.raises(ConfigError, match="dtype='int8' is not known"):
        real.update_weights(named, dtype="int8")


def test_adapters_beside_the_policy(real: RolloutClient, folder: Path, model: Any) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    adapter = get_peft_model_state_dict(lora)
    named, version = changed(model, 50), real.update_weights(changed(model, 50)).version
    with LLM(str(folder), max_num_seqs=8) as llm:
        llm.update_weights(named)
        llm.update_lora(adapter, config, adapter="judge")
        for transport in TRANSPORTS:
            real.update_lora(adapter, config, adapter="judge", transport=transport)  # type: ignore[arg-type]
        assert real.health().weight_version == version, "the policy's"
        completions = [[1, 2, 3], [4, 5]]
        for lane in (None, "judge", "base"):
            ours = real.generate(PROMPTS, PARAMS, adapter=lane)
            theirs = llm.generate(PROMPTS, PARAMS, adapter=lane)
            assert [c.token_ids for o in ours for c in o.outputs] == [c.token_ids for o in theirs for c in o.outputs]
            assert real.score(PROMPTS, completions, adapter=lane) == llm.score(PROMPTS, completions, adapter=lane)
        streamed = dict(real.stream(PROMPTS[0], SamplingParams(max_tokens=2, seed=1), adapter="judge"))
        assert streamed[0].weight_versions == [len(TRANSPORTS)] * 2
        with pytest.raises(RequestError, match="no adapter 'other'"):
            real.generate(PROMPTS, PARAMS, adapter="other")
        real.remove_adapter("judge")
        with pytest.raises(RequestError, match="no adapter 'judge'"):
            real.generate(PROMPTS, PARAMS, adapter="judge")
    assert real.stats().num_adapters == 0
