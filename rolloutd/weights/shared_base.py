"""A trainer's frozen parameters in memory of its own that a daemon on the same GPU reads too: the base exists once.

The trainer owns the memory, so that a daemon that ends takes nothing with it; how it is laid out the daemon says. What
is trained has no place here: another process cannot know when an optimizer writes. Under LoRA that is the adapter,
which travels as ever.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rolloutd.errors import ConfigError, first_line

from .adoption import AdoptedParameters
from .device_memory import DeviceHandle, DeviceSegment, is_shareable
from .manifest import TensorSpec
from .tensors import spec_of


class SharedBase:
    """One module's parameters, adapters aside, and the memory that they move to."""

    def __init__(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if ".lora_" not in name and parameter.requires_grad:
                raise ConfigError(
                    f"{name} is trained, and a daemon in another process cannot know when it changes. Adopt a frozen "
                    "base (under LoRA), or use update_weights."
                )
        self.share_id = secrets.token_hex(16)
        """Names what the daemon reads, so that nobody else ends it."""
        self._parameters = AdoptedParameters(module)
        devices = {tensor.device for tensor in self.tensors().values()}
        if len(devices) != 1 or not is_shareable(*devices):
            found = ", ".join(sorted(map(str, devices))) or "nothing"
            raise ConfigError(f"adopt() shares the memory of one GPU; the module lies on {found}. Use update_weights.")
        self._device = devices.pop()
        self._segments: list[DeviceSegment] = []

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters as tensors."""
        return self._parameters.tensors()

    def specs(self) -> list[TensorSpec]:
        """Return name, dtype and shape of each."""
        return [spec_of(name, tensor) for name, tensor in self.tensors().items()]

    def allocate(self, sizes: Sequence[int]) -> list[DeviceHandle]:
        """Make pieces of memory; return how another process finds them. `ConfigError` where there are none."""
        try:
            for num_bytes in sizes:
                self._segments.append(DeviceSegment.create(num_bytes, self._device))
        except RuntimeError as error:
            self.free()
            text = f"no memory that can be shared with the daemon ({first_line(error)}). Use update_weights."
            raise ConfigError(text) from None
        return [segment.handle for segment in self._segments]

    def move_in(self, places: Sequence[tuple[int, int]]) -> None:
        """Make each parameter a view of its place, where its numbers are already."""
        by_name = {spec.name: (spec, *place) for spec, place in zip(self.specs(), places, strict=True)}

        def place_of(name: str, dtype: torch.dtype) -> Tensor:
            spec, piece, first = by_name[name]
            memory = self._segments[piece].buffer.untyped_storage()
            rows = torch.empty(0, dtype=dtype, device=self._device)
            strides = torch.empty(spec.shape, dtype=dtype, device="meta").stride()
            return rows.set_(memory, first, spec.shape, strides)

        self._parameters.move_to(place_of)

    def move_out(self) -> None:
        """Give each parameter memory of its own."""
        self._parameters.release()

    def free(self) -> None:
        """Let go of the memory, which nobody reads any more."""
        for segment in self._segments:
            with contextlib.suppress(RuntimeError):
                segment.close()
        self._segments = []
