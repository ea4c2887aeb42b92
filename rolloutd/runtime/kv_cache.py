"""The block tensors and their byte arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rolloutd.config import EngineConfig
from rolloutd.errors import ConfigError

from .memory import in_large_pages

CPU_CACHE_FRACTION = 0.25
"""Of the free memory, on a CPU: the rest belongs to the trainer beside us."""


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one attention layer stores of a token."""

    num_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [N blocks, B tokens, K heads, D] each.

    On a CPU what a head has of a block lies in one piece, as it is read there: one head after the other in a block.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block_size: int

    @classmethod
    def allocate(
        cls, layers: Sequence[KVLayer], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Return zeroed blocks; on a CPU the system hands out their memory as it is first written."""

        def blocks(num_heads: int, head_dim: int) -> Tensor:
            if device.type != "cpu":
                return torch.zeros((num_blocks, block_size, num_heads, head_dim), dtype=dtype, device=device)
            by_head = torch.zeros((num_blocks, num_heads, block_size, head_dim), dtype=dtype)
            return in_large_pages(by_head).transpose(1, 2)

        keys = tuple(blocks(layer.num_heads, layer.key_dim) for layer in layers)
        values = tuple(blocks(layer.num_heads, layer.value_dim) for layer in layers)
        return cls(keys, values, block_size)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole blocks, all layers; no target is also a source."""
        if not sources:
            return
        device = self.keys[0].device
        source = torch.tensor(sources, device=device)
        target = torch.tensor(targets, device=device)
        for cache in (*self.keys, *self.values):
            cache.index_copy_(0, target, cache.index_select(0, source))


def bytes_per_block(layers: Sequence[KVLayer], block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block, all layers: tokens x heads x (key + value) x itemsize."""
    elements = sum(layer.num_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    return block_size * elements * dtype.itemsize


def num_blocks_for(
    config: EngineConfig, *, block_bytes: int, max_model_len: int, workspace_bytes: int, device: torch.device
) -> int:
    """Return how many blocks the memory budget buys; `ConfigError` where not even one full-length sequence fits.

    `workspace_bytes` is what a step needs beside weights and cache; it is kept free on a GPU.
    """
    per_sequence = -(-max_model_len // config.block_size)
    budget = config.kv_cache_bytes
    if budget is None:
        budget = _cuda_budget(config, workspace_bytes, device) if device.type == "cuda" else _cpu_budget()
    blocks = min(budget // block_bytes, per_sequence * config.max_num_seqs)
    if blocks < per_sequence:
        remedy = "--kv-cache-bytes" if device.type == "cpu" or config.kv_cache_bytes else "--gpu-memory-utilization"
        need_mib, have_mib = per_sequence * block_bytes / 2**20, budget / 2**20
        raise ConfigError(
            f"max_model_len={max_model_len} needs {per_sequence} KV blocks ({need_mib:.1f} MiB), the budget of "
            f"{have_mib:.1f} MiB buys {blocks}. Lower --max-model-len or raise {remedy}."
        )
    return int(blocks)


def workspace_bytes(config: EngineConfig, vocab_size: int, num_activations: int) -> int:
    """Return what a full step needs: logits in fp32, three copies while sampling, and the widest activations."""
    logits = 3 * 4 * config.max_num_seqs * vocab_size
    return logits + 4 * config.max_num_batched_tokens * num_activations


def _cpu_budget() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(int(line.split()[1]) * 1024 * CPU_CACHE_FRACTION)
    return 1 << 30


def _cuda_budget(config: EngineConfig, workspace: int, device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(total * config.gpu_memory_utilization) - (total - free) - workspace)
