"""Runs: several decode steps decided at once, so that a device need not wait for the host after each.

Blocks are reserved for the whole run. The run that follows may be launched before the tokens of this one are known: a
sequence that turns out to have ended computes in vain, on the device to no effect, and is left out of the next.
"""

from __future__ import annotations

from .block_manager import BlockManager
from .sequence import Batch, Chunk, Draw, Sequence, SequenceState

TAIL_ROWS = 32
"""With as few sequences as this, runs are half as long: what is computed in vain after an end weighs more."""


def long_run(batch: Batch, blocks: BlockManager, max_steps: int) -> Batch:
    """Return `batch` as a run of up to `max_steps`, or as it is where a step needs the host or blocks are short."""
    if (
        not batch.chunks
        or batch.copies
        or len(batch.draws) != len(batch.chunks)
        or not all(map(_may_run, batch.chunks))
    ):
        return batch
    num_steps = _num_steps(batch.chunks, max_steps)
    if num_steps < 2 or not _reserve(batch.chunks, num_steps, blocks):
        return batch
    return Batch(batch.chunks, batch.draws, (), num_steps)


def continued_run(run: Batch, blocks: BlockManager, max_steps: int) -> Batch | None:
    """Return the run after `run`, whose tokens are not known yet; None where nothing is left or blocks are short."""
    chunks = tuple(
        Chunk(chunk.sequence, start, 1)
        for chunk in run.chunks
        if (start := chunk.start + run.num_steps) < _end(chunk.sequence)
        and chunk.sequence.state is SequenceState.RUNNING
    )
    if not chunks:
        return None
    num_steps = max(2, _num_steps(chunks, max_steps))  # a single step would be one for the host
    if not _reserve(chunks, num_steps, blocks):
        return None
    draws = tuple(Draw(chunk.sequence, i) for i, chunk in enumerate(chunks))
    return Batch(chunks, draws, (), num_steps, continues=True)


def _may_run(chunk: Chunk) -> bool:
    """Return whether a chunk only goes on decoding, with draws that need nothing from the host."""
    sequence = chunk.sequence
    group = sequence.group
    if chunk.length != 1 or sequence.num_output == 0 or not group.draws_without_host:
        return False
    return sequence.num_output >= group.params.min_tokens or not group.stop_token_ids


def _num_steps(chunks: tuple[Chunk, ...], max_steps: int) -> int:
    """Return the length of a run of these chunks: no longer than the longest of them can go on."""
    if len(chunks) <= TAIL_ROWS:
        max_steps = max(2, max_steps // 2)
    return min(max_steps, max(_end(chunk.sequence) - chunk.start for chunk in chunks))


def _end(sequence: Sequence) -> int:
    """Return the position after the last token that the sequence ever computes: the last one sampled is not."""
    return len(sequence.group.prompt_token_ids) + sequence.group.params.max_tokens - 1


def _reserve(chunks: tuple[Chunk, ...], num_steps: int, blocks: BlockManager) -> bool:
    """Give each sequence the blocks of the run; False, and nothing given, where they do not suffice."""
    short: list[tuple[Sequence, int]] = []
    num_new = 0
    for chunk in chunks:
        sequence = chunk.sequence
        end = min(chunk.start + num_steps, _end(sequence))
        if end > sequence.num_writable:
            num_tokens = end - sequence.num_computed
            num_new += blocks.num_new_blocks(sequence, num_tokens)
            short.append((sequence, num_tokens))
    if num_new > blocks.num_available:
        return False
    for sequence, num_tokens in short:
        copy = blocks.prepare_write(sequence, num_tokens)
        assert copy is None, "what a decoding sequence has written is its own"
    return True
