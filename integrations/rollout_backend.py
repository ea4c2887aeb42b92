"""The object that answers in the place of TRL's vLLM backend: `sync_weights` and `generate`, on every rank."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from rolloutd.errors import InternalError, RequestError
from rolloutd.outputs import CompletionOutput, ModelInfo, RequestOutput, WeightUpdate
from rolloutd.sampling_params import SamplingParams

from .options import LoraMode
from .ranks import Ranks
from .report import RolloutMetrics
from .sampling import Group, Sampling, group_prompts, group_seed
from .trainer_weights import (
    Adapter,
    adapter_tensors,
    base_tensors,
    cast_for,
    checkpoint_digests,
    drain,
    first_difference,
    sharding_of,
)

log = logging.getLogger(__name__)


class Client(Protocol):
    """What the adapter asks of a `RolloutClient`; tests put an engine of their own process here."""

    def generate(self, prompts: Any, sampling_params: Any, *, min_version: int = 0) -> list[RequestOutput]: ...

    def update_weights(
        self, named_tensors: Any, version: int | None = None, *, delta: bool = False
    ) -> WeightUpdate: ...

    def update_lora(
        self,
        named_tensors: Any,
        peft_config: Any,
        version: int | None = None,
        *,
        scaling: Mapping[str, float] | None = None,
        mode: LoraMode = "exact",
    ) -> WeightUpdate: ...

    def adopt(self, module: Any) -> WeightUpdate: ...

    def wait_ready(self, timeout: float | None = None) -> ModelInfo: ...

    def health(self) -> Any: ...

    def close(self) -> None: ...


@dataclass
class _Tally:
    """What this rank generated since the ranks last spoke."""

    tokens: int = 0
    seconds: float = 0.0


class RolloutBackend:
    """Generates through this rank's own client; weights go from rank 0, gathered by all.

    Collectives: `sync_weights`, `generate` outside a tool loop, and the end of a tool loop. After each of them either
    all ranks have succeeded or all raise the same named error.
    """

    def __init__(
        self,
        trainer: Any,
        client: Client,
        info: ModelInfo,
        *,
        ranks: Ranks,
        sampling: Sampling,
        adapter: Adapter | None,
        base_is_served: bool,
        lora_mode: LoraMode,
        delta: bool,
        share_base: bool,
        weight_version: int,
    ) -> None:
        self.client = client
        self.info = info
        self.adapter = adapter
        self.metrics = RolloutMetrics(weight_version=weight_version)
        self._trainer = weakref.ref(trainer)  # the trainer owns the backend: without a cycle, both go at once
        self._ranks = ranks
        self._sampling = sampling
        self._lora_mode: LoraMode = lora_mode
        self._delta = delta and adapter is None  # an adapter's base travels once
        self._share_base = share_base
        self._base_is_served = base_is_served
        self._num_calls = 0
        self._in_tool_loop = False
        self._tally = _Tally()

    @property
    def trainer(self) -> Any:
        trainer = self._trainer()
        assert trainer is not None, "the backend outlived its trainer"
        return trainer

    # ----------------------------------------------------------------- weights

    def sync_weights(self) -> None:
        """Make the daemon serve the trainer's weights of this moment: all of them, or the adapter alone."""
        started, update, error = time.perf_counter(), None, None
        try:
            if not self._base_is_served:
                self._serve_base()
            update = self._push_adapter() if self.adapter is not None else self._push_full()
        except Exception as caught:  # told to all ranks, raised by `agree`
            error = caught
        facts = self._ranks.agree(error, {"version": update.version, "bytes": update.num_bytes} if update else {})[0]
        seconds = time.perf_counter() - started
        self.metrics = replace(
            self.metrics,
            num_syncs=self.metrics.num_syncs + 1,
            sync_bytes=self.metrics.sync_bytes + facts["bytes"],
            sync_seconds=self.metrics.sync_seconds + seconds,
            weight_version=facts["version"],
        )
        self._record({"sync_seconds": seconds, "sync_bytes": facts["bytes"], "weight_version": facts["version"]})

    def _push_full(self) -> WeightUpdate | None:
        return self._push(self._base(), lambda tensors: self.client.update_weights(tensors, delta=self._delta))

    def _push_adapter(self) -> WeightUpdate | None:
        adapter, trainer = self.adapter, self.trainer
        assert adapter is not None
        return self._push(
            adapter_tensors(trainer.model, trainer.accelerator, adapter),
            lambda tensors: self.client.update_lora(
                tensors, adapter.peft_config, scaling=adapter.scaling, mode=self._lora_mode
            ),
        )

    def _push(self, tensors: Iterator[tuple[str, Tensor]], send: Any) -> WeightUpdate | None:
        """Send on rank 0 while the others gather with it; each rank walks to the end even if sending fails."""
        update: WeightUpdate | None = None
        if not self._ranks.is_main and sharding_of(self.trainer.accelerator) == "none":
            return None
        try:
            if self._ranks.is_main:
                update = send(tensors)
        finally:
            drain(tensors)
        return update

    def _base(self) -> Iterator[tuple[str, Tensor]]:
        trainer = self.trainer
        for name, tensor in base_tensors(trainer.model, trainer.accelerator):
            yield name, cast_for(self.info, name, tensor) if self._ranks.is_main else tensor

    def _serve_base(self) -> None:
        """Before the first adapter: send the base weights once, unless the daemon holds them bit for bit."""
        difference, error = None, None
        try:
            if self._share_base and self._ranks.is_main:
                self.client.adopt(self.trainer.model)
            elif not self._share_base:
                difference = self._base_difference()
        except Exception as caught:  # told to all ranks, raised by `agree`
            error = caught
        difference = self._ranks.agree(error, {"difference": difference})[0]["difference"]
        if difference is not None:
            update, error = None, None
            try:
                update = self._push_full()
            except Exception as caught:  # told to all ranks, raised by `agree`
                error = caught
            sent = self._ranks.agree(error, {"bytes": update.num_bytes if update else 0})[0]["bytes"]
            self.metrics = replace(self.metrics, base_sync_bytes=sent)
            if self._ranks.is_main:
                log.info("base weights sent once bytes=%d, the daemon held others (%s)", sent, difference)
        self._base_is_served = True

    def _base_difference(self) -> str | None:
        trainer = self.trainer
        tensors = base_tensors(trainer.model, trainer.accelerator)
        try:
            if not self._ranks.is_main:
                return None
            if self.metrics.weight_version != 0:
                return "its weights were updated before"
            digests = checkpoint_digests(self.info)
            if digests is None:
                return "its checkpoint cannot be read here"
            return first_difference(self.info, digests, tensors)
        finally:
            if self._ranks.is_main or sharding_of(trainer.accelerator) != "none":
                drain(tensors)

    # -------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: Any,
        num_generations: int,
        profiler: Any = None,
        **unknown: Any,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """Return (prompt ids, completion ids, log-probabilities, None), one completion per prompt, in order.

        Completions are fresh lists that hold at least one id, the stop id included; log-probabilities are [x] each.
        `num_generations` is not read: equal prompts are found by content.
        """
        completions: list[CompletionOutput] = []
        error = None
        started = time.perf_counter()
        try:
            if images is not None and any(image is not None for image in images):
                raise NotImplementedError(
                    "the dataset has an image (or images) column; rolloutd generates from text alone. Drop the column "
                    "or train without use_rollout_server."
                )
            with profiler or nullcontext():
                completions = self._generate([tuple(prompt) for prompt in prompts])
        except Exception as caught:  # told to all ranks, raised by `agree`
            error = caught
        self._tally.tokens += sum(len(completion.token_ids) for completion in completions)
        self._tally.seconds += time.perf_counter() - started
        if not self._in_tool_loop:
            self._settle(error)
        elif error is not None:
            raise error
        return (
            [list(prompt) for prompt in prompts],
            [[int(token) for token in completion.token_ids] for completion in completions],
            [[[float(logprob)] for logprob in completion.logprobs] for completion in completions],
            None,
        )

    def _generate(self, prompts: Sequence[tuple[int, ...]]) -> list[CompletionOutput]:
        if not prompts:
            return []
        groups = group_prompts(prompts)
        params = [self._params(index, group) for index, group in enumerate(groups)]
        self._num_calls += 1
        # A daemon that was started again serves its checkpoint: that is an error, not a policy to learn from.
        demanded = self.metrics.weight_version
        outputs = self.client.generate([list(group.prompt) for group in groups], params, min_version=demanded)
        placed: dict[int, CompletionOutput] = {}
        for group, output in zip(groups, outputs, strict=True):
            for position, completion in zip(group.positions, output.outputs, strict=True):
                placed[position] = _checked(completion)
        return [placed[position] for position in range(len(prompts))]

    def _params(self, index: int, group: Group) -> SamplingParams:
        seed = group_seed(
            run_seed=self._sampling.run_seed,
            weight_version=self.metrics.weight_version,
            call=self._num_calls,
            rank=self._ranks.rank,
            index=index,
        )
        return self._sampling.params(
            n=len(group.positions), seed=seed, prompt_len=len(group.prompt), max_model_len=self.info.max_model_len
        )

    @contextmanager
    def tool_loop(self) -> Iterator[None]:
        """Within it ranks take different numbers of turns and do not speak; its end settles for all of them."""
        self._in_tool_loop, error = True, None
        try:
            yield
        except Exception as caught:  # told to all ranks, raised by `agree`
            error = caught
        finally:
            self._in_tool_loop = False
        self._settle(error)

    def _settle(self, error: Exception | None) -> None:
        """End this rank's part of a call: every rank goes on, or every rank raises."""
        tally, self._tally = self._tally, _Tally()
        facts = self._ranks.agree(error, {"tokens": tally.tokens, "seconds": tally.seconds})
        tokens, seconds = sum(fact["tokens"] for fact in facts), max(fact["seconds"] for fact in facts)
        self.metrics = replace(
            self.metrics,
            generated_tokens=self.metrics.generated_tokens + tokens,
            generate_seconds=self.metrics.generate_seconds + seconds,
            num_generate_calls=self.metrics.num_generate_calls + 1,
        )
        if tokens:
            self._record({"tokens_per_second": tokens / max(seconds, 1e-9), "generate_seconds": seconds})

    def _record(self, values: Mapping[str, float]) -> None:
        trainer = self.trainer
        mode = "train" if trainer.model.training else "eval"
        for name, value in values.items():
            trainer._metrics[mode][f"rollout/{name}"].append(value)


def _checked(completion: CompletionOutput) -> CompletionOutput:
    if completion.finish_reason == "abort":
        raise RequestError("a completion was aborted on the daemon, by another client or a weight update. Run again.")
    if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
        raise InternalError(
            f"the daemon answered {len(completion.token_ids)} ids and {len(completion.logprobs)} log-probabilities."
        )
    return completion
