"""Schedule, run, commit: batches on their way through the device, at most two at once."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from rolloutd.errors import OutOfMemory, RolloutdError
from rolloutd.outputs import FinishedCompletion

from .scheduler import Scheduler
from .sequence import Batch, Handle, SampledTokens

MAX_LAUNCHED = 2
"""The host works on the answer of one run while the device computes the next."""


class Computes(Protocol):
    """What batches are launched on."""

    max_steps: int
    """Decode steps that one run may have; 1 where each step comes back to the host."""

    def run(self, batch: Batch) -> Handle: ...


class _Launched(NamedTuple):
    """A batch that is computed, and the version of the weights that it reads."""

    batch: Batch
    handle: Handle
    weight_version: int


class Pipeline:
    """Between scheduler and runner. A step that needs the host waits until nothing is launched; a run need not."""

    def __init__(self, scheduler: Scheduler, runner: Computes) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._launched: deque[_Launched] = deque()
        self._failures: dict[str, RolloutdError] = {}

    def __bool__(self) -> bool:
        """True while something is launched."""
        return bool(self._launched)

    def fill(self, weight_version: int) -> None:
        """Launch the next batch if none is launched, and the run after it where the host need not see it first."""
        if not self._launched:
            batch = self._scheduler.schedule(self._runner.max_steps)
            error = self._launch(batch, weight_version)
            if error is not None:
                self._shrink(batch, error)
        while self._launched and len(self._launched) < MAX_LAUNCHED:
            batch = self._launched[-1].batch
            following = None
            if batch.num_steps > 1:
                following = self._scheduler.continue_run(batch, self._runner.max_steps)
            if following is None or self._launch(following, weight_version) is not None:
                return  # without memory for it: what is launched ends first, and a batch that begins anew follows

    def _launch(self, batch: Batch, weight_version: int) -> OutOfMemory | None:
        """Launch a batch, if there is anything in it; return the error where the device has no memory for it."""
        if batch.chunks:
            try:
                handle = self._runner.run(batch)
            except OutOfMemory as error:
                return error
            self._launched.append(_Launched(batch, handle, weight_version))
        return None

    def _shrink(self, batch: Batch, error: OutOfMemory) -> None:
        """Have the batch's work scheduled again in smaller pieces; what is as small as can be fails."""
        group = self._scheduler.take_back(batch)
        if group is not None:
            self._scheduler.abort(group.request_id)
            self._failures[group.request_id] = error

    def commit_next(self) -> list[FinishedCompletion]:
        """Wait for the oldest batch, if any, and return what it ended."""
        if not self._launched:
            return []
        batch, handle, weight_version = self._launched.popleft()
        sampled = handle.result()
        finished = self._scheduler.commit(batch, sampled, weight_version=weight_version)
        failures = sampled.failures if isinstance(sampled, SampledTokens) else {}
        failed = {batch.draws[i].sequence.group.request_id: error for i, error in failures.items()}
        for request_id in failed:
            self._scheduler.abort(request_id)
        self._failures.update(failed)
        return [done for done in finished if done.request_id not in failed]

    def settle(self) -> list[FinishedCompletion]:
        """Wait until nothing is launched and return what ended."""
        ended: list[FinishedCompletion] = []
        while self._launched:
            ended += self.commit_next()
        return ended

    def take_failures(self) -> dict[str, RolloutdError]:
        """Return the requests that failed alone since the last call, with their errors."""
        failures, self._failures = self._failures, {}
        return failures
