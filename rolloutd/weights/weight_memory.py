"""Where the weights that serve lie: in the engine's memory, in the host's while it sleeps, or in a trainer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from rolloutd.errors import ConfigError

from .relocation import Relocation
from .store import WeightStore


class ReadsWeights(Protocol):
    """What reads the weights that serve."""

    weights: Any

    def relocate(self, weights: Any) -> None: ...


class WeightMemory:
    """Moves weights between two steps; numbers and versions stay as they are."""

    def __init__(self, runner: ReadsWeights, weights: WeightStore[Any], device: torch.device) -> None:
        self.is_lent = False
        """A trainer reads or writes the base's memory too: it stays where it is, and no full update is written."""
        self._runner = runner
        self._weights = weights
        self._device = device
        self.leaves = device.type != "cpu"
        """The device has memory of its own, which weights can leave for the host's."""
        self._is_away = False

    def lend(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let a trainer write to the base; `ConfigError` where some of these tensors are not what the engine reads."""
        if not self._weights.can_rebuild(tensors):
            raise ConfigError(
                "the engine keeps some parameters twice, in two dtypes, so that a trainer cannot write to both. Use "
                "update_weights alone."
            )
        self._weights.forget_spare()
        self.is_lent = True

    def take_back(self) -> None:
        """The trainer has memory of its own again."""
        self.is_lent = False

    def go_to_host(self) -> None:
        """Leave the device's memory; on a CPU, and where a trainer has the same memory, nothing goes."""
        if self.leaves and not self.is_lent and not self._is_away:
            self._move(torch.device("cpu"))
            self._is_away = True

    def come_back(self) -> None:
        """Undo `go_to_host`."""
        if self._is_away:
            self._move(self._device)
            self._is_away = False

    def is_renewed(self) -> None:
        """New weights serve, which lie on the device."""
        self._is_away = False

    def move_into(self, memory: Sequence[torch.Tensor]) -> None:
        """Read the base from a trainer's memory, of the sizes that were planned."""
        self.come_back()
        self._weights.forget_spare()
        self._runner.relocate(self._weights.relocate_into(self._runner.weights, memory))
        self.is_lent = True

    def move_back(self) -> None:
        """Read the base from the engine's own memory again."""
        if self.is_lent:
            self._move(self._device)
            self.is_lent = False

    def _move(self, device: torch.device) -> None:
        self._runner.relocate(self._weights.relocate(self._runner.weights, Relocation.to(device)))
