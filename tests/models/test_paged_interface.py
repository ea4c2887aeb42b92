"""What the probe reads from modelling code: windows from mask functions, layers from calls, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from rolloutd.errors import ModelUnsupported
from rolloutd.models.paged_interface import PROBE, AttentionLayer, Probe, probing, register, window_of
from rolloutd.runtime.kv_cache import KVLayer
from rolloutd.runtime.ops import AttentionSpec

CPU = torch.device("cpu")
register()


@pytest.mark.parametrize("window", [1, 2, 7, 50, 99])
def test_a_sliding_window_is_measured(window: int) -> None:
    assert window_of(sliding_window_causal_mask_function(window), 100, CPU) == window


@pytest.mark.parametrize(
    "mask", [causal_mask_function, sliding_window_causal_mask_function(100), sliding_window_causal_mask_function(101)]
)
def test_a_mask_that_reaches_all_positions_has_no_window(mask: Callable[..., Tensor]) -> None:
    assert window_of(mask, 100, CPU) is None


def holes(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key != 40)


def two_windows(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - torch.where(query < 50, 5, 10))


def of_data(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(7, dtype=torch.bool)[key]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (bidirectional_mask_function, "later tokens"),
        (chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.long)), "neither causal nor a sliding window"),
        (holes, "neither causal nor a sliding window"),
        (two_windows, "neither causal nor a sliding window"),
        (of_data, "depends on more than positions"),
    ],
)
def test_other_masks_are_refused_with_the_reason(mask: Callable[..., Tensor], words: str) -> None:
    found = window_of(mask, 100, CPU)
    assert isinstance(found, str)
    assert words in found


def attend(probe: Probe, heads: int = 4, kv_heads: int = 2, keys: int = 5, **options: Any) -> Tensor:
    """Call attention as modelling code does, five tokens of one sequence."""
    query, key, value = (
        torch.randn(1, heads, 5, 8),
        torch.randn(1, kv_heads, keys, 8),
        torch.randn(1, kv_heads, keys, 6),
    )
    mask = options.pop("attention_mask", None)
    with probing(probe):
        out: Tensor = AttentionInterface()[PROBE](nn.Module(), query, key, value, mask, **options)[0]
    return out


def mask_of(probe: Probe, window: int) -> Tensor:
    function = sliding_window_causal_mask_function(window)
    with probing(probe):
        mask: Tensor = AttentionMaskInterface()[PROBE](
            batch_size=1, q_length=5, kv_length=5, mask_function=function, device=CPU, dtype=torch.float32
        )
    return mask


def test_each_call_is_a_layer_with_what_it_stores_and_how_it_attends() -> None:
    probe = Probe("M", num_tokens=5, num_positions=100)
    narrow, wide = mask_of(probe, 3), mask_of(probe, 60)
    assert attend(probe, scaling=0.5, dropout=0.0, sliding_window=None, attention_mask=wide).shape == (1, 5, 4, 6)
    attend(probe, softcap=30.0, attention_mask=narrow, position_ids=torch.arange(5)[None])
    attend(probe, s_aux=None, is_causal=True)
    kv = KVLayer(2, 8, 6)
    assert probe.layers == [
        AttentionLayer(kv, AttentionSpec(0.5, 60, None)),
        AttentionLayer(kv, AttentionSpec(8**-0.5, 3, 30.0)),
        AttentionLayer(kv, AttentionSpec(8**-0.5, None, None)),
    ]


def test_a_mask_that_was_copied_is_known_by_its_values_unless_two_windows_share_them() -> None:
    probe = Probe("M", num_tokens=5, num_positions=100)
    mask = mask_of(probe, 60)
    attend(probe, attention_mask=mask[:, :, :, :5].clone())
    assert probe.layers[0].spec.window == 60
    mask_of(probe, 70)  # within five tokens the same values
    with pytest.raises(ModelUnsupported, match=r"M cannot run .*changes the attention mask"):
        attend(probe, attention_mask=mask.clone())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"position_bias": torch.zeros(1, 4, 5, 5)}, "adds a bias"),
        ({"indices": torch.zeros(1, 5, 2)}, "index of its own"),
        ({"novelty": 3}, "passes 'novelty' to attention"),
        ({"keys": 4}, "other than the tokens' own keys"),
        ({"heads": 3}, "3 query heads do not share 2 key"),
        ({"scaling": torch.ones(5)}, "scaled by a tensor"),
        ({"attention_mask": torch.randn(1, 1, 5, 5)}, "changes the attention mask"),
    ],
)
def test_what_the_cache_cannot_express_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"M cannot run over the paged KV cache: .*{words}"):
        attend(Probe("M", num_tokens=5, num_positions=100), **options)
