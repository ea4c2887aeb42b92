"""KV blocks by content.

A node stands for one block after one particular prefix: its key is (parent node, the block's tokens), compared exactly,
so there are no hash collisions. The last block of a sequence may be a partial one: a leaf. Weights are part of the
content: `clear` forgets everything when they, or an adapter, change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

ROOT = 0
"""The node of the empty prefix."""
TAILS_COMPARED = 16
"""Of the blocks that begin with the wanted token, so many of the newest are compared token by token."""

Key = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Node:
    """A cached block: `node_id` names the prefix that ends with it."""

    node_id: int
    parent: int
    token_ids: tuple[int, ...]
    block: int


@dataclass(frozen=True, slots=True)
class Tail:
    """The first `num_tokens` of a cached block are wanted; what follows in it is not."""

    block: int
    num_tokens: int


class PrefixCache:
    """Finds the blocks that hold a token prefix. Knows nothing of reference counts: the block manager does."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._nodes: dict[Key, Node] = {}
        self._node_of_block: dict[int, Node] = {}
        self._by_first_token: dict[tuple[int, int], dict[int, Node]] = {}
        """(parent, first token) -> block -> node, oldest first."""
        self._next_id = ROOT + 1

    def __len__(self) -> int:
        return len(self._node_of_block)

    def __contains__(self, block: int) -> bool:
        return block in self._node_of_block

    def num_tokens(self, block: int) -> int:
        """Return how many tokens of `block` can be found; 0 for one that is not cached."""
        node = self._node_of_block.get(block)
        return len(node.token_ids) if node is not None else 0

    def match(self, token_ids: Sequence[int], max_tokens: int) -> tuple[list[Node], Tail | None]:
        """Return the nodes of the longest cached prefix, whole blocks first, within the first `max_tokens`."""
        nodes: list[Node] = []
        parent, size = ROOT, self._block_size
        for i in range(max_tokens // size):
            node = self._nodes.get((parent, tuple(token_ids[i * size : (i + 1) * size])))
            if node is None:
                break
            nodes.append(node)
            parent = node.node_id
        start = len(nodes) * size
        return nodes, self._match_tail(parent, token_ids[start : min(start + size, max_tokens)])

    def _match_tail(self, parent: int, wanted: Sequence[int]) -> Tail | None:
        if not wanted:
            return None
        siblings = self._by_first_token.get((parent, wanted[0]), {})
        best: Tail | None = None
        for node in islice(reversed(siblings.values()), TAILS_COMPARED):
            shared = _common_prefix(node.token_ids, wanted)
            if best is None or shared > best.num_tokens:
                best = Tail(node.block, shared)
        return best

    def insert(self, parent: int, token_ids: Sequence[int], block: int) -> int:
        """Register a whole block after `parent` and return its node id; a twin that is there already stays."""
        key = (parent, tuple(token_ids))
        node = self._nodes.get(key)
        if node is None:
            node = Node(self._next_id, *key, block)
            self._next_id += 1
            self._nodes[key] = node
            self._add(node)
        return node.node_id

    def insert_tail(self, parent: int, token_ids: Sequence[int], block: int) -> None:
        """Register a partial block after `parent`, unless another block already holds its tokens there."""
        found = self._match_tail(parent, token_ids)
        if found is None or found.num_tokens < len(token_ids):
            self._add(Node(self._next_id, parent, tuple(token_ids), block))
            self._next_id += 1

    def _add(self, node: Node) -> None:
        self._node_of_block[node.block] = node
        self._by_first_token.setdefault((node.parent, node.token_ids[0]), {})[node.block] = node

    def drop(self, block: int) -> None:
        """Forget a block that is about to be written; its descendants become unreachable and go in their turn."""
        node = self._node_of_block.pop(block)
        self._nodes.pop((node.parent, node.token_ids), None)
        first = (node.parent, node.token_ids[0])
        siblings = self._by_first_token[first]
        del siblings[block]
        if not siblings:
            del self._by_first_token[first]

    def clear(self) -> None:
        """Forget everything: the weights changed."""
        self._nodes.clear()
        self._node_of_block.clear()
        self._by_first_token.clear()


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens agree from the start."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
