"""A runner without a model: it keeps in each KV slot the token that was stored there, and checks what it reads.

Every draw first walks its sequence's block table and asserts that the whole history lies there, in place. A wrong
fork, copy, eviction or preemption is thus an assertion in the step where it happens, not a wrong number later.
"""

from __future__ import annotations

import hashlib
import math
import random

from rolloutd.engine.sequence import Batch, Chunk, SampledTokens, Sequence

VOCAB = 50


class OracleRunner:
    """Samples `next_token(history, seed, index)`; counts what it computed."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}
        self.num_steps = 0
        self.num_tokens = 0
        self.max_batch_tokens = 0
        self.max_seqs = 0

    def run(self, batch: Batch) -> SampledTokens:
        before = dict(self.slots)
        for copy in batch.copies:
            for offset in range(self.block_size):
                if (copy.source, offset) in before:
                    self.slots[copy.target, offset] = before[copy.source, offset]
        written: set[tuple[int, int]] = set()
        for chunk in batch.chunks:
            for position in range(chunk.start, chunk.end):
                slot = self._slot(chunk.sequence, position)
                assert slot not in written, "two sequences of one step write one slot"
                written.add(slot)
                self.slots[slot] = chunk.sequence.token_ids[position]
        for chunk in batch.chunks:
            self._check_history(chunk)
        self.num_steps += 1
        self.num_tokens += batch.num_tokens
        self.max_batch_tokens = max(self.max_batch_tokens, batch.num_tokens)
        self.max_seqs = max(self.max_seqs, len(batch.chunks))
        token_ids = [next_token(d.sequence.token_ids, d.sequence.group.seed, d.sequence.index) for d in batch.draws]
        scores = [self._scores(chunk) for chunk in batch.chunks]
        candidates = {
            i: next_candidates(draw.sequence.token_ids)[: draw.sequence.group.beam.num_candidates]
            for i, draw in enumerate(batch.draws)
            if draw.sequence.group.beam is not None
        }
        return SampledTokens(token_ids, [-1.0] * len(token_ids), [-0.5] * len(token_ids), scores, candidates)

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.block_size)
        return sequence.block_table[index], offset

    def _check_history(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        seen = [self.slots.get(self._slot(sequence, position)) for position in range(chunk.end)]
        assert seen == sequence.token_ids[: chunk.end], "the KV that a sequence reads is not its own history"

    @staticmethod
    def _scores(chunk: Chunk) -> list[float]:
        prompt = chunk.sequence.group.prompt_token_ids
        return (
            [float(-t) for t in prompt[chunk.start + 1 : chunk.end + 1]] if chunk.sequence.group.scores_prompt else []
        )


def next_token(history: list[int], seed: int, index: int) -> int:
    """Return a token that depends on everything it should depend on, and on nothing else."""
    digest = hashlib.blake2b(repr((history, seed, index)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def next_candidates(history: list[int]) -> list[tuple[int, float]]:
    """Return every token with a log-probability that depends on the whole history, the most likely first."""
    digest = hashlib.blake2b(repr(history).encode(), digest_size=8).digest()
    rng = random.Random(digest)
    weights = [rng.expovariate(1.0) + 1e-3 for _ in range(VOCAB)]
    total = math.log(sum(weights))
    return sorted(((i, math.log(w) - total) for i, w in enumerate(weights)), key=lambda pair: -pair[1])


def expected_beams(
    prompt: list[int], *, width: int, n: int, max_tokens: int, stop: frozenset[int], length_penalty: float, early: bool
) -> list[tuple[float, list[int]]]:
    """Return (score, tokens) of a beam search written down without blocks: every beam is a list of tokens."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, max_tokens + 1):
        options = [
            (score + logp, [*tokens, token])
            for score, tokens in live
            for token, logp in next_candidates([*prompt, *tokens])
        ]
        options.sort(key=lambda option: -option[0])
        ends = [length == max_tokens or tokens[-1] in stop for _, tokens in options]
        complete = [
            (score / length**length_penalty, tokens)
            for (score, tokens), end in list(zip(options, ends, strict=True))[:width]
            if end
        ]
        done = sorted(done + complete, key=lambda option: -option[0])[:width]
        live = [option for option, end in zip(options, ends, strict=True) if not end][:width]
        if not live or (len(done) == width and (early or live[0][0] / length**length_penalty <= done[-1][0])):
            break
    return done[:n]


def expected_output(prompt: list[int], *, seed: int, index: int, max_tokens: int, stop: frozenset[int]) -> list[int]:
    """Return what a sequence must sample, alone or in any company."""
    history = list(prompt)
    for _ in range(max_tokens):
        history.append(next_token(history, seed, index))
        if history[-1] in stop:
            break
    return history[len(prompt) :]
