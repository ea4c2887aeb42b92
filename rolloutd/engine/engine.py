"""The engine: requests in, completions out, weights swapped between two steps."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from rolloutd.config import EngineConfig
from rolloutd.errors import ConfigError, IdReuse, RequestError, RolloutdError, UpdateConflict, WeightsLost, did_you_mean
from rolloutd.models.config import check_architecture
from rolloutd.models.registry import load_model
from rolloutd.outputs import EngineStats, FinishedCompletion, ModelInfo
from rolloutd.runtime.kv_cache import bytes_per_block, num_blocks_for, workspace_bytes
from rolloutd.runtime.memory import out_of_memory, release
from rolloutd.runtime.model_runner import numerics_name, resolve_device, resolve_precision
from rolloutd.runtime.runners import runner_for
from rolloutd.weights.delta import Delta
from rolloutd.weights.loader import Checkpoint, load_tokenizer, resolve
from rolloutd.weights.manifest import LoraSpec, TensorSpec, WeightManifest
from rolloutd.weights.relocation import MemoryPlan
from rolloutd.weights.store import UpdateKind, WeightStore
from rolloutd.weights.tensors import Bytes
from rolloutd.weights.weight_memory import WeightMemory

from .admission import check_request, check_version
from .block_manager import BlockManager
from .lanes import BASE, MAX_ADAPTERS, Lanes, check_adapter_name
from .pipeline import Computes, Pipeline
from .scheduler import Scheduler
from .sequence import Group, Request, RunningPolicy, TokenRules
from .step_clock import StepClock
from .stop import Decode
from .token_rules import bad_word_ids, check_tokens, token_rules

log = logging.getLogger(__name__)

T = TypeVar("T")

SLEEP_LEVELS = (1, 2)


def _falls(version: int | None, serving: int) -> ConfigError:
    return ConfigError(
        f"version={version} is not above the serving version {serving}. Versions rise; leave it out to count up by one."
    )


def _weights_lost() -> WeightsLost:
    return WeightsLost(
        "an update was written over the weights (weight_staging=none) and failed: nothing serves, rather than a mix. "
        "Push again with update_weights."
    )


class Runner(Computes, Protocol):
    """What computes batches; tests put a function of the token history here."""

    weights: Any

    def allocate_cache(self, num_blocks: int, block_size: int) -> int: ...

    def free_cache(self) -> None: ...

    def relocate(self, weights: Any) -> None: ...


class Engine:
    """One model, its KV pool and its queue. Not thread-safe: one loop calls `step`."""

    def __init__(
        self,
        info: ModelInfo,
        scheduler: Scheduler,
        runner: Runner,
        weights: WeightStore[Any],
        *,
        tokenizer: Any | None = None,
        seed: int = 0,
    ) -> None:
        self.info = info
        self.weight_version = 0
        self.tokenizer = tokenizer
        self._scheduler = scheduler
        self._runner = runner
        self._weights = weights
        self._seed = seed
        self._eos_token_ids = frozenset(info.eos_token_ids)
        self._pipeline = Pipeline(scheduler, runner)
        self._ended_early: list[FinishedCompletion] = []
        """Completions that ended outside `step`, which delivers them."""
        self._num_updates = 0
        self._update_bytes = 0
        self._weight_digest = ""
        self._clock = StepClock()
        self._lanes = Lanes()
        self._base_version = 0
        """The version of the last full update."""
        self._adapters: dict[str, int] = {}
        """Versions of adapters that are kept beside the policy; a new base is a new version of each."""
        self._lost: dict[str, RolloutdError] = {}
        """Requests that failed for want of the weights that they need."""
        self._asleep = False
        self._device = torch.device(info.device)
        self.memory = WeightMemory(runner, weights, self._device)

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Load the model and return an engine that is ready; `ConfigError` and its kinds where that cannot be.

        `OutOfMemory` where weights and KV cache do not fit beside what already lies on the device.
        """
        device = resolve_device(config)
        try:
            return cls._load(config, device)
        except torch.OutOfMemoryError as error:
            named = out_of_memory(f"{config.model!r} and its KV cache", error, device)
        raise named

    @classmethod
    def _load(cls, config: EngineConfig, device: torch.device) -> Engine:
        checkpoint = Checkpoint(resolve(config.model, config.revision))
        architecture = check_architecture(checkpoint.architectures(), config.model, config.model_impl)
        hf_config = checkpoint.hf_config()
        precision = resolve_precision(config, str(hf_config.dtype or "float32").removeprefix("torch."), device)
        tokenizer = load_tokenizer(checkpoint.path, config.tokenizer, config.revision)
        loaded = load_model(config, checkpoint, hf_config, precision, device)
        model, weights, max_model_len = loaded.model, loaded.weights, loaded.max_model_len
        runner = runner_for(config, model, weights, precision, device, max_model_len)
        block_bytes = bytes_per_block(model.kv_layers, config.block_size, precision.matrix)
        num_blocks = num_blocks_for(
            config,
            block_bytes=block_bytes,
            max_model_len=max_model_len,
            workspace_bytes=workspace_bytes(config, model.vocab_size, model.num_activations),
            device=device,
        )
        info = ModelInfo(
            model=config.model,
            architecture=architecture,
            model_impl=loaded.model_impl,
            dtype=str(precision.matrix).removeprefix("torch."),
            numerics=numerics_name(precision),
            head_dtype=str(precision.head).removeprefix("torch."),
            device=str(device),
            num_parameters=weights.num_parameters,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            block_size=config.block_size,
            num_blocks=num_blocks,
            weight_bytes=weights.num_bytes,
            kv_cache_bytes=num_blocks * block_bytes,
            eos_token_ids=checkpoint.eos_token_ids(tokenizer),
        )
        runner.allocate_cache(num_blocks, config.block_size)
        scheduler = Scheduler(
            BlockManager(num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            decode=decoder_of(tokenizer),
        )
        store = WeightStore(model, weights, config.weight_staging)
        return cls(info, scheduler, runner, store, tokenizer=tokenizer, seed=config.seed)

    # ---------------------------------------------------------------- requests

    def add_request(self, request: Request) -> None:
        """Queue a request; a `RequestError` or `LimitError` leaves the engine as it was."""
        if self._asleep:
            raise RequestError("the engine sleeps, its KV cache is given away. Call wake_up() first.")
        check_request(request, self.info)
        if self._weights.is_torn and not self._weights.is_open():
            raise _weights_lost()
        check_version(request, self.version_of(request.adapter))
        if request.request_id in self._scheduler or request.request_id in self._lanes:
            raise IdReuse(f"request id {request.request_id!r} is in flight. Use a new id for each request.")
        if request.params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer and the model has none. Use stop_token_ids.")
        rules = self._rules(request)
        seed = request.params.seed
        if seed is None:
            digest = hashlib.blake2b(f"{self._seed} {request.request_id}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little")
        group = Group.from_request(request, seed=seed % (1 << 64), eos_token_ids=self._eos_token_ids, rules=rules)
        if self._lanes.joins(request.adapter, group):
            self._scheduler.add(group)

    def version_of(self, adapter: str | None) -> int:
        """Return the version of the policy (None), of the base, or of a kept adapter; `RequestError` for another."""
        if adapter is None:
            return self.weight_version
        if adapter == BASE:
            return self._base_version
        if adapter not in self._adapters:
            raise RequestError(
                f"there is no adapter {adapter!r}.{did_you_mean(adapter, [BASE, *self._adapters])} Push it first with "
                "update_lora(..., adapter=...)."
            )
        return self._adapters[adapter]

    def _rules(self, request: Request) -> TokenRules | None:
        """Return what a checked request adds to logits and forbids; its bad words become token ids here."""
        params, tokenizer = request.params, self.tokenizer
        if not params.bad_words:
            return token_rules(params, ())
        if tokenizer is None:
            raise RequestError("bad_words need a tokenizer and the model has none. Use bad_token_ids.")

        def tokenise(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        words = bad_word_ids(params.bad_words, tokenise, self.info.vocab_size)
        check_tokens(params, self.info, [word[0] for word in words if len(word) == 1])
        return token_rules(params, words)

    def abort(self, request_id: str, samples: Collection[int] | None = None) -> list[FinishedCompletion]:
        """End what is unfinished of a request, or of those of its samples; an unknown id ends nothing."""
        if samples is not None and request_id in self._lanes:
            raise RequestError("samples of a request that waits for its adapter cannot be aborted. Abort all of it.")
        waiting = self._lanes.pop(request_id)
        if waiting is not None:
            self._scheduler.add(waiting)  # which ends it like any other that has not begun
        return self._scheduler.abort(request_id, samples)

    def can_step(self) -> bool:
        """Whether `step` has anything to do or to deliver: work, and weights to do it with; or what ended before."""
        return bool(self._ended_early or self._lost) or (self.has_unfinished() and not self._weights.is_torn)

    def has_unfinished(self) -> bool:
        return self._scheduler.has_unfinished() or bool(self._ended_early or self._pipeline or self._lanes)

    def step(self) -> list[FinishedCompletion]:
        """Compute one batch and return the completions that ended; with no work, nothing.

        Where the runner can do several steps in a row, the next such run is launched before this one's answer is read.
        A request that cannot go on, such as one whose logits processor raises, leaves by `take_failures`.
        """
        ended, self._ended_early = self._ended_early, []
        if self._weights.is_torn:
            return ended
        self._clock.step_begins()
        if self._lanes and not (self._scheduler.has_unfinished() or self._pipeline or self._scheduler.holds_new):
            self._turn()
        self._pipeline.fill(self.version_of(self._lanes.current))
        ended += self._pipeline.commit_next()
        self._clock.step_ended(is_busy=self.has_unfinished())
        return ended

    def _turn(self) -> None:
        """Let those compute who wait for other weights: nothing runs under these."""
        before = self._lanes.current
        groups, lane = self._lanes.turn(), self._lanes.current
        try:
            weights = self._beside_serving(self._weights_of, lane)
        except RolloutdError as error:
            self._lanes.current = before
            self._lost |= {group.request_id: error for group in groups}
            return
        self._runner.weights = weights
        self._scheduler.blocks.forget_prefixes()
        for group in groups:
            self._scheduler.add(group)

    def _weights_of(self, lane: str | None) -> Any:
        if lane is None:
            return self._weights.policy()
        return self._weights.base() if lane == BASE else self._weights.with_kept(lane)

    def take_failures(self) -> dict[str, RolloutdError]:
        """Return the requests that failed alone since the last call, with their errors; nothing more comes of them."""
        failures, self._lost = self._lost, {}
        return failures | self._pipeline.take_failures()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text prompt; `RequestError` where the model has no tokenizer."""
        if self.tokenizer is None:
            raise RequestError(f"{self.info.model!r} has no tokenizer. Send token ids, or start with --tokenizer.")
        return list(self.tokenizer.encode(text))

    def stats(self) -> EngineStats:
        """Return counters and load."""
        blocks, counters = self._scheduler.blocks, self._scheduler.counters
        return EngineStats(
            num_steps=counters.num_steps,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + self._lanes.num_waiting,
            num_finished=counters.num_finished,
            num_preemptions=counters.num_preemptions,
            prefill_tokens=counters.prefill_tokens,
            decode_tokens=counters.decode_tokens,
            sampled_tokens=counters.sampled_tokens,
            cached_tokens=counters.cached_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            blocks_total=blocks.num_blocks,
            blocks_used=blocks.num_used,
            blocks_cached=blocks.num_cached,
            block_copies=counters.block_copies,
            peak_blocks_used=blocks.peak_used,
            weight_version=self.weight_version,
            weight_digest=self._weight_digest,
            num_updates=self._num_updates,
            num_adapters=len(self._adapters),
            update_bytes=self._update_bytes,
            step_s=self._clock.in_steps_s,
            longest_pause_s=self._clock.longest_pause_s,
            num_out_of_memory=counters.num_out_of_memory,
        )

    def check_invariants(self) -> None:
        """Raise AssertionError if a block leaked or a count is wrong."""
        self._scheduler.blocks.check_invariants(self._scheduler.live_sequences())

    # ----------------------------------------------------------------- weights

    def begin_update(self, update_id: str, kind: UpdateKind, base_digest: str | None = None) -> list[str]:
        """Open an update; `UpdateConflict` while another is open.

        Returns the parameters that deltas may refer to, if the base is that of the full update of this digest.
        """
        if kind == "full" and self.memory.is_lent:
            raise UpdateConflict("the base lies in a trainer's memory. Call release() where it was adopted, then push.")
        if kind == "lora" and self._weights.is_torn and not self._weights.is_open():
            raise _weights_lost()
        self._weights.begin(update_id, kind)
        self._clock.forget_pauses()
        return [] if base_digest is None else self._weights.delta_names(base_digest)

    def stage(
        self, update_id: str, spec: TensorSpec, offset: int, data: Bytes, delta: Delta | None = None
    ) -> Callable[[], int] | None:
        """Land bytes of one tensor beside the weights that serve.

        With a `delta`, `data` is what changed of a run of the tensor since the base. Returns what gives the digest of a
        tensor that comes in one piece.
        """
        if self._weights.overwrites:
            self._ended_early += self._pipeline.settle()
        return self._beside_serving(self._weights.stage, update_id, spec, offset, data, delta)

    def commit_update(
        self,
        update_id: str,
        manifest: WeightManifest,
        lora: LoraSpec | None,
        version: int | None,
        running: RunningPolicy = "keep",
        adapter: str | None = None,
    ) -> int:
        """Verify what landed, serve it from the next step on, and return its version.

        Any error leaves the version from before serving. The call falls between two steps by construction. With the
        name of an `adapter` it is kept beside the policy, for requests that ask for it, and has versions of its own.
        """
        if adapter is not None:
            return self._keep_adapter(update_id, manifest, lora, version, adapter, running)
        new_version = self.weight_version + 1 if version is None else version
        if new_version <= self.weight_version:
            self.abort_update(update_id)
            raise _falls(version, self.weight_version)
        if lora is not None:
            self.memory.come_back()  # an adapter is added to a base that must be there
        if self._weights.overwrites:
            self._ended_early += self._pipeline.settle()
        try:
            weights = self._beside_serving(self._weights.build, update_id, manifest, lora)
        except BaseException:
            self._lose_requests()
            raise
        self._flip(weights, new_version, manifest, running, is_base=lora is None)
        return new_version

    def _flip(
        self, weights: Any, new_version: int, manifest: WeightManifest, running: RunningPolicy, *, is_base: bool
    ) -> None:
        self._ended_early += self._pipeline.settle()
        lane = self._lanes.current
        if is_base:  # new weights in every lane
            self._runner.weights = weights
            self._weights.adopt(self._runner.weights)
            self._base_version = new_version
            self._adapters = {name: kept + 1 for name, kept in self._adapters.items()}
            if lane not in (None, BASE):
                self._runner.weights = self._weights_of(lane)
        elif lane is None:
            self._runner.weights = weights
        self.memory.is_renewed()
        self.weight_version = new_version
        self._num_updates += 1
        self._update_bytes += manifest.num_bytes
        self._weight_digest = manifest.digest
        if is_base or lane is None:
            self._ended_early += self._scheduler.weights_changed(running)
        self._scheduler.holds_new = False

    def parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Return where a parameter of the base weights lies, for a trainer that writes there; None where it cannot."""
        return self._weights.parameter(name, dtype)

    def plan_move(self, specs: Sequence[TensorSpec]) -> tuple[MemoryPlan, int]:
        """Return how the base would lie in a trainer's memory, and the base's version."""
        self.memory.come_back()
        return self._weights.plan(specs), self._base_version

    def move_into(self, memory: Sequence[torch.Tensor], base_version: int) -> None:
        """Read the base from a trainer's memory, of the sizes that were planned: its numbers move there first.

        The trainer only reads them too. `UpdateConflict` where the base is another one by now.
        """
        if self.memory.is_lent or self._weights.is_open() or base_version != self._base_version:
            raise UpdateConflict(
                "the base was updated meanwhile, is being updated, or lies in a trainer's memory already. Adopt again."
            )
        self._ended_early += self._pipeline.settle()
        self.memory.move_into(memory)
        release(self._device)

    def move_back(self) -> None:
        """Read the base from the engine's own memory again."""
        self._ended_early += self._pipeline.settle()
        self.memory.move_back()

    def serve_in_place(self, tensors: Mapping[str, torch.Tensor], manifest: WeightManifest, version: int | None) -> int:
        """Serve parameters that were written where they lie as a new version, and return it."""
        new_version = self.weight_version + 1 if version is None else version
        if new_version <= self.weight_version:
            raise _falls(version, self.weight_version)
        self._ended_early += self._pipeline.settle()
        self._flip(self._weights.rebuild(tensors), new_version, manifest, "recompute", is_base=True)
        return new_version

    def _keep_adapter(
        self,
        update_id: str,
        manifest: WeightManifest,
        lora: LoraSpec | None,
        version: int | None,
        adapter: str,
        running: RunningPolicy,
    ) -> int:
        before = self._adapters.get(adapter, 0)
        new_version = before + 1 if version is None else version
        try:
            check_adapter_name(adapter)
            if new_version <= before:
                raise ConfigError(
                    f"version={version} of adapter {adapter!r} is not above its version {before}. Leave it out to "
                    "count up by one."
                )
            if adapter not in self._adapters and len(self._adapters) >= MAX_ADAPTERS:
                raise RequestError(f"{MAX_ADAPTERS} adapters are kept already. Drop one with remove_adapter first.")
        except RolloutdError:
            self._weights.abort(update_id)
            raise
        try:
            self._weights.keep(update_id, manifest, lora, adapter)
        except RolloutdError:
            self._lose_requests()
            raise
        self._ended_early += self._pipeline.settle()
        self._adapters[adapter] = new_version
        self._num_updates += 1
        self._update_bytes += manifest.num_bytes
        if self._lanes.current == adapter:
            self._runner.weights = self._beside_serving(self._weights_of, adapter)
            self._ended_early += self._scheduler.weights_changed(running)
        self._scheduler.holds_new = False
        return new_version

    def remove_adapter(self, adapter: str) -> None:
        """Forget an adapter that is kept beside the policy; `RequestError` for an unknown one, or one in use."""
        self.version_of(adapter)
        runs = self._lanes.current == adapter
        if adapter == BASE or self._lanes.uses(adapter) or (runs and self._scheduler.has_unfinished()):
            raise RequestError(f"adapter {adapter!r} is in use. Wait for its requests, or abort them.")
        if runs:
            self._lanes.current = None
            self._runner.weights = self._weights_of(None)
            self._scheduler.blocks.forget_prefixes()
        del self._adapters[adapter]
        self._weights.forget(adapter)

    def drain(self, running: RunningPolicy = "drain") -> bool:
        """Return whether nothing that runs is to be finished before a commit; where something is, new groups wait.

        They wait for the commit, or for `end_drain`.
        """
        is_drained = self._scheduler.is_drained(running)
        self._scheduler.holds_new = not is_drained
        return is_drained

    def end_drain(self) -> None:
        """Let groups begin again."""
        self._scheduler.holds_new = False

    def _beside_serving(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return work(*args)
        except torch.OutOfMemoryError as error:
            named = out_of_memory("new weights beside those that serve", error, self._device)
        raise named

    def abort_update(self, update_id: str) -> None:
        """Drop a staged update; nothing happens if it is not open."""
        self._weights.abort(update_id)
        self._lose_requests()

    def _lose_requests(self) -> None:
        """Fail what is in flight by name, if there are no weights any more that it could go on with."""
        if not self._weights.is_torn or self._weights.is_open():
            return
        for request_id in [*self._lanes.request_ids(), *self._scheduler.request_ids()]:
            self.abort(request_id)
            self._lost[request_id] = _weights_lost()

    # ------------------------------------------------------------------- sleep

    def sleep(self, level: int = 1) -> None:
        """Give memory back: the KV cache's (level 1), and the weights' too, which go to host memory (level 2).

        `RequestError` for another level, and while requests are unfinished. On a CPU, where weights have nowhere to go,
        both are one. An update that comes meanwhile is served after `wake_up`; it brings weights back by itself.
        """
        if level not in SLEEP_LEVELS:
            raise RequestError(f"level={level!r} is not known. Use 1 (the KV cache) or 2 (the KV cache and weights).")
        self._ended_early += self._pipeline.settle()
        if self.has_unfinished():
            raise RequestError("sleep() with unfinished requests. Wait for them or abort them.")
        self._scheduler.blocks.forget_prefixes()
        self._runner.free_cache()
        self._weights.forget_spare()
        self._asleep = True
        if level == 2:
            self.memory.go_to_host()
        release(self._device)

    def wake_up(self) -> None:
        """Bring back what `sleep` gave away; the KV cache is empty. `OutOfMemory` where others took the memory."""
        if not self._asleep:
            return
        try:
            self.memory.come_back()
            self._runner.allocate_cache(self.info.num_blocks, self.info.block_size)
        except torch.OutOfMemoryError as error:
            named = out_of_memory("what the engine gave away to sleep", error, self._device)
        else:
            self._asleep = False
            return
        self._runner.free_cache()
        raise named


def decoder_of(tokenizer: Any | None) -> Decode | None:
    """Return ids -> text without special tokens."""
    if tokenizer is None:
        return None

    def decode(ids: Any) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    return decode
