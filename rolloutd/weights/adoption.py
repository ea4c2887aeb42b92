"""A trainer's parameters in the engine's own memory: the weights exist once, and a sync is a new version.

The engine keeps query, key and value in one matrix, gate and up in one. A parameter that is adopted becomes a view of
its rows there: the trainer goes on with the same `nn.Parameter`, optimizer and gradients, and writes where the engine
reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rolloutd.errors import ConfigError, StaleWeights

from .names import canonical_name


class AdoptedParameters:
    """Parameters of one module, by canonical name, and what they were when their version began to serve."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {
            canonical_name(name): parameter
            for name, parameter in module.named_parameters()
            if ".lora_" not in name  # an adapter is pushed by update_lora
        }
        self._seen: dict[str, tuple[int, int]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters as tensors."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def move_to(self, place_of: Callable[[str, torch.dtype], Tensor | None]) -> None:
        """Make each parameter a view of its place; `ConfigError`, and nothing moved, where one has none."""
        places = {}
        for name, parameter in self._parameters.items():
            place = place_of(name, parameter.dtype)
            if place is None or (place.shape, place.device) != (parameter.shape, parameter.device):
                raise ConfigError(
                    f"{name} ({parameter.dtype}, {list(parameter.shape)}, {parameter.device}) does not lie in the "
                    "engine as the trainer holds it. Adopt a whole module without sharding, in the engine's dtype and "
                    "on its device; else use update_weights alone."
                )
            places[name] = place
        for name, parameter in self._parameters.items():
            parameter.data = places[name]
        self.note()

    def release(self) -> None:
        """Give each parameter memory of its own again."""
        for parameter in self._parameters.values():
            parameter.data = parameter.detach().clone()

    def note(self) -> None:
        """Take the numbers of now as those that serve."""
        self._seen = {name: _state(parameter) for name, parameter in self._parameters.items()}

    def check_unchanged(self, version: int) -> None:
        """Raise `StaleWeights` where a parameter was written to, or moved, since its version began to serve."""
        for name, parameter in self._parameters.items():
            if self._seen[name] != _state(parameter):
                raise StaleWeights(
                    f"{name} was changed since version {version} began to serve, and the engine reads the trainer's "
                    "own memory. Call update_weights(module.named_parameters()) after each optimizer step."
                )

    def check_are_mine(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Raise `ConfigError` unless these are the adopted parameters, in the engine's memory."""
        names = set()
        for raw, tensor in named_tensors:
            name = canonical_name(raw)
            if ".lora_" in name:
                continue
            names.add(name)
            mine = self._parameters.get(name)
            if mine is None or tensor.data_ptr() != mine.data_ptr() or self._seen[name][0] != mine.data_ptr():
                raise ConfigError(
                    f"{name} is not the parameter that was adopted, or was moved since. Push the adopted module's "
                    "named_parameters(), or call release() first."
                )
        missing = sorted(self._parameters.keys() - names)
        if missing:
            raise ConfigError(
                f"{len(missing)} adopted parameters did not come, such as {missing[0]}. Push all of them."
            )


def _state(parameter: nn.Parameter) -> tuple[int, int]:
    """Return where a parameter lies and how often torch has written to it."""
    return parameter.data_ptr(), parameter._version
