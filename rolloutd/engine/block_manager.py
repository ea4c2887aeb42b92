"""KV blocks: who holds which, reference counts, copy-on-write, and what is evicted when none is free."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from .prefix_cache import PrefixCache
from .sequence import BlockCopy, Sequence


class BlockManager:
    """Owns `num_blocks` blocks of `block_size` tokens.

    Each block is free, held (reference count = number of block tables that name it), or cached: held by nobody but
    still findable by content, and evicted oldest first when the free ones run out.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._cache = PrefixCache(block_size)
        self._free: deque[int] = deque(range(num_blocks))
        self._references = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.peak_used = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, sequence: Sequence, *, whole_blocks_only: bool = False) -> int:
        """Give `sequence` the cached blocks of its longest known prefix; return how many tokens they hold.

        The last token is always left to compute, since its logits are wanted. A block of which only the beginning fits
        is copied when the sequence writes after it.
        """
        assert not sequence.block_table, "a sequence matches its prefix before it holds blocks"
        if not self._enable_prefix_caching or sequence.group.scores_prompt:
            return 0
        nodes, tail = self._cache.match(sequence.token_ids, max_tokens=len(sequence.token_ids) - 1)
        for node in nodes:
            self._hold(node.block)
            sequence.block_table.append(node.block)
        sequence.num_computed = len(nodes) * self.block_size
        sequence.num_registered_blocks = len(nodes)
        if nodes:
            sequence.cache_node = nodes[-1].node_id
        if tail is not None and not whole_blocks_only:
            self._hold(tail.block)
            sequence.block_table.append(tail.block)
            sequence.num_computed += tail.num_tokens
        self.peak_used = max(self.peak_used, self.num_used)
        return sequence.num_computed

    def num_new_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Return how many blocks must be taken so that `sequence` can compute its next `num_tokens`."""
        new = self.blocks_for(sequence.num_computed + num_tokens) - len(sequence.block_table)
        return new + (self._shared_tail(sequence) is not None)

    def prepare_write(self, sequence: Sequence, num_tokens: int) -> BlockCopy | None:
        """Make the slots of the next `num_tokens` of `sequence` its own; return the copy to do first, if any.

        The caller has checked `num_new_blocks` against `num_available`.
        """
        copy: BlockCopy | None = None
        tail = self._shared_tail(sequence)
        if tail is not None:
            source = sequence.block_table[tail]
            target = self._take()
            sequence.block_table[tail] = target
            self._drop_reference(source)
            copy = BlockCopy(source, target)
        else:
            self._take_over_tail(sequence)
        needed = self.blocks_for(sequence.num_computed + num_tokens)
        while len(sequence.block_table) < needed:
            sequence.block_table.append(self._take())
        sequence.num_writable = len(sequence.block_table) * self.block_size
        self.peak_used = max(self.peak_used, self.num_used)
        return copy

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` share all blocks of `parent`; the first of them to write a shared block copies it."""
        assert not child.block_table, "a forked sequence starts with no blocks"
        for block in parent.block_table:
            self._references[block] += 1
        child.block_table = list(parent.block_table)
        child.num_computed = parent.num_computed
        parent.num_writable = child.num_writable = 0
        child.num_registered_blocks = parent.num_registered_blocks
        child.cache_node = parent.cache_node
        child.kv_is_mixed = parent.kv_is_mixed

    def register(self, sequence: Sequence) -> None:
        """Make the full blocks computed so far findable, unless several weight versions computed them."""
        if not self._enable_prefix_caching or sequence.kv_is_mixed:
            return
        size = self.block_size
        for i in range(sequence.num_registered_blocks, sequence.num_computed // size):
            tokens = sequence.token_ids[i * size : (i + 1) * size]
            sequence.cache_node = self._cache.insert(sequence.cache_node, tokens, sequence.block_table[i])
            sequence.num_registered_blocks = i + 1

    def register_tail(self, sequence: Sequence) -> None:
        """Make the last, partly filled block findable; `sequence` is done with it and nobody else holds it."""
        full, rest = divmod(sequence.num_computed, self.block_size)
        if (
            not rest
            or not self._enable_prefix_caching
            or sequence.kv_is_mixed
            or sequence.num_registered_blocks != full
        ):
            return
        block = sequence.block_table[full]
        if self._references[block] == 1 and block not in self._cache:
            tokens = sequence.token_ids[full * self.block_size : sequence.num_computed]
            self._cache.insert_tail(sequence.cache_node, tokens, block)

    def free(self, sequence: Sequence) -> None:
        """Give back all blocks of `sequence`; the last ones first, so that a prefix outlives what follows it."""
        for block in reversed(sequence.block_table):
            self._drop_reference(block)
        sequence.reset_kv()

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: the weights changed. Held blocks stay with their sequences."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._cache.clear()

    def check_invariants(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every block is in exactly one state and counts equal the tables' references."""
        references = Counter(block for sequence in sequences for block in sequence.block_table)
        for block in range(self.num_blocks):
            assert self._references[block] == references[block], f"block {block}: {self._references[block]} references"
        held = {block for block, count in enumerate(self._references) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert held.isdisjoint(free | cached), "a held block is also free or cached"
        assert free.isdisjoint(cached), "a free block is also cached"
        assert len(held) + len(free) + len(cached) == self.num_blocks, "a block leaked"
        assert all(block in self._cache for block in cached), "a cached block cannot be found"

    def _shared_tail(self, sequence: Sequence) -> int | None:
        """Return the index of the partly filled block that the next token goes to, if others read what lies there."""
        index, offset = divmod(sequence.num_computed, self.block_size)
        if not offset:
            return None
        block = sequence.block_table[index]
        is_shared = self._references[block] > 1 or self._cache.num_tokens(block) > offset
        return index if is_shared else None

    def _take_over_tail(self, sequence: Sequence) -> None:
        """Write on in a cached partial block that ends where `sequence` goes on and that only it holds."""
        index, offset = divmod(sequence.num_computed, self.block_size)
        if offset and sequence.block_table[index] in self._cache:
            self._cache.drop(sequence.block_table[index])

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._cache.drop(block)
        self._references[block] = 1
        return block

    def _drop_reference(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._cache:
                self._cached[block] = None
            else:
                self._free.append(block)
