"""`LLM`: the engine inside this process, for scripts and notebooks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from .config import EngineConfig
from .engine.engine import Engine
from .engine.sequence import Request
from .errors import ConfigError, RequestError
from .outputs import CompletionOutput, EngineStats, FinishedCompletion, ModelInfo, RequestOutput, WeightUpdate
from .parity import ParityProbe
from .prompts import Prompt, as_prompts, as_sampling_params, progress_bar, score_requests, scores_of
from .sampling_params import SamplingParams
from .weights.adoption import AdoptedParameters
from .weights.manifest import WeightManifest
from .weights.push import NamedTensors, Push
from .weights.tensors import bytes_as_they_lie, digest_of, spec_of

__all__ = ["LLM"]


class LLM:
    """Generates with one model in this process.

    Every keyword is a field of `EngineConfig`; an unknown one is a `ConfigError` with the nearest match. Not
    thread-safe. A context manager: leaving it frees the KV cache and the weights.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig.from_dict({"model": str(model), **options})
        self._engine: Engine | None = Engine.from_config(self.config)
        self._request_ids = itertools.count()
        self._update_ids = itertools.count()
        self._adopted: AdoptedParameters | None = None

    @property
    def engine(self) -> Engine:
        """The engine; `RequestError` after `close`."""
        if self._engine is None:
            raise RequestError("this LLM is closed. Make a new one.")
        return self._engine

    @property
    def info(self) -> ModelInfo:
        """Facts about the model that is loaded."""
        return self.engine.info

    @property
    def weight_version(self) -> int:
        """The version that serves: 0 for the checkpoint, higher after each update."""
        return self.engine.weight_version

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        min_version: int = 0,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Return one answer per prompt, in order; `StaleWeights` where what serves is older than `min_version`.

        `adapter`: the weights to ask: None for the policy, `base` without an adapter, or the name that `update_lora`
        kept one under.

        `prompts` is a text, a list of token ids, or a list of those; `sampling_params` one for all or one each. If one
        request is invalid, or fails on the way (a logits processor raises, no token is left to draw), its error is
        raised and none of this call is kept; the engine goes on.
        """
        many = as_prompts(prompts)
        requests = [
            Request(f"llm-{next(self._request_ids)}", tuple(self._ids(prompt)), params, min_version, adapter)
            for prompt, params in zip(many, as_sampling_params(sampling_params, len(many)), strict=True)
        ]
        return self._run(requests, use_tqdm=use_tqdm)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Sequence[Sequence[int]],
        temperature: float = 1.0,
        *,
        adapter: str | None = None,
    ) -> list[list[float]]:
        """Return log p of each completion token given its prompt, in nats, at a sampling temperature.

        `adapter="base"` asks the reference model of a LoRA policy.
        """
        ids = [self._ids(prompt) for prompt in as_prompts(prompts)]
        joined, params = score_requests(ids, completions, temperature)
        requests = [
            Request(f"llm-{next(self._request_ids)}", tuple(tokens), params, adapter=adapter) for tokens in joined
        ]
        return scores_of(self._run(requests, use_tqdm=False), completions)

    def update_weights(
        self, named_tensors: NamedTensors, version: int | None = None, *, probe: ParityProbe | None = None
    ) -> WeightUpdate:
        """Replace all parameters; names are the trainer's Hugging Face names. An adapter that serves is dropped.

        Raises `ManifestMismatch` for wrong names or shapes or an incomplete set; the old version then serves on. With a
        `probe` what serves then is scored, and `ParityMismatch` raised where it is not what the trainer computes.
        """
        if self._adopted is not None:
            named = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
            self._adopted.check_are_mine(named)
            return self._probed(self._serve_adopted(self._adopted, version), probe)
        return self._probed(self._push(Push.full(named_tensors), version), probe)

    def adopt(self, module: Any, version: int | None = None) -> WeightUpdate:
        """Serve a module's parameters and make them views of the engine's memory, so that the weights exist once.

        The trainer goes on with the same parameters. After each optimizer step `update_weights` with the module's
        `named_parameters()` is a new version that copies nothing; `generate` raises `StaleWeights` before that, since
        the engine would read numbers that no version has. `ConfigError` for parameters that are sharded, of another
        dtype, or on another device than the engine's. `release` gives the module memory of its own again.
        """
        if self._adopted is not None:
            raise ConfigError("a module is adopted already. Call release() first.")
        adopted = AdoptedParameters(module)
        update = self._push(Push.full(adopted.tensors()), version)
        adopted.move_to(self.engine.parameter)
        try:
            self.engine.memory.lend(adopted.tensors())
        except ConfigError:
            adopted.release()
            raise
        self._adopted = adopted
        return update

    def release(self) -> None:
        """Give an adopted module memory of its own again, with the numbers that it has."""
        if self._adopted is not None:
            self._adopted.release()
            self._adopted = None
            self.engine.memory.take_back()

    def _serve_adopted(self, adopted: AdoptedParameters, version: int | None) -> WeightUpdate:
        started, tensors = time.perf_counter(), adopted.tensors()
        specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
        digests = {name: digest_of(spec, tensors[name]) for name, spec in specs.items()}
        manifest = WeightManifest(digests, 0)
        new_version = self.engine.serve_in_place(tensors, manifest, version)
        adopted.note()
        return WeightUpdate(new_version, manifest.digest, len(tensors), 0, time.perf_counter() - started)

    def update_lora(
        self,
        named_tensors: NamedTensors,
        peft_config: Any,
        version: int | None = None,
        *,
        scaling: Mapping[str, float] | None = None,
        mode: Literal["exact", "merged"] = "exact",
        adapter: str | None = None,
        probe: ParityProbe | None = None,
    ) -> WeightUpdate:
        """Serve the base weights with this adapter; only its A and B matrices travel. `probe`: see `update_weights`.

        `scaling` gives the factor of each module; without it the factors follow from `peft_config`. `exact` keeps the
        adapter beside the matrices, as PEFT computes; `merged` adds it into copies of them. Raises `LoraUnsupported`
        for kinds of adapter that cannot be served exactly. Adapters that rewrite the base when they are made (PiSSA,
        OLoRA, CorDA, LoftQ) need that base first, by `update_weights`; the TRL adapter sees to it. With a name,
        `adapter`, it is kept beside the policy instead, for calls that ask for it, and has versions of its own.
        """
        push = Push.lora(named_tensors, peft_config, scaling=scaling, mode=mode)
        return self._probed(self._push(push, version, adapter), probe, adapter)

    def remove_adapter(self, adapter: str) -> None:
        """Forget an adapter that is kept beside the policy; `RequestError` for an unknown one."""
        self.engine.remove_adapter(adapter)

    def sleep(self, level: int = 1) -> None:
        """Give the KV cache's memory back, with level 2 the weights' too; `generate` is an error until `wake_up`."""
        self.engine.sleep(level)

    def wake_up(self) -> None:
        """Bring back what `sleep` gave away, the KV cache empty; `OutOfMemory` where others took the memory."""
        self.engine.wake_up()

    def stats(self) -> EngineStats:
        """Return work counters and the load of the block pool."""
        return self.engine.stats()

    def close(self) -> None:
        """Free weights and KV cache. Any other call afterwards is an error."""
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.engine.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(self, requests: list[Request], *, use_tqdm: bool) -> list[RequestOutput]:
        engine = self.engine
        if self._adopted is not None:
            self._adopted.check_unchanged(engine.weight_version)
        try:
            for request in requests:
                engine.add_request(request)
            return self._collect(requests, use_tqdm=use_tqdm)
        except BaseException:
            for request in requests:
                engine.abort(request.request_id)
            raise

    def _collect(self, requests: list[Request], *, use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[str, list[CompletionOutput]] = {request.request_id: [] for request in requests}
        last: dict[str, FinishedCompletion] = {}
        with progress_bar(sum(request.params.n for request in requests), enabled=use_tqdm) as bar:
            while self.engine.has_unfinished():
                finished = self.engine.step()
                for error in self.engine.take_failures().values():
                    raise error
                for done in finished:
                    outputs[done.request_id].append(done.completion)
                    last[done.request_id] = done
                bar.update(len(finished))
        return [
            RequestOutput(
                request_id=request.request_id,
                prompt_token_ids=list(request.prompt_token_ids),
                outputs=sorted(outputs[request.request_id], key=lambda completion: completion.index),
                prompt_logprobs=last[request.request_id].prompt_logprobs,
                prompt_top_logprobs=last[request.request_id].prompt_top_logprobs,
            )
            for request in requests
        ]

    def _probed(self, update: WeightUpdate, probe: ParityProbe | None, adapter: str | None = None) -> WeightUpdate:
        if probe is None:
            return update
        found = self.score(probe.prompts, probe.completions, probe.temperature, adapter=adapter)
        return replace(update, parity=probe.check(found, update.version))

    def _push(self, push: Push, version: int | None, adapter: str | None = None) -> WeightUpdate:
        engine, started = self.engine, time.perf_counter()
        update_id = f"llm-update-{next(self._update_ids)}"
        engine.begin_update(update_id, push.kind)
        try:
            for spec, tensor in push.tensors():
                digest = engine.stage(update_id, spec, 0, bytes_as_they_lie(tensor))
                assert digest is not None, "a whole tensor has one as soon as it has landed"
                push.record(spec, digest)
            manifest = push.manifest()
            new_version = engine.commit_update(update_id, manifest, push.lora_spec, version, adapter=adapter)
        except BaseException:
            engine.abort_update(update_id)
            raise
        seconds = time.perf_counter() - started
        return WeightUpdate(new_version, manifest.digest, len(manifest.digests), manifest.num_bytes, seconds)
