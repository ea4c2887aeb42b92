"""What the processes of one training run tell each other: a short message each, and one error for all.

Messages are JSON in fixed-size byte tensors on a gloo group of our own, so that they need no GPU, meet no other
collective, and wait no longer than the group's timeout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rolloutd.errors import ConfigError, DeadlineExceeded, RolloutdError, error_from_wire

MESSAGE_BYTES = 16384
MAX_ERROR_CHARS = 3000


class Ranks:
    """All processes of the run. Every method but the properties is a collective: all ranks call it, in one order."""

    def __init__(self, rank: int, world_size: int, group: Any, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._group = group

    @classmethod
    def alone(cls) -> Ranks:
        """A run of one process."""
        return cls(0, 1, None, 0.0)

    @classmethod
    def of(cls, num_processes: int, timeout_s: float) -> Ranks:
        """Make the group of a run; a collective. No exchange waits longer than `timeout_s`."""
        if num_processes == 1:
            return cls.alone()
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                f"accelerate reports {num_processes} processes, but torch.distributed is not initialized. "
                "Start the script with `accelerate launch` or `torchrun`."
            )
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size(), group, timeout_s)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which starts the daemon and sends the weights."""
        return self.rank == 0

    def exchange(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return every rank's message, by rank; `DeadlineExceeded` where a rank is gone or does not come."""
        if self.world_size == 1:
            return [dict(message)]
        mine = _to_tensor(message)
        theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
        try:
            dist.all_gather(theirs, mine, group=self._group)
        except RuntimeError as error:
            raise DeadlineExceeded(
                f"rank {self.rank} waited for the other {self.world_size - 1}, at most {self.timeout_s:g} s, and one "
                f"ended or did not come ({str(error).splitlines()[0]}). Its own log says why; to wait longer raise "
                "rollout_server_timeout or ddp_timeout."
            ) from error
        return [_from_tensor(tensor) for tensor in theirs]

    def agree(self, error: Exception | None, facts: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return every rank's facts, or raise on every rank where one has an error.

        A rank with an error of its own raises that; the others raise the same class with the failing rank's message.
        """
        messages = self.exchange({"error": _error_to_wire(error), "facts": dict(facts or {})})
        if error is not None:
            raise error
        _raise_first([message["error"] for message in messages])
        return [message["facts"] for message in messages]


def _raise_first(errors: Sequence[Mapping[str, str] | None]) -> None:
    for rank, error in enumerate(errors):
        if error is None:
            continue
        message = f"{error['message']} (on rank {rank})"
        raise error_from_wire(error["code"], message) if error["code"] else RuntimeError(message)


def _error_to_wire(error: Exception | None) -> dict[str, str] | None:
    if error is None:
        return None
    if isinstance(error, RolloutdError):
        return {"code": error.code, "message": error.message[:MAX_ERROR_CHARS]}
    return {"code": "", "message": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]}


def _to_tensor(message: Mapping[str, Any]) -> torch.Tensor:
    data = json.dumps(message).encode()
    assert len(data) <= MESSAGE_BYTES, f"a message of {len(data)} bytes between ranks"
    return torch.frombuffer(bytearray(data.ljust(MESSAGE_BYTES)), dtype=torch.uint8)


def _from_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    return dict(json.loads(tensor.numpy().tobytes()))
