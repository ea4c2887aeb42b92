"""`AsyncRolloutClient`: the one implementation of what clients can ask for, over one `Link`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

from rolloutd.engine.sequence import RunningPolicy
from rolloutd.errors import (
    ConfigError,
    DeadlineExceeded,
    ProtocolError,
    RequestError,
    RolloutdError,
    check_choice,
    error_from_wire,
)
from rolloutd.outputs import CompletionOutput, EngineStats, ModelInfo, RequestOutput, WeightUpdate
from rolloutd.parity import ParityProbe
from rolloutd.prompts import Prompt, as_prompts, as_sampling_params, progress_bar, score_requests, scores_of
from rolloutd.sampling_params import SamplingParams
from rolloutd.weights.shared_memory import KeptSegment

from . import protocol as wire
from .arrays import Finished, join_prompts, split_finished
from .link import Link
from .rundir import boot_id, find_connection
from .steps import RUN_AHEAD, Answer, PushOptions, Step, Transport, device_memory
from .stream import AsyncRolloutStream

if TYPE_CHECKING:
    from rolloutd.weights.delta import DeltaBase
    from rolloutd.weights.push import NamedTensors, Push
    from rolloutd.weights.shared_base import SharedBase

    from .push_steps import PushSteps


log = logging.getLogger(__name__)

RELEASE_S = 5.0
"""For a daemon to take an adopted base back while the client closes."""


def _new_ids(count: int) -> list[str]:
    return [secrets.token_hex(16) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Health:
    """A daemon's answer to `health`."""

    state: str
    """loading, ready, paused, failed or stopping."""
    detail: str
    """The error behind `failed` and `stopping`."""
    pid: int
    engine_pid: int
    uptime_s: float
    weight_version: int
    info: ModelInfo | None
    """None while loading."""


class AsyncRolloutClient:
    """Talks to one daemon.

    `address` is an endpoint or a connection file; None finds this user's newest daemon. `timeout`: seconds without any
    sign of progress before a named error; a generation may take as long as it likes. `load_timeout`: seconds that a
    model may take to load. `collective_address`: of this host, as the daemon reaches it; `transport="collective"`
    and `"nccl"` listen there while an update travels.
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
        self._load_timeout = load_timeout
        self._collective_address = collective_address
        self._delta_base: DeltaBase | None = None
        self._logged_way = ""
        self._refused: set[Transport] = set()
        """Transports that the daemon cannot go by."""
        self._segment = KeptSegment()
        self._base: SharedBase | None = None
        """A module whose memory the daemon reads."""
        self._link = Link(
            find_connection(str(address) if address is not None else None, token),
            timeout=timeout,
            connect_timeout=connect_timeout,
            load_timeout=load_timeout,
        )

    @property
    def address(self) -> str:
        """The endpoint."""
        return self._link.address

    async def connect(self) -> None:
        """Reach the daemon; calls do it themselves. `NoListener` at once where nothing listens."""
        await self._link.connect()

    async def close(self) -> None:
        """Hang up; the daemon cancels what this client still waits for. A later call connects anew."""
        with contextlib.suppress(RolloutdError, asyncio.TimeoutError):
            await asyncio.wait_for(self.release(), RELEASE_S)
        self._segment.close()
        self._segment = KeptSegment()
        await self._link.close()

    async def __aenter__(self) -> AsyncRolloutClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ----------------------------------------------------------------- control

    async def _control(self, message: wire.Message, frames: Sequence[wire.Frame] = ()) -> wire.Message:
        await self.connect()
        return (await self._link.exchange(message, frames))[0]

    async def health(self) -> Health:
        """Return state and model. Answered by the front at once, also while the model loads."""
        answer = await self._control(wire.Health())
        assert isinstance(answer, wire.HealthReply), "the front answers by type"
        info = None
        if answer.info is not None:
            info = ModelInfo(**{**answer.info, "eos_token_ids": tuple(answer.info["eos_token_ids"])})
        return Health(
            answer.state,
            answer.detail,
            answer.pid,
            answer.engine_pid,
            answer.uptime_s,
            answer.weight_version,
            info,
        )

    async def wait_ready(self, timeout: float | None = None) -> ModelInfo:
        """Return the model once it is loaded; raise its error if it cannot be, `DeadlineExceeded` after `timeout`."""
        limit = self._load_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while True:
            health = await self.health()
            if health.info is not None and health.state in ("ready", "paused"):
                return health.info
            if health.state in ("failed", "stopping"):
                code, _, message = health.detail.partition(": ")
                raise error_from_wire(code, message)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the model is not ready after {limit:g} s. Wait longer, or read the log.")
            await asyncio.sleep(0.1)

    async def stats(self) -> EngineStats:
        """Return the engine's counters."""
        await self.wait_ready()
        answer = await self._control(wire.Stats())
        assert isinstance(answer, wire.StatsReply), "the engine answers by type"
        return EngineStats(**answer.stats)

    async def pause(self) -> None:
        """Hold new requests of all clients back, until `resume`, or until this client is gone; what runs goes on."""
        await self._control(wire.Pause())

    async def resume(self) -> None:
        """Let held requests go."""
        await self._control(wire.Resume())

    async def sleep(self, level: int = 1) -> None:
        """Give the KV cache's memory back, with level 2 the weights' too; only while nothing is unfinished."""
        await self._control(wire.Sleep(level=level))

    async def wake_up(self) -> None:
        """Bring back what `sleep` gave away, the KV cache empty."""
        await self._control(wire.WakeUp())

    async def abort(self, request_ids: Sequence[str] | None = None, samples: Collection[int] | None = None) -> int:
        """End this client's requests, or those named, or only these of their samples; return how many requests.

        Their completions come back as `abort`.
        """
        wanted = None if samples is None else sorted(samples)
        answer = await self._control(wire.Abort(request_ids=list(request_ids or ()), samples=wanted))
        assert isinstance(answer, wire.Done), "the front answers by type"
        return answer.value

    # -------------------------------------------------------------- generation

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        min_version: int = 0,
        adapter: str | None = None,
        on_update: RunningPolicy | None = None,
    ) -> AsyncRolloutStream:
        """Yield (prompt's number, completion) as completions finish. Leaving the loop early cancels the rest.

        Prompts and parameters are checked at once; what is returned can also end single groups and samples.
        """
        many = as_prompts(prompts)
        params = as_sampling_params(sampling_params, len(many))
        check_choice("on_update", on_update, get_args(RunningPolicy), or_none=True)
        request_ids = _new_ids(len(many))

        async def completions() -> AsyncIterator[tuple[int, CompletionOutput]]:
            async for index, _, finished in self._run(many, params, request_ids, min_version, adapter, on_update):
                yield index, finished.output()

        async def abort(request_id: str, samples: Collection[int] | None) -> int:
            return await self.abort([request_id], samples)

        return AsyncRolloutStream(request_ids, completions(), abort)

    async def generate(
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
        many = as_prompts(prompts)
        params = as_sampling_params(sampling_params, len(many))
        check_choice("on_update", on_update, get_args(RunningPolicy), or_none=True)
        with progress_bar(sum(p.n for p in params), enabled=use_tqdm) as bar:
            found: list[list[Finished]] = [[] for _ in many]
            ids = _new_ids(len(many))
            async for index, _, finished in self._run(many, params, ids, min_version, adapter, on_update):
                found[index].append(finished)
                bar.update(1)
        return [request_output(*parts) for parts in zip(ids, many, found, strict=True)]

    async def score(
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
        ids = []
        for prompt in as_prompts(prompts):
            if isinstance(prompt, str):
                raise RequestError("score takes token ids: text is tokenised by the daemon only for generation.")
            ids.append(prompt)
        joined, params = score_requests(ids, completions, temperature)
        return scores_of(await self.generate(joined, params, min_version=min_version, adapter=adapter), completions)

    async def _run(
        self,
        prompts: list[str | list[int]],
        params: list[SamplingParams],
        request_ids: list[str],
        min_version: int,
        adapter: str | None,
        on_update: RunningPolicy | None,
    ) -> AsyncIterator[tuple[int, str, Finished]]:
        """Send all requests in one message and yield (number, request id, completion) as they come."""
        await self.connect()
        if not prompts:
            return
        numbers: dict[SamplingParams, int] = {}
        items = [
            wire.PromptItem(
                request_id=request_id,
                text=prompt if isinstance(prompt, str) else None,
                num_ids=0 if isinstance(prompt, str) else len(prompt),
                params=numbers.setdefault(one, len(numbers)),
                min_version=min_version,
                adapter=adapter,
                on_update=on_update,
            )
            for request_id, prompt, one in zip(request_ids, prompts, params, strict=True)
        ]
        number = {item.request_id: i for i, item in enumerate(items)}
        frame = join_prompts([] if isinstance(prompt, str) else prompt for prompt in prompts)
        message = wire.Generate(items=items, params=[one.to_dict() for one in numbers])
        seen: set[tuple[str, int]] = set()
        open_ids = set(number)
        started = time.monotonic()
        try:
            async with self._link.open_call(message, [frame], resend=True) as queue:
                while open_ids:
                    answer, frames = await self._link.next_answer(queue, started)
                    for finished in self._completions(answer, frames):
                        key = finished.item.request_id, finished.item.index
                        if key in seen:
                            continue
                        seen.add(key)
                        if finished.item.is_last:
                            open_ids.discard(finished.item.request_id)
                        yield number[finished.item.request_id], finished.item.request_id, finished
        finally:
            if open_ids:  # tell the daemon, if it can be told, that nobody waits for these
                await self._link.tell(wire.Abort(request_ids=sorted(open_ids)))

    @staticmethod
    def _completions(answer: wire.Message, frames: list[memoryview]) -> Iterator[Finished]:
        match answer:
            case wire.Completions():
                return split_finished(answer.items, frames)
            case wire.Failed():
                raise error_from_wire(answer.code, answer.message)
            case _:
                raise ProtocolError(f"the daemon answered Generate with {type(answer).__name__}.")

    # ----------------------------------------------------------------- weights

    async def update_weights(
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
        """Replace all parameters between two steps; see `LLM.update_weights`.

        `running`: what happens to sequences in flight: `keep` their KV, `recompute` it, `drain` (they finish first, new
        requests wait, and so does this call), or `abort` them. `transport`: `auto` is a GPU's own memory (`cuda_ipc`)
        where trainer and daemon share one, shared memory where the daemon is on this host, else inline frames;
        `cuda_ipc` asked for also goes from one GPU of a host to another; `collective` is torch.distributed (gloo), for
        fast networks between trusted hosts, and `nccl` the same from GPU to GPU. `dtype`: cast to it before sending.
        `delta`: send only elements that changed since this client's last push with `delta`, wherever that is less; for
        slow links. It keeps a copy of all parameters here. The result is exact, and verified like any other. `probe`:
        tokens to score under the new weights.
        """
        from rolloutd.weights.push import Push

        options = PushOptions(version, running, transport, delta_base=self.delta_base(delta))
        return await self.probed(await self._push(Push.full(named_tensors, dtype), options), probe)

    async def update_lora(
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
        update = await self._push(push, PushOptions(version, running, transport, adapter))
        return await self.probed(update, probe, adapter)

    async def adopt(self, module: Any) -> WeightUpdate:
        """Send a module's frozen parameters and let the daemon read them in the trainer's memory: they exist once.

        For a base that LoRA leaves alone, with the daemon on the same GPU; the adapter travels as ever. The memory is
        the trainer's, so that nothing is lost with the daemon. `ConfigError` for parameters that are trained, or on
        several devices; `ManifestMismatch` where the daemon holds them in another dtype or cannot map the memory. Until
        `release`, which `close` calls, full updates are refused (`UPDATE_CONFLICT`). While it moves, the GPU holds it
        three times.
        """
        from rolloutd.weights.shared_base import SharedBase

        base = SharedBase(module)
        update = await self.update_weights(base.tensors())
        await self.share(base)
        return update

    async def share(self, base: SharedBase) -> None:
        """Let the daemon read parameters that it has in the trainer's memory; see `adopt`."""
        if self._base is not None:
            raise ConfigError("a module is adopted already. Call release() first.")
        parameters = [wire.Parameter(name=s.name, dtype=s.dtype, shape=list(s.shape)) for s in base.specs()]
        planned = await self._control(wire.BasePlan(parameters=parameters))
        assert isinstance(planned, wire.BasePlanned)
        memory = [device_memory(handle) for handle in base.allocate(planned.sizes)]
        try:
            await self._control(
                wire.BaseToClient(share_id=base.share_id, memory=memory, base_version=planned.base_version)
            )
            base.move_in(planned.places)
        except BaseException:  # it may have moved: nobody knows after a deadline
            await self.try_control(wire.BaseToDaemon(share_id=base.share_id), ())
            base.free()
            raise
        self._base = base

    async def release(self) -> None:
        """Give an adopted module memory that is its alone; nothing happens where there is none."""
        base, self._base = self._base, None
        if base is None:
            return
        base.move_out()
        try:
            await self._control(wire.BaseToDaemon(share_id=base.share_id))
        finally:
            base.free()

    async def remove_adapter(self, adapter: str) -> None:
        """Forget an adapter that is kept beside the policy; `RequestError` for an unknown one, or one in use."""
        await self._control(wire.RemoveAdapter(adapter=adapter))

    async def probed(self, update: WeightUpdate, probe: ParityProbe | None, adapter: str | None = None) -> WeightUpdate:
        """Score a probe under weights that now serve; `ParityMismatch` where they are not the trainer's."""
        if probe is None:
            return update
        found = await self.score(
            probe.prompts, probe.completions, probe.temperature, min_version=update.version, adapter=adapter
        )
        return replace(update, parity=probe.check(found, update.version))

    async def _push(self, push: Push, options: PushOptions) -> WeightUpdate:
        started = time.perf_counter()
        if options.transport in ("collective", "nccl"):
            raise ConfigError(
                f"transport={options.transport!r} blocks while it sends. Use RolloutClient, in a thread of its own."
            )
        device = (await self.wait_ready()).device
        steps = self.push_steps(push, options, device).steps()
        answer: Answer = None
        ahead: deque[asyncio.Task[Answer]] = deque()
        while True:
            try:
                step = steps.send(answer)
            except StopIteration:
                return weight_update(push, answer, started)
            try:
                answer = await self._answer(step, ahead)
            except BaseException as interruption:  # cancelled: the update must not stay open
                for task in ahead:
                    task.cancel()
                step = steps.throw(interruption)
                await self._link.tell(step.message)
                raise

    async def _answer(self, step: Step, ahead: deque[asyncio.Task[Answer]]) -> Answer:
        """Send a message; return its answer, or the first error before it; None where it runs ahead."""
        if step.runs_ahead:
            ahead.append(asyncio.create_task(self.try_control(step.message, step.frames)))
            await asyncio.sleep(0)  # it is sent before the next one is made
            return await ahead.popleft() if len(ahead) > RUN_AHEAD else None
        before = [await ahead.popleft() for _ in range(len(ahead))]
        return error_before(step, before) or await self.try_control(step.message, step.frames)

    def delta_base(self, delta: bool) -> DeltaBase | None:
        """Return what deltas of a push refer to, if it shall send any."""
        from rolloutd.weights.delta import DeltaBase

        if delta and self._delta_base is None:
            self._delta_base = DeltaBase()
        return self._delta_base if delta else None

    def push_steps(self, push: Push, options: PushOptions, device: str) -> PushSteps:
        """Return the messages of an update to a daemon that computes on `device`; `try_control` sends them."""
        from .push_steps import PushSteps

        welcome = self._link.welcome
        steps = PushSteps(
            push,
            options,
            same_host=welcome.boot_id == boot_id(),
            max_message_bytes=welcome.max_message_bytes,
            segment=self._segment,
            device=device,
            refused=self._refused,
            collective_address=self._collective_address,
        )
        if steps.way != self._logged_way:
            self._logged_way = steps.way
            log.info("weights travel by=%s reason=%s", steps.way, steps.reason)
        return steps

    async def try_control(self, message: wire.Message, frames: Sequence[wire.Frame]) -> Answer:
        """Send a control message; return its answer, or its error instead of raising it."""
        try:
            return await self._control(message, frames)
        except RolloutdError as error:
            return error


def request_output(request_id: str, prompt: str | list[int], finished: list[Finished]) -> RequestOutput:
    """Return a request's answer from its completions, in whatever order they came."""
    last = next(done for done in finished if done.item.is_last)
    return RequestOutput(
        request_id=request_id,
        prompt_token_ids=last.prompt_ids() if isinstance(prompt, str) else prompt,
        outputs=sorted((done.output() for done in finished), key=lambda completion: completion.index),
        prompt_logprobs=last.prompt_logprobs(),
        prompt_top_logprobs=last.prompt_top_logprobs(),
    )


def error_before(step: Step, answers: Sequence[Answer]) -> RolloutdError | None:
    """Return the error that keeps a message from being sent; nothing keeps the abort."""
    if isinstance(step.message, wire.WeightsAbort):
        return None
    return next((answer for answer in answers if isinstance(answer, RolloutdError)), None)


def weight_update(push: Push, answer: Answer, started: float) -> WeightUpdate:
    """Return what a committed push was; `started` is the caller's `perf_counter` before its first byte."""
    assert isinstance(answer, wire.Done), "a commit is answered by its version"
    manifest = push.manifest()
    seconds = time.perf_counter() - started
    return WeightUpdate(answer.value, manifest.digest, len(manifest.digests), push.num_sent_bytes, seconds)
