"""Models of the adapter's tests, and freedom from warnings that transformers, trl and torch raise about themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

THIRD_PARTY = ("ignore:.*:UserWarning:(?!rolloutd)",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for rule in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    """A qwen2 that samples a stop id about once in 50 tokens."""
    return tiny_model("qwen2", extra_eos=8)
