"""A torch-free engine behind the real daemon: tokens are a function of the weight bytes, the prompt and the sample.

From the tokens alone a test can tell which weights computed them, and whether an answer was crossed, lost or doubled.
The prompt's first token may be an order: see `Orders`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import deque
from collections.abc import Collection
from dataclasses import replace

from rolloutd.config import EngineConfig
from rolloutd.engine.admission import check_request, check_version
from rolloutd.engine.sequence import Request
from rolloutd.errors import ModelUnsupported, RequestError, RolloutdError, UpdateConflict
from rolloutd.outputs import CompletionOutput, EngineStats, FinishedCompletion, ModelInfo
from rolloutd.weights.delta import Delta
from rolloutd.weights.manifest import LoraSpec, TensorSpec, WeightManifest

VOCAB = 1000
HANGING_TEXT = "hang"
"""A prompt that the fake engine never ends to tokenise."""


class Orders:
    """First tokens of a prompt that make the fake engine misbehave."""

    RAISE = 900
    SLOW = 901
    """Each of its steps takes 50 ms."""
    HANG = 902
    DIE = 903


def expected_tokens(weights: str, prompt: list[int], seed: int, index: int, count: int) -> list[int]:
    """Return what the fake engine samples."""
    return [
        int.from_bytes(hashlib.blake2b(repr((weights, prompt, seed, index, t)).encode(), digest_size=4).digest(), "big")
        % VOCAB
        for t in range(count)
    ]


class FakeEngine:
    """One token per sequence and step."""

    def __init__(self, config: EngineConfig) -> None:
        if config.model == "unsupported":
            raise ModelUnsupported("'unsupported' is a FakeForCausalLM; supported: none.")
        if config.model == "slow-to-load":
            time.sleep(1.5)
        self.info = ModelInfo(
            model=config.model,
            architecture="FakeForCausalLM",
            model_impl="native",
            dtype="float32",
            numerics="fp32",
            head_dtype="float32",
            device="cpu",
            num_parameters=1,
            vocab_size=VOCAB,
            max_model_len=100_000,
            block_size=16,
            num_blocks=100_000,
            weight_bytes=4,
            kv_cache_bytes=4,
            eos_token_ids=(0,),
        )
        self.weight_version = 0
        self.weights = "checkpoint"
        self._queue: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._holds_new = False
        self._progress: dict[str, list[list[int]]] = {}
        self._versions: dict[str, list[int]] = {}
        self._finished = 0
        self._steps = 0
        self._update_id: str | None = None
        self._staged: dict[str, bytearray] = {}

    def add_request(self, request: Request) -> None:
        check_request(request, self.info)
        check_version(request, self.weight_version)
        (self._waiting if self._holds_new else self._queue).append(request)
        self._progress[request.request_id] = [[] for _ in range(request.params.n)]
        self._versions[request.request_id] = []

    def abort(self, request_id: str, samples: Collection[int] | None = None) -> list[FinishedCompletion]:
        assert samples is None, "the fake engine ends whole requests"
        request = next((r for r in (*self._queue, *self._waiting) if r.request_id == request_id), None)
        if request is None:
            return []
        (self._queue if request in self._queue else self._waiting).remove(request)
        return self._finish(request, "abort")

    def can_step(self) -> bool:
        return self.has_unfinished()

    def has_unfinished(self) -> bool:
        return bool(self._queue or self._waiting)

    def drain(self, running: str = "drain") -> bool:
        self._holds_new = any((request.on_update or running) == "drain" for request in self._queue)
        return not self._holds_new

    def end_drain(self) -> None:
        self._holds_new = False
        self._queue += self._waiting
        self._waiting.clear()

    def step(self) -> list[FinishedCompletion]:
        self._steps += 1
        for request in self._queue:
            self._misbehave(request.prompt_token_ids[0])
        finished: list[FinishedCompletion] = []
        for request in list(self._queue):
            done = len(self._versions[request.request_id])
            for index, tokens in enumerate(self._progress[request.request_id]):
                seed = request.params.seed or 0
                tokens.append(
                    expected_tokens(self.weights, list(request.prompt_token_ids), seed, index, done + 1)[done]
                )
            self._versions[request.request_id].append(self.weight_version)
            if done + 1 == request.params.max_tokens:
                self._queue.remove(request)
                finished += self._finish(request, "length")
        return finished

    @staticmethod
    def _misbehave(order: int) -> None:
        match order:
            case Orders.RAISE:
                raise RuntimeError("ordered to fail")
            case Orders.SLOW:
                time.sleep(0.05)
            case Orders.HANG:
                time.sleep(600)
            case Orders.DIE:
                os.kill(os.getpid(), signal.SIGKILL)

    def _finish(self, request: Request, reason: str) -> list[FinishedCompletion]:
        samples = self._progress.pop(request.request_id)
        versions = self._versions.pop(request.request_id)
        self._finished += len(samples)
        return [
            FinishedCompletion(
                request_id=request.request_id,
                completion=CompletionOutput(
                    index=index,
                    token_ids=tokens,
                    text="",
                    logprobs=[-1.0] * len(tokens),
                    sampling_logprobs=[-0.5] * len(tokens),
                    finish_reason="abort" if reason == "abort" else "length",
                    stop_reason=None,
                    weight_versions=list(versions),
                ),
                is_last=index == len(samples) - 1,
                prompt_logprobs=None,
            )
            for index, tokens in enumerate(samples)
        ]

    def stats(self) -> EngineStats:
        return replace(
            EngineStats(),
            num_steps=self._steps,
            num_running=len(self._queue),
            num_finished=self._finished,
            weight_version=self.weight_version,
        )

    def take_failures(self) -> dict[str, RolloutdError]:
        return {}

    def encode(self, text: str) -> list[int]:
        if text == HANGING_TEXT:
            time.sleep(600)
        return [ord(character) % VOCAB for character in text]

    def begin_update(self, update_id: str, kind: str, base_digest: str | None = None) -> list[str]:
        if self._update_id == update_id:
            return []
        if self._update_id is not None:
            raise UpdateConflict(f"update {self._update_id} is open.")
        self._update_id, self._staged = update_id, {}
        return []

    def stage(
        self, update_id: str, spec: TensorSpec, offset: int, data: memoryview, delta: Delta | None = None
    ) -> None:
        assert update_id == self._update_id
        assert delta is None
        self._staged.setdefault(spec.name, bytearray(spec.num_bytes))[offset : offset + data.nbytes] = data

    def commit_update(
        self,
        update_id: str,
        manifest: WeightManifest,
        lora: LoraSpec | None,
        version: int | None,
        running: str,
        adapter: str | None = None,
    ) -> int:
        if update_id != self._update_id:
            raise UpdateConflict(f"update {update_id} is not open.")
        self._update_id = None
        self.weights = weights_digest({name: bytes(data) for name, data in self._staged.items()})
        self.weight_version = self.weight_version + 1 if version is None else version
        self.end_drain()
        return self.weight_version

    def abort_update(self, update_id: str) -> None:
        if update_id == self._update_id:
            self._update_id = None

    def sleep(self, level: int = 1) -> None:
        if self._queue:
            raise RequestError("sleep() with unfinished requests.")

    def wake_up(self) -> None:
        pass


def weights_digest(tensors: dict[str, bytes]) -> str:
    """Return the digest of weight bytes that the fake engine's tokens depend on."""
    return hashlib.blake2b(repr(sorted(tensors.items())).encode(), digest_size=8).hexdigest()
