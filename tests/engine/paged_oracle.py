"""A runner without a model: it keeps in each KV slot the token that was stored there, and checks what it reads.

Every draw first walks its sequence's block table and asserts that the whole history lies there, in place. A wrong
fork, copy, eviction or preemption is thus an assertion in the step where it happens, not a wrong number later.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from dataclasses import dataclass, field

from rolloutd.engine.sequence import Batch, Chunk, Handle, SampledRun, SampledTokens, Sequence
from rolloutd.errors import OutOfMemory

VOCAB = 50


class OracleRunner:
    """Samples `next_token(history, seed, index)`; counts what it computed.

    Runs are computed as late as can be, when an answer is asked for, as on a device that is slow: all that the host did
    to blocks meanwhile must not matter.
    """

    def __init__(self, block_size: int, max_steps: int = 1) -> None:
        self.block_size = block_size
        self.max_steps = max_steps
        self.memory_tokens = 1 << 30
        """Tokens of the largest batch that it has memory for."""
        self.launched: deque[_Run] = deque()
        self.on_device: dict[Sequence, _Row] = {}
        self.num_runs = 0
        self.num_continued = 0
        self.num_vain_steps = 0
        self.slots: dict[tuple[int, int], int] = {}
        self.num_steps = 0
        self.num_tokens = 0
        self.max_batch_tokens = 0
        self.max_seqs = 0

    def run(self, batch: Batch) -> Handle:
        if batch.num_tokens > self.memory_tokens:
            raise OutOfMemory(f"no memory for {batch.num_tokens} tokens.")
        if batch.num_steps > 1:
            return self._launch(batch)
        assert not self.launched, "a step that needs the host came while a run is on the device"
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

    def _launch(self, batch: Batch) -> _Run:
        assert not batch.copies
        assert all(
            draw == (chunk.sequence, i) for i, (draw, chunk) in enumerate(zip(batch.draws, batch.chunks, strict=True))
        )
        assert batch.continues == bool(self.launched)
        rows = []
        for sequence, start, length in batch.chunks:
            assert length == 1
            if not batch.continues:
                self.on_device[sequence] = _Row(sequence, list(sequence.token_ids))
            row = self.on_device[sequence]
            row.table = list(sequence.block_table)
            assert row.start_next == start or not batch.continues
            row.start_next = start + batch.num_steps
            rows.append(row)
        run = _Run(self, rows, batch.num_steps)
        self.launched.append(run)
        self.num_runs += 1
        self.num_continued += batch.continues
        return run

    def compute_until(self, last: _Run) -> None:
        while self.launched:
            run = self.launched.popleft()
            for _ in range(run.num_steps):
                for i, row in enumerate(run.rows):
                    run.add(i, self._step_of(row))
            if run is last:
                return
        raise AssertionError("an answer was read twice")

    def _step_of(self, row: _Row) -> int | None:
        """Return the row's next token, or None if it has ended."""
        if row.done:
            self.num_vain_steps += 1
            return None
        group, position = row.sequence.group, len(row.history) - 1
        slots = [(row.table[p // self.block_size], p % self.block_size) for p in range(position + 1)]
        self.slots[slots[-1]] = row.history[-1]
        assert [self.slots.get(slot) for slot in slots] == row.history, "the KV that a row reads is not its own history"
        token_id = next_token(row.history, group.seed, row.sequence.index)
        row.history.append(token_id)
        num_output = len(row.history) - len(group.prompt_token_ids)
        row.done = token_id in group.stop_token_ids or num_output >= group.params.max_tokens
        return token_id

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


@dataclass(eq=False)
class _Row:
    """What the device knows of a sequence."""

    sequence: Sequence
    history: list[int]
    table: list[int] = field(default_factory=list)
    start_next: int = 0
    done: bool = False


@dataclass(eq=False)
class _Run:
    """A run on the device."""

    oracle: OracleRunner
    rows: list[_Row]
    num_steps: int
    tokens: list[list[int]] = field(default_factory=list)
    is_computed: bool = False

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in self.rows]

    def add(self, i: int, token_id: int | None) -> None:
        self.is_computed = True
        if token_id is not None:
            self.tokens[i].append(token_id)

    def result(self) -> SampledRun:
        if not self.is_computed:
            self.oracle.compute_until(self)

        def filled(value: float) -> list[list[float]]:
            return [[value] * len(tokens) for tokens in self.tokens]

        return SampledRun(self.tokens, filled(-1.0), filled(-0.5))


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
