"""Rollout generation for RL training of language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout kernels/ and integrations/ lie beside this package; in a wheel they lie inside it.
_CHECKOUT = Path(__file__).parent.parent
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))

from .config import EngineConfig, ServerConfig  # noqa: E402
from .errors import RolloutdError  # noqa: E402
from .outputs import CompletionOutput, RequestOutput, WeightUpdate  # noqa: E402
from .parity import ParityProbe  # noqa: E402
from .sampling_params import SamplingParams  # noqa: E402
from .version import __version__ as __version__  # noqa: E402

if TYPE_CHECKING:
    from .llm import LLM
    from .serve.client import AsyncRolloutClient, RolloutClient


__all__ = [
    "LLM",
    "AsyncRolloutClient",
    "CompletionOutput",
    "EngineConfig",
    "ParityProbe",
    "RequestOutput",
    "RolloutClient",
    "RolloutdError",
    "SamplingParams",
    "ServerConfig",
    "WeightUpdate",
]

# torch and zmq load only when asked for: `rolloutd --help` and the front process need neither.
_LAZY = {"LLM": ".llm", "RolloutClient": ".serve.client", "AsyncRolloutClient": ".serve.client"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
