"""`RolloutClient`: `AsyncRolloutClient` in a thread of its own, for scripts, trainers and notebooks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import Collection, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rolloutd.engine.sequence import RunningPolicy
from rolloutd.errors import RequestError
from rolloutd.outputs import EngineStats, ModelInfo, RequestOutput, WeightUpdate
from rolloutd.parity import ParityProbe
from rolloutd.prompts import Prompt
from rolloutd.sampling_params import SamplingParams

from .async_client import AsyncRolloutClient, Health, error_before, weight_update
from .steps import RUN_AHEAD, Answer, PushOptions, Step, Transport
from .stream import RolloutStream

if TYPE_CHECKING:
    from rolloutd.weights.push import NamedTensors, Push

__all__ = ["AsyncRolloutClient", "Health", "RolloutClient"]

T = TypeVar("T")


class RolloutClient:
    """Talks to one daemon; calls block, and end as those of `AsyncRolloutClient` end. Usable from several threads.

    Arguments are those of `AsyncRolloutClient`. A context manager.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        connect_timeout: float = 5.0,
        load_timeout: float = 600.0,
        collective_address: str = "127.0.0.1",
    ) -> None:
        self._client = AsyncRolloutClient(
            address,
            token=token,
            timeout=timeout,
            connect_timeout=connect_timeout,
            load_timeout=load_timeout,
            collective_address=collective_address,
        )
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, args=(self._loop,), name="rolloutd-client", daemon=True)
        self._thread.start()
        try:
            self._do(self._client.connect())
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop is None:
            coroutine.close()
            raise RequestError("this RolloutClient is closed. Make a new one.")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop's thread and wait; Ctrl-C cancels it there too."""
        future = self._submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def address(self) -> str:
        """The endpoint."""
        return self._client.address

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        min_version: int = 0,
        adapter: str | None = None,
        on_update: RunningPolicy | None = None,
    ) -> list[RequestOutput]:
        """Return one answer per prompt, in order. The first error of a request is raised and the rest cancelled.

        `StaleWeights` where what serves is older than `min_version`, as after a restart of the daemon. `adapter`: the
        weights to ask: None for the policy, `base` without an adapter, or the name that `update_lora` kept one under.
        `on_update`: what new weights do to these requests while they run; see `running` of `update_weights`.
        """
        how: dict[str, Any] = {"min_version": min_version, "adapter": adapter, "on_update": on_update}
        return self._do(self._client.generate(prompts, sampling_params, use_tqdm, **how))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        min_version: int = 0,
        adapter: str | None = None,
        on_update: RunningPolicy | None = None,
    ) -> RolloutStream:
        """Yield (prompt's number, completion) as completions finish. Leaving the loop cancels the rest.

        Prompts and parameters are checked at once; what is returned can also end single groups and samples.
        """
        how: dict[str, Any] = {"min_version": min_version, "adapter": adapter, "on_update": on_update}
        return RolloutStream(self._client.stream(prompts, sampling_params, **how), self._do)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Sequence[Sequence[int]],
        temperature: float = 1.0,
        *,
        min_version: int = 0,
        adapter: str | None = None,
    ) -> list[list[float]]:
        """Return log p of each completion token given its prompt (token ids), in nats, at a sampling temperature.

        `adapter="base"` asks the reference model of a LoRA policy.
        """
        return self._do(self._client.score(prompts, completions, temperature, min_version=min_version, adapter=adapter))

    def update_weights(
        self,
        named_tensors: NamedTensors,
        version: int | None = None,
        *,
        running: RunningPolicy = "keep",
        transport: Transport = "auto",
        dtype: Any | None = None,
        delta: bool = False,
        probe: ParityProbe | None = None,
    ) -> WeightUpdate:
        """Replace all parameters between two steps; see `AsyncRolloutClient.update_weights`.

        `named_tensors` is walked in the calling thread, so it may gather shards as it goes.
        """
        from rolloutd.weights.push import Push

        options = PushOptions(version, running, transport, delta_base=self._client.delta_base(delta))
        return self._do(self._client.probed(self._push(Push.full(named_tensors, dtype), options), probe))

    def update_lora(
        self,
        named_tensors: NamedTensors,
        peft_config: Any,
        version: int | None = None,
        *,
        scaling: Mapping[str, float] | None = None,
        mode: Literal["exact", "merged"] = "exact",
        running: RunningPolicy = "keep",
        transport: Transport = "auto",
        adapter: str | None = None,
        probe: ParityProbe | None = None,
    ) -> WeightUpdate:
        """Serve the base weights with this adapter; see `LLM.update_lora`. Only its A and B matrices travel."""
        from rolloutd.weights.push import Push

        push = Push.lora(named_tensors, peft_config, scaling=scaling, mode=mode)
        update = self._push(push, PushOptions(version, running, transport, adapter))
        return self._do(self._client.probed(update, probe, adapter))

    def adopt(self, module: Any) -> WeightUpdate:
        """Let the daemon read a module's frozen parameters in the trainer's memory; see `AsyncRolloutClient.adopt`."""
        from rolloutd.weights.shared_base import SharedBase

        base = SharedBase(module)
        update = self.update_weights(base.tensors())
        self._do(self._client.share(base))
        return update

    def release(self) -> None:
        """Give an adopted module memory that is its alone; nothing happens where there is none."""
        self._do(self._client.release())

    def remove_adapter(self, adapter: str) -> None:
        """Forget an adapter that is kept beside the policy; `RequestError` for an unknown one, or one in use."""
        self._do(self._client.remove_adapter(adapter))

    def _push(self, push: Push, options: PushOptions) -> WeightUpdate:
        started = time.perf_counter()
        device = self.wait_ready().device
        steps = self._client.push_steps(push, options, device).steps()
        answer: Answer = None
        ahead: deque[concurrent.futures.Future[Answer]] = deque()
        while True:
            try:
                step = steps.send(answer)
            except StopIteration:
                return weight_update(push, answer, started)
            try:
                answer = self._answer(step, ahead)
            except BaseException as interruption:  # Ctrl-C: the update must not stay open
                step = steps.throw(interruption)
                self._do(self._client.try_control(step.message, step.frames))
                raise

    def _answer(self, step: Step, ahead: deque[concurrent.futures.Future[Answer]]) -> Answer:
        """Send a message; return its answer, or the first error before it; None where it runs ahead."""
        if step.runs_ahead:
            ahead.append(self._submit(self._client.try_control(step.message, step.frames)))
            return ahead.popleft().result() if len(ahead) > RUN_AHEAD else None
        before = [ahead.popleft().result() for _ in range(len(ahead))]
        return error_before(step, before) or self._do(self._client.try_control(step.message, step.frames))

    def health(self) -> Health:
        """Return state and model. Answered by the front at once, also while the model loads."""
        return self._do(self._client.health())

    def wait_ready(self, timeout: float | None = None) -> ModelInfo:
        """Return the model once it is loaded; raise its error if it cannot be."""
        return self._do(self._client.wait_ready(timeout))

    def stats(self) -> EngineStats:
        """Return the engine's counters."""
        return self._do(self._client.stats())

    def pause(self) -> None:
        """Hold new requests of all clients back, until `resume`, or until this client is gone; what runs goes on."""
        self._do(self._client.pause())

    def resume(self) -> None:
        """Let held requests go."""
        self._do(self._client.resume())

    def sleep(self, level: int = 1) -> None:
        """Give the KV cache's memory back, with level 2 the weights' too; only while nothing is unfinished."""
        self._do(self._client.sleep(level))

    def wake_up(self) -> None:
        """Bring back what `sleep` gave away, the KV cache empty."""
        self._do(self._client.wake_up())

    def abort(self, request_ids: Sequence[str] | None = None, samples: Collection[int] | None = None) -> int:
        """End this client's requests, or those named, or only these of their samples; return how many requests.

        Their completions come back as `abort`.
        """
        return self._do(self._client.abort(request_ids, samples))

    def close(self) -> None:
        """Hang up and end the thread. Any other call afterwards is an error."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        closing = asyncio.run_coroutine_threadsafe(self._client.close(), loop)
        closing.result(timeout=10.0)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(timeout=10.0)

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
