"""What whoever makes the messages of a weight update and whoever sends them tell each other. No torch."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from rolloutd.engine.sequence import RunningPolicy
from rolloutd.errors import RolloutdError

from . import protocol as wire

if TYPE_CHECKING:
    from rolloutd.weights.delta import DeltaBase
    from rolloutd.weights.device_memory import DeviceHandle

Transport = Literal["auto", "inline", "shared_memory", "cuda_ipc", "collective", "nccl"]

PARTS = 4
"""Of memory that both sides have: one is filled while the daemon reads others, and messages about others travel."""
RUN_AHEAD = PARTS - 1
"""Messages that may wait for an answer while the next one is made."""


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a caller may say of an update; see `RolloutClient.update_weights`."""

    version: int | None
    running: RunningPolicy
    transport: Transport
    adapter: str | None = None
    """Keep it under this name, beside the policy."""
    delta_base: DeltaBase | None = None
    """What deltas refer to, if any are to be sent."""


class Step(NamedTuple):
    """A message to send. Where the next one may be made before this one is answered, it `runs_ahead`.

    All others are sent once all before them are answered without an error; the abort in any case.
    """

    message: wire.Message
    frames: list[wire.Frame]
    runs_ahead: bool = False


Answer: TypeAlias = "wire.Message | RolloutdError | None"
"""To the step before, or to one that ran ahead; None where there is none to wait for."""
Steps: TypeAlias = "Generator[Step, Answer, None]"
"""Is sent answers; after an error nothing but the abort follows."""


def device_memory(handle: DeviceHandle, *, peers: bool = False) -> wire.DeviceMemory:
    """Return a handle as the daemon is told of it."""
    return wire.DeviceMemory(
        gpu=handle.gpu,
        num_bytes=handle.num_bytes,
        allocation=handle.allocation,
        offset=handle.offset,
        peers=peers,
    )
