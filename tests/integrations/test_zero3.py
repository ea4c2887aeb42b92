"""The gathering of ZeRO-3 against DeepSpeed's contract: parameters are whole only within `GatheredParameters`.

What stands in for DeepSpeed's context manager counts, and fails where it is told to. DeepSpeed itself gathers in
test_two_processes.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rolloutd import LLM
from rolloutd.integrations.trainer_weights import base_tensors, drain
from tests.digests import digest_of_state


class Partitioned:
    """A model's parameters as ZeRO-3 leaves them: empty, but for those that are gathered."""

    def __init__(self, model: Any) -> None:
        self.whole = {id(parameter): parameter.data.clone() for parameter in model.parameters()}
        self.gathered = self.most = 0
        for parameter in model.parameters():
            parameter.data = torch.empty(0)

    @contextmanager
    def gather(self, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        self.gathered += len(parameters)
        self.most = max(self.most, self.gathered)
        for parameter in parameters:
            parameter.data = self.whole[id(parameter)]
        try:
            yield
        finally:
            self.gathered -= len(parameters)
            for parameter in parameters:
                parameter.data = torch.empty(0)


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model("qwen2", tie=True), dtype=torch.float32)


@pytest.fixture
def partitioned(model: Any, monkeypatch: pytest.MonkeyPatch) -> Partitioned:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    result = Partitioned(model)
    zero = SimpleNamespace(GatheredParameters=result.gather)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))  # type: ignore[arg-type]
    return result


ACCELERATOR = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))


def test_the_digest_served_is_that_of_the_full_state(
    model: Any, partitioned: Partitioned, tiny_model: Callable[..., Path]
) -> None:
    state = {name: partitioned.whole[id(parameter)] for name, parameter in model.named_parameters()}
    with LLM(str(tiny_model("qwen2", tie=True))) as llm:
        update = llm.update_weights(base_tensors(model, ACCELERATOR))
    assert update.digest == digest_of_state(state)
    assert partitioned.most == 1, "one parameter is whole at a time"
    assert partitioned.gathered == 0


def test_a_push_that_fails_leaves_nothing_gathered(model: Any, partitioned: Partitioned) -> None:
    tensors = base_tensors(model, ACCELERATOR)
    next(tensors)
    assert partitioned.gathered == 1
    drain(tensors)  # what the adapter does after an error, so that all ranks go through the same gathers
    assert partitioned.gathered == 0
    assert all(parameter.numel() == 0 for parameter in model.parameters())
