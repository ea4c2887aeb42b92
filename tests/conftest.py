"""Shared fixtures: tiny models on disk, built once per session, and an environment that never asks the network."""

from __future__ import annotations

import os

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def has_gpu() -> bool:
    """Return whether an NVIDIA driver is loaded, without importing torch."""
    return Path("/dev/nvidiactl").exists()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` where there is none: they are not skipped tests, they are another machine's tests."""
    if has_gpu():
        return
    others = [item for item in items if item.get_closest_marker("gpu")]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(kind="qwen2", **options)` returns a model folder; equal arguments share one: do not write there.

    Options are those of `tests/tiny_models.py: build`.
    """
    folder = tmp_path_factory.mktemp("tiny_models")

    def factory(kind: str = "qwen2", **options: Any) -> Path:
        from tests.tiny_models import build

        key = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:12]
        out_dir = folder / f"{kind}-{key}"
        return out_dir if out_dir.exists() else build(kind, out_dir, **options)

    return factory
