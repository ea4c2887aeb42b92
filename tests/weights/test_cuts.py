"""Updates that are cut, doubled, disordered or altered anywhere: what serves is the old version or the new one.

The messages are those of the real client, the engine's side is the real loop and the real store. The engine computes
tokens from the bytes that serve at that step, so a mix of versions, or a wrong label, shows in the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from rolloutd.config import EngineConfig
from rolloutd.engine.sequence import Request
from rolloutd.errors import ManifestMismatch, RolloutdError, error_from_wire
from rolloutd.sampling_params import SamplingParams
from rolloutd.serve import protocol as wire
from rolloutd.serve import push_steps
from rolloutd.serve.engine_process import EngineLoop
from rolloutd.serve.push_steps import PushSteps
from rolloutd.serve.steps import PARTS, Answer, PushOptions, Transport
from rolloutd.weights import delta as deltas
from rolloutd.weights import shared_memory
from rolloutd.weights.delta import Delta, DeltaBase
from rolloutd.weights.manifest import LoraSpec, TensorSpec, WeightManifest
from rolloutd.weights.push import Push
from rolloutd.weights.shared_memory import KeptSegment, Segment
from rolloutd.weights.store import Staging, WeightStore
from rolloutd.weights.tensors import bytes_of
from tests.cpu_as_gpu import cpu_as_gpu, mapped
from tests.fakes import FakeEngine, expected_tokens, weights_digest

SHAPES = {"a": (7, 5), "b": (64,), "c": (3, 4), "d": (1,)}
DTYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float32}
PROMPT = [3, 1, 4]
TRANSPORTS: tuple[Transport, ...] = ("inline", "shared_memory", "cuda_ipc")

Named = dict[str, Tensor]
Sent = tuple[wire.Message, list[wire.Frame]]


def tensors_of(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(DTYPES[name]) for name, shape in SHAPES.items()}


def digest_of(tensors: Named) -> str:
    return weights_digest({name: bytes(bytes_of(tensor)) for name, tensor in tensors.items()})


@dataclass
class ByteWeights:
    """A version: nothing but its tensors."""

    tensors: Named
    num_bytes: int = 0
    num_parameters: int = 0


class BytePacking:
    """Half of the tensors are written where they will serve from, as a CPU's are; half are copied, as a GPU's are."""

    def __init__(self, memory: Named) -> None:
        self._memory = memory
        self._tensors: Named = {}
        self._places: Named = {}

    def place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> Tensor | None:
        if name in "ab":
            self._places[name] = self._memory.get(name, torch.empty(shape, dtype=dtype))
        return self._places.get(name)

    def placed(self, name: str) -> None:
        self._tensors[name] = self._places[name]

    def add(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = self._memory.get(name, torch.empty_like(tensor)).copy_(tensor)

    def finish(self) -> ByteWeights:
        if self._tensors.keys() != SHAPES.keys():
            raise ManifestMismatch("tensors are missing.")
        return ByteWeights(self._tensors)


class ByteModel:
    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if SHAPES.get(name) != shape:
            raise ManifestMismatch(f"the model has no {name!r} of shape {list(shape)}.")

    def check_complete(self, names: Any) -> None:
        if set(names) != SHAPES.keys():
            raise ManifestMismatch("tensors are missing.")

    keeps_spare = False

    def parameter(self, weights: ByteWeights, name: str, dtype: torch.dtype) -> Tensor | None:
        tensor = weights.tensors.get(name)
        return tensor if tensor is not None and tensor.dtype == dtype else None

    def packing(self, spare: Any = None) -> BytePacking:
        return BytePacking({} if spare is None else spare.tensors)


class ByteEngine(FakeEngine):
    """The fake engine over a real store."""

    def __init__(self, tensors: Named, staging: Staging) -> None:
        self.serving = ByteWeights(tensors)
        self.num_deltas = 0
        self.store: WeightStore[Any] = WeightStore(ByteModel(), self.serving, staging)  # type: ignore[arg-type]
        super().__init__(EngineConfig(model="fake"))

    @property
    def weights(self) -> str:
        """The digest of the bytes of this moment."""
        return digest_of(self.serving.tensors)

    @weights.setter
    def weights(self, _: str) -> None:
        """The checkpoint's are given."""

    def begin_update(self, update_id: str, kind: Any, base_digest: str | None = None) -> list[str]:
        self.store.begin(update_id, kind)
        return [] if base_digest is None else self.store.delta_names(base_digest)

    def stage(
        self, update_id: str, spec: TensorSpec, offset: int, data: memoryview, delta: Delta | None = None
    ) -> None:
        self.num_deltas += delta is not None
        self.store.stage(update_id, spec, offset, data, delta)

    def commit_update(
        self,
        update_id: str,
        manifest: WeightManifest,
        lora: LoraSpec | None,
        version: int | None,
        running: str,
        adapter: str | None = None,
    ) -> int:
        self.serving = self.store.build(update_id, manifest, lora)
        self.weight_version += 1
        self.end_drain()
        return self.weight_version

    def abort_update(self, update_id: str) -> None:
        self.store.abort(update_id)


class Socket:
    """Keeps what the loop answers."""

    def __init__(self) -> None:
        self.sent: list[list[Any]] = []

    def send_multipart(self, parts: list[Any], copy: bool = True) -> None:
        self.sent.append(parts)


class Heartbeat:
    def begin(self) -> None: ...

    def end(self) -> None: ...


class Daemon:
    """The engine's loop, fed by hand."""

    def __init__(self, staging: Staging) -> None:
        old = tensors_of(0)
        self.engine = ByteEngine({name: tensor.clone() for name, tensor in old.items()}, staging)
        self.socket = Socket()
        self.loop = EngineLoop(self.engine, self.socket, Heartbeat())  # type: ignore[arg-type]
        self.served = {0: digest_of(old)}
        """Version -> digest, as the trainer knows it."""
        self.trainer = old
        self.delta_base = DeltaBase()

    def tell(self, message: wire.Message, frames: list[wire.Frame] | None = None) -> Answer:
        """Deliver a message; return its answer, which may be an error."""
        self.socket.sent.clear()
        self.loop._handle([bytes(part) for part in wire.encode(message, frames or [])])
        (answer,) = [wire.decode(parts)[0] for parts in self.socket.sent]
        return error_from_wire(answer.code, answer.message) if isinstance(answer, wire.Failed) else answer

    def check(self, rng: random.Random) -> None:
        """Generate: each token is that of the version that it names, and of bytes that were pushed as a whole."""
        seed = rng.randrange(1000)
        self.engine.add_request(Request("r", tuple(PROMPT), SamplingParams(max_tokens=3, seed=seed)))
        (done,) = [done for _ in range(3) for done in self.engine.step()]
        versions, tokens = done.completion.weight_versions, done.completion.token_ids
        assert versions == [self.engine.weight_version] * 3
        assert tokens == expected_tokens(self.served[versions[0]], PROMPT, seed, 0, 3)


def pushed(tensors: Named, *, transport: Transport, base: DeltaBase | None, answers: list[Answer]) -> Iterator[Sent]:
    """Yield the client's messages of an update; `answers` has the daemon's answer to the last one."""
    kept = KeptSegment()
    steps = PushSteps(
        Push.full(tensors),
        PushOptions(None, "keep", transport, delta_base=base),
        same_host=True,
        max_message_bytes=1 << 30,
        segment=kept,
    ).steps()
    answer: Answer = None
    try:
        while True:
            try:
                sent = steps.send(answer)
            except (StopIteration, RolloutdError):
                return
            yield sent.message, sent.frames
            answer = answers[-1]
    finally:
        steps.close()
        kept.close()


def update(daemon: Daemon, tensors: Named, rng: random.Random, fault: str, at: int, **how: Any) -> bool:
    """Push, with a fault at message number `at`; return whether it was committed."""
    # What lies in memory that is shared is written over once its message is answered: such messages keep their order.
    transport = "inline" if fault == "reorder" else rng.choice(TRANSPORTS)
    options = {"transport": transport, "delta": rng.random() < 0.5, **how}
    base = daemon.delta_base if options.pop("delta") and options["transport"] != "cuda_ipc" else None
    answers: list[Answer] = [None]
    held: Sent | None = None
    committed = False
    update_id = ""
    messages = pushed(tensors, base=base, answers=answers, **options)
    for number, (message, frames) in enumerate(messages):
        update_id = getattr(message, "update_id", update_id)
        stages = isinstance(message, wire.WeightsStage)
        if number == at:
            match fault:
                case "cut":
                    break
                case "twice":
                    assert not isinstance(daemon.tell(message, frames), RolloutdError)
                case "reorder" if stages:
                    held = message, frames
                    answers[-1] = None
                    continue
                case "flip" if stages and message.items:
                    message, frames = flipped(message, frames, rng)
                case "reshape" if stages and message.items:
                    message = reshaped(message)
                case "skip":
                    answers[-1] = None
                    continue
        answers[-1] = daemon.tell(message, frames)
        committed |= isinstance(message, wire.WeightsCommit) and not isinstance(answers[-1], RolloutdError)
        if held is not None and stages:
            late, held = held, None
            answers[-1] = daemon.tell(*late)
    messages.close()
    daemon.tell(wire.WeightsAbort(update_id=update_id))  # as the front says when a client is gone
    return committed


def flipped(message: wire.WeightsStage, frames: list[wire.Frame], rng: random.Random) -> Sent:
    item = rng.choice([item for item in message.items if item.num_bytes])
    at, bit = rng.randrange(item.num_bytes), 1 << rng.randrange(8)
    if message.device is not None:
        mapped(message.device)[item.at + at] ^= bit  # type: ignore[arg-type]
        return message, frames
    if message.segment is not None:
        with Segment.attach(message.segment, message.segment_bytes) as segment:
            segment.buffer[item.at + at] ^= bit
        return message, frames
    number = message.items.index(item)
    changed = bytearray(frames[number])
    changed[at] ^= bit
    return message, [bytes(changed) if i == number else frame for i, frame in enumerate(frames)]


def reshaped(message: wire.WeightsStage) -> wire.WeightsStage:
    first, *others = message.items
    return msgspec.structs.replace(message, items=[msgspec.structs.replace(first, shape=[1, *first.shape]), *others])


@pytest.fixture(params=["device"])
def daemon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    cpu_as_gpu(monkeypatch)
    before = set(shared_memory.DIRECTORY.glob("rolloutd-*"))
    yield Daemon(request.param)
    assert set(shared_memory.DIRECTORY.glob("rolloutd-*")) <= before, "a segment was left"


def chunks_of(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_steps, "SEGMENT_BYTES", PARTS * num_bytes)
    monkeypatch.setattr(push_steps, "DEVICE_BYTES", PARTS * num_bytes)
    monkeypatch.setattr(push_steps, "INLINE_BYTES", num_bytes)


def next_tensors(daemon: Daemon, rng: random.Random) -> Named:
    """Return what the trainer has next: other numbers everywhere, or in a few places."""
    fresh = tensors_of(rng.randrange(1 << 30))
    if rng.random() < 0.3:
        return fresh
    changed = {name: torch.rand(tensor.shape) < rng.choice([0.0, 0.1, 0.5]) for name, tensor in fresh.items()}
    return {name: torch.where(changed[name], fresh[name], old) for name, old in daemon.trainer.items()}


def run(daemon: Daemon, rng: random.Random, fault: str, at: int, **how: Any) -> bool:
    """Push new weights with a fault, and check what serves then; return whether the push was committed."""
    version, tensors = daemon.engine.weight_version, next_tensors(daemon, rng)
    committed = update(daemon, tensors, rng, fault, at, **how)
    daemon.trainer = tensors
    if committed:
        daemon.served[daemon.engine.weight_version] = digest_of(tensors)
    assert daemon.engine.weight_version == version + committed
    if daemon.engine.store.is_torn:
        assert not committed
        return False
    assert daemon.engine.weights == daemon.served[daemon.engine.weight_version], "the old bytes, or the new ones"
    daemon.check(rng)
    return committed


@pytest.mark.parametrize("daemon", ["device", "host"], indirect=True)
@pytest.mark.parametrize(("transport", "num_messages"), [("inline", 15), ("shared_memory", 16), ("cuda_ipc", 13)])
def test_a_cut_at_every_boundary(
    daemon: Daemon, transport: Transport, num_messages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin, a question whether the memory can be read if it is shared, the pieces (on a GPU of 32 bytes), commit."""
    chunks_of(24, monkeypatch)
    rng, at = random.Random(1), 0
    while not run(daemon, rng, "cut", at, transport=transport, delta=False):
        at += 1
        assert at <= num_messages, "a push without a fault was not committed"
    assert at == num_messages, "the last push was not cut"


@pytest.mark.parametrize("daemon", ["device", "host"], indirect=True)
def test_two_thousand_faults(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pushes are deltas of the version before, where that is known; pieces of them have 8 elements."""
    monkeypatch.setattr(deltas, "PIECE_ITEMS", 8)
    torch.manual_seed(0)
    rng = random.Random(0)
    outcomes = {fault: [0, 0] for fault in ("cut", "twice", "reorder", "flip", "reshape", "skip")}
    for _ in range(2000):
        chunks_of(rng.choice([8, 24, 100, 300, 1000]), monkeypatch)
        fault = rng.choice(list(outcomes))
        outcomes[fault][run(daemon, rng, fault, rng.randrange(30))] += 1
    assert all(refused > 20 for fault, (refused, _) in outcomes.items() if fault not in ("twice", "reorder")), outcomes
    assert all(committed > 20 for _, committed in outcomes.values()), outcomes
    assert daemon.engine.weight_version == sum(committed for _, committed in outcomes.values())
    assert daemon.engine.num_deltas > 2000, "deltas were hardly ever sent"


@pytest.mark.parametrize("daemon", ["none"], indirect=True)
def test_without_staging_what_serves_is_whole_or_known_to_be_torn(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are then the old version's, the new one's, or the store says that they are neither."""
    torch.manual_seed(0)
    rng, num_torn = random.Random(2), 0
    for _ in range(500):
        chunks_of(rng.choice([8, 24, 100]), monkeypatch)
        fault = rng.choice(["cut", "twice", "flip", "reshape", "skip"])
        committed = run(daemon, rng, fault, rng.randrange(30))
        num_torn += daemon.engine.store.is_torn
        assert not (committed and daemon.engine.store.is_torn)
    assert num_torn > 100
    assert daemon.engine.weight_version > 100, "a full update makes whole again"
