"""transformers' attention interface over the paged KV cache: what modelling code calls in place of its own attention.

Two functions are registered with transformers. `PAGED` stores and attends; `PROBE` runs once, at load, and learns what
each layer stores and how it attends. Neither finds state of its own: both read a context variable that is set for
the duration of one forward pass, because not every architecture hands keyword arguments down to its attention.

Layers are told apart by the order of their calls, so that one module which is called twice owns two layers of KV.
Shapes as in runtime/ops.py; modelling code passes [1, heads, T, D] and takes [1, T, heads, D] back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rolloutd.errors import ModelUnsupported
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.kv_cache import KVCache, KVLayer
from rolloutd.runtime.ops import AttentionSpec, Ops

PAGED, PROBE = "rolloutd_paged", "rolloutd_probe"

_HARMLESS = frozenset(
    {
        "dropout",  # 0 in evaluation mode
        "cache_position",
        "cu_seqlens",
        "is_causal",  # the mask decides, as with eager attention
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",  # the mask decides, as with eager attention
        "use_cache",
    }
)
"""Options that modelling code hands to attention and that change nothing here."""

_REASONS = {
    "s_aux": "its attention has sinks, which the paged attention lacks",
    "sinks": "its attention has sinks, which the paged attention lacks",
    "position_bias": "it adds a bias to attention scores",
    "indices": "its attention picks tokens by an index of its own",
    "block_indices": "its attention picks blocks by an index of its own",
}


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One call of attention in a forward pass."""

    kv: KVLayer
    spec: AttentionSpec


@dataclass(slots=True)
class PagedCall:
    """One forward pass: what its attention layers read and write."""

    ops: Ops
    inputs: ForwardInputs
    cache: KVCache
    layers: tuple[AttentionLayer, ...]
    num_calls: int = 0


@dataclass(slots=True)
class Probe:
    """What one forward pass of a few tokens tells about the attention layers."""

    architecture: str
    num_tokens: int
    num_positions: int
    """Positions that will be served: a window at least this wide is none."""
    layers: list[AttentionLayer] = field(default_factory=list)
    masks: list[tuple[Tensor, int | None]] = field(default_factory=list)
    """Masks that the modelling code asked for, each with its window."""

    def refuse(self, reason: str) -> NoReturn:
        """Raise `ModelUnsupported` with what keeps the architecture from running."""
        raise ModelUnsupported(f"{self.architecture} cannot run over the paged KV cache: {reason}.")


_call: ContextVar[PagedCall] = ContextVar("rolloutd_paged_call")
_probe: ContextVar[Probe] = ContextVar("rolloutd_probe")


@contextmanager
def paged(call: PagedCall) -> Iterator[PagedCall]:
    """Let attention of this thread's forward pass go to `call`."""
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


@contextmanager
def probing(probe: Probe) -> Iterator[Probe]:
    """Let attention of this thread's forward pass be recorded by `probe`."""
    token = _probe.set(probe)
    try:
        yield probe
    finally:
        _probe.reset(token)


def register() -> None:
    """Make both functions known to transformers; to do so again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PAGED, _paged_attention)
    AttentionInterface.register(PROBE, _probed_attention)
    # Only the probe asks for masks. Without an entry transformers builds none, dense ones would be T x T.
    AttentionMaskInterface.register(PROBE, _probed_mask)


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Store the step's keys and values and attend over what is cached; returns [1, T, H, W] and no weights."""
    call = _call.get()
    assert _unknown(options) is None, f"attention got {_unknown(options)!r}, as it did not at load"
    index, call.num_calls = call.num_calls, call.num_calls + 1
    assert index < len(call.layers), "more attention layers than at load"
    q_THD, k_TKD, v_TKW = (states[0].transpose(0, 1) for states in (query, key, value))
    keys, values = call.cache.keys[index], call.cache.values[index]
    call.ops.store_kv(k_TKD, v_TKW, keys, values, call.inputs)
    out_THW = call.ops.paged_attention(q_THD, keys, values, call.inputs, call.layers[index].spec)
    return out_THW[None].to(value.dtype), None


def _unknown(options: Mapping[str, Any]) -> str | None:
    """Return the name of an option that asks for more than the paged attention does."""
    asked = (name for name, value in options.items() if value is not None and value is not False)
    return next((name for name in asked if name not in _HARMLESS), None)


def _probed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Record the layer; returns plain causal attention, so that what follows sees sensible numbers."""
    probe = _probe.get()
    unknown = _unknown(options)
    if unknown is not None:
        probe.refuse(_REASONS.get(unknown, f"it passes {unknown!r} to attention, of which nothing is known"))
    if any(states.ndim != 4 or states.shape[0] != 1 for states in (query, key, value)):
        probe.refuse("it attends over another batch than the step's tokens")
    if not query.shape[2] == key.shape[2] == value.shape[2] == probe.num_tokens:
        probe.refuse("it attends over something other than the tokens' own keys")
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        probe.refuse(f"{query.shape[1]} query heads do not share {key.shape[1]} key and {value.shape[1]} value heads")
    if not isinstance(scaling, int | float | None) or not isinstance(softcap, int | float | None):
        probe.refuse("its attention scores are scaled by a tensor")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    spec = AttentionSpec(scale=scale, window=_window_of(probe, attention_mask), softcap=softcap)
    probe.layers.append(AttentionLayer(KVLayer(key.shape[1], key.shape[3], value.shape[3]), spec))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2), None


def _window_of(probe: Probe, mask: Tensor | None) -> int | None:
    """Return the window of the mask that reached a layer, recognised by identity or, copied on its way, by value."""
    if mask is None:
        return None
    for known, window in probe.masks:
        if mask is known:
            return window
    windows = {window for known, window in probe.masks if mask.shape == known.shape and torch.equal(mask, known)}
    if len(windows) != 1:
        probe.refuse("it changes the attention mask on the way to its layers")
    return windows.pop()


def _probed_mask(
    *, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], device: torch.device, **options: Any
) -> Tensor:
    """Return a mask of the probe's tokens [1, 1, T, T], 0 or -inf, and remember its window."""
    probe = _probe.get()
    window = window_of(mask_function, probe.num_positions, device)
    if isinstance(window, str):
        probe.refuse(window)
    query = torch.arange(q_length, device=device)[:, None]
    allowed = _evaluate(mask_function, query, torch.arange(kv_length, device=device))
    dtype = options.get("dtype", torch.float32)
    mask = torch.zeros(1, 1, q_length, kv_length, device=device, dtype=dtype).masked_fill(~allowed, float("-inf"))
    probe.masks.append((mask, window))
    return mask


def window_of(mask_function: Callable[..., Tensor], num_positions: int, device: torch.device) -> int | str | None:
    """Return how many tokens back the mask reaches, itself included; None for all; a text where it is no such mask.

    `mask_function` maps (batch, head, query index, key index) to whether the query sees the key. It is asked for the
    last position and, from what that shows, for those around the window's edge.
    """
    last = num_positions - 1
    keys = torch.arange(num_positions, device=device)
    try:
        width = int(_evaluate(mask_function, torch.tensor(last, device=device), keys).sum())
        edges = {0, 1, 2, width - 1, width, width + 1, 2 * width, last // 2, last - 1, last}
        for query in sorted(edge for edge in edges if 0 <= edge <= last):
            seen = _evaluate(mask_function, torch.tensor(query, device=device), keys)
            if seen[query + 1 :].any():
                return "it attends to later tokens"
            if not torch.equal(seen, (keys <= query) & (keys > query - width)):
                return "its attention mask is neither causal nor a sliding window"
    except (IndexError, RuntimeError) as error:
        return f"its attention mask depends on more than positions ({error})"
    return None if width == num_positions else width


def _evaluate(mask_function: Callable[..., Tensor], query: Tensor, key: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.long, device=key.device)
    seen = torch.as_tensor(mask_function(zero, zero, query, key), device=key.device)
    return seen.broadcast_to((query + key).shape)
