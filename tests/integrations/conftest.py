"""Models of the adapter's tests, and freedom from warnings that transformers, trl and torch raise about themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much to them where tests run beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
