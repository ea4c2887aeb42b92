"""Full KV blocks by content.

A node stands for one full block after one particular prefix: its key is (parent node, the block's tokens), compared
exactly, so there are no hash collisions. Weights are part of the content: `clear` forgets everything when they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0
"""The node of the empty prefix."""

Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Node:
    """A cached block: `node_id` names the prefix that ends with it."""

    node_id: int
    block: int


class PrefixCache:
    """Finds the blocks that hold a token prefix. Knows nothing of reference counts: the block manager does."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._nodes: dict[Key, Node] = {}
        self._key_of_block: dict[int, Key] = {}
        self._next_id = ROOT + 1

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, block: int) -> bool:
        return block in self._key_of_block

    def match(self, token_ids: Sequence[int], max_blocks: int) -> list[Node]:
        """Return the nodes of the longest cached prefix, at most `max_blocks` of them."""
        nodes: list[Node] = []
        parent, size = ROOT, self._block_size
        for i in range(min(max_blocks, len(token_ids) // size)):
            node = self._nodes.get((parent, tuple(token_ids[i * size : (i + 1) * size])))
            if node is None:
                break
            nodes.append(node)
            parent = node.node_id
        return nodes

    def insert(self, parent: int, token_ids: Sequence[int], block: int) -> int:
        """Register a full block after `parent` and return its node id; a twin that is there already stays."""
        key = (parent, tuple(token_ids))
        node = self._nodes.get(key)
        if node is None:
            node = Node(self._next_id, block)
            self._next_id += 1
            self._nodes[key] = node
            self._key_of_block[block] = key
        return node.node_id

    def drop(self, block: int) -> None:
        """Forget a block that is about to be reused; its descendants become unreachable and go in their turn."""
        key = self._key_of_block.pop(block)
        del self._nodes[key]

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        self._nodes.clear()
        self._key_of_block.clear()
