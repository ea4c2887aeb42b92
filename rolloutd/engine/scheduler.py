"""Which tokens of which sequences run next: admission, chunked prefill, forking of groups, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from rolloutd.outputs import FinishedCompletion

from .block_manager import BlockManager
from .sequence import Batch, BlockCopy, Chunk, Draw, Group, SampledTokens, Sequence, SequenceState
from .stop import Decode, Finish, check_stop

RunningPolicy = Literal["keep", "recompute", "abort"]
"""What happens to a sequence in flight when the weights change: keep its KV, compute it anew, or end it."""


@dataclass(slots=True)
class Counters:
    """Work counted since the start."""

    num_steps: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sampled_tokens: int = 0
    cached_tokens: int = 0
    block_copies: int = 0


@dataclass(slots=True)
class _Plan:
    """A batch being put together, and what is left of the step's budget."""

    budget: int
    chunks: list[Chunk]
    copies: list[BlockCopy]


class Scheduler:
    """Decides every step. `schedule` gives a batch, `commit` takes what was sampled for it; nothing here computes.

    Running sequences come first, the decoding ones before the prefilling ones; what the budget leaves goes to waiting
    ones in order of arrival. When blocks run out, the youngest running sequence gives up its blocks and is computed
    anew later, with the same tokens.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, decode: Decode | None = None
    ) -> None:
        self.blocks = blocks
        self.counters = Counters()
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._decode = decode
        self._groups: dict[str, Group] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_followers = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a seat: those that compute, and those that wait for their leader's prefill."""
        return len(self._running) + self._num_followers

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def add(self, group: Group) -> None:
        """Queue all sequences of a group."""
        self._groups[group.request_id] = group
        self._waiting.extend(group.sequences)

    def abort(self, request_id: str) -> list[FinishedCompletion]:
        """End what is unfinished of a request and return it as `abort` completions."""
        group = self._groups.get(request_id)
        if group is None:
            return []
        unfinished = [sequence for sequence in group.sequences if sequence.state is not SequenceState.FINISHED]
        self._waiting = deque(sequence for sequence in self._waiting if sequence.group is not group)
        self._running = [sequence for sequence in self._running if sequence.group is not group]
        self._release_followers(group)
        return [self._finish(sequence, Finish("abort")) for sequence in unfinished]

    # ---------------------------------------------------------------- schedule

    def schedule(self) -> Batch:
        """Return what the next step computes; empty where there is no work."""
        plan = _Plan(self._max_num_batched_tokens, [], [])
        decoding = [sequence for sequence in self._running if sequence.num_pending == 1]
        prefilling = [sequence for sequence in self._running if sequence.num_pending > 1]
        preempted = False
        for sequence in chain(decoding, prefilling):
            # An earlier sequence of this loop may have taken this one's blocks.
            if sequence.state is SequenceState.RUNNING and plan.budget > 0:
                preempted |= self._continue(sequence, plan)
        if not preempted:
            self._admit(plan)
        return Batch(tuple(plan.chunks), tuple(self._draws(plan.chunks)), tuple(plan.copies))

    def _continue(self, sequence: Sequence, plan: _Plan) -> bool:
        """Plan the next chunk of a running sequence; return True if somebody had to be preempted for it."""
        length = min(sequence.num_pending, plan.budget)
        preempted = False
        while self.blocks.num_new_blocks(sequence, length) > self.blocks.num_available:
            victim = self._youngest_not_in(plan)
            self._preempt(victim)
            preempted = True
            if victim is sequence:
                return True
        self._add_chunk(sequence, length, plan)
        return preempted

    def _youngest_not_in(self, plan: _Plan) -> Sequence:
        """Return the youngest running sequence that this step does not compute yet; at worst the one that asks."""
        planned = {chunk.sequence for chunk in plan.chunks}
        return next(sequence for sequence in reversed(self._running) if sequence not in planned)

    def _preempt(self, victim: Sequence) -> None:
        """Take the blocks of `victim` and put it, before everything that waits, back in the queue."""
        self.counters.num_preemptions += 1
        self._running.remove(victim)
        returned = [victim]
        if victim.group.leader is victim:
            returned += self._release_followers(victim.group)
        self.blocks.free(victim)
        for sequence in reversed(returned):
            sequence.state = SequenceState.WAITING
            self._waiting.appendleft(sequence)

    def _release_followers(self, group: Group) -> list[Sequence]:
        """Dissolve the bond of leader and followers; return the followers."""
        followers, group.followers, group.leader = group.followers, [], None
        self._num_followers -= len(followers)
        return followers

    def _admit(self, plan: _Plan) -> None:
        """Seat waiting sequences while seats, budget and blocks last; a group's fresh siblings follow their leader."""
        while self._waiting and self.num_running < self._max_num_seqs:
            sequence = self._waiting[0]
            if sequence.is_fresh and sequence.group.leader is not None:
                self._seat_follower(self._waiting.popleft())
                continue
            if plan.budget == 0:
                return
            cached = self.blocks.match_prefix(sequence)
            if self._running and self.blocks.num_new_blocks(sequence, sequence.num_pending) > self._room():
                self.blocks.free(sequence)
                return
            length = min(sequence.num_pending, plan.budget)
            self.counters.cached_tokens += cached
            self._waiting.popleft()
            sequence.state = SequenceState.RUNNING
            self._running.append(sequence)
            if sequence.num_output == 0:
                sequence.group.leader = sequence
            self._add_chunk(sequence, length, plan)

    def _room(self) -> int:
        """Blocks that admission may fill; one for each seated sequence stays free, or it would be preempted at once."""
        return self.blocks.num_available - self.num_running

    def _seat_follower(self, sibling: Sequence) -> None:
        """Give a fresh sequence a seat beside the leader that prefills its prompt."""
        assert sibling.is_fresh, "only a sequence with nothing computed can follow"
        sibling.state = SequenceState.RUNNING
        sibling.group.followers.append(sibling)
        self._num_followers += 1

    def _add_chunk(self, sequence: Sequence, length: int, plan: _Plan) -> None:
        copy = self.blocks.prepare_write(sequence, length)
        if copy is not None:
            plan.copies.append(copy)
            self.counters.block_copies += 1
        plan.chunks.append(Chunk(sequence, sequence.num_computed, length))
        plan.budget -= length

    @staticmethod
    def _draws(chunks: list[Chunk]) -> Iterator[Draw]:
        """Yield a draw for each sequence whose known tokens are all computed by then, and for a leader's followers."""
        for i, chunk in enumerate(chunks):
            sequence, group = chunk.sequence, chunk.sequence.group
            if chunk.end < len(sequence.token_ids) or group.params.max_tokens == 0:
                continue
            yield Draw(sequence, i)
            if group.leader is sequence:
                yield from (Draw(follower, i) for follower in group.followers)

    # ------------------------------------------------------------------ commit

    def commit(self, batch: Batch, sampled: SampledTokens, *, weight_version: int) -> list[FinishedCompletion]:
        """Record what a step computed and return the completions that it ended."""
        self.counters.num_steps += 1
        for chunk, scores in zip(batch.chunks, sampled.prompt_logprobs, strict=True):
            self._advance(chunk, scores)
        finished: list[FinishedCompletion] = []
        for chunk in batch.chunks:
            if chunk.sequence.group.leader is chunk.sequence and chunk.sequence.num_pending == 0:
                self._fork_followers(chunk.sequence)
        rows = zip(batch.draws, sampled.token_ids, sampled.logprobs, sampled.sampling_logprobs, strict=True)
        for draw, token_id, logprob, sampling_logprob in rows:
            sequence = draw.sequence
            sequence.token_ids.append(token_id)
            sequence.logprobs.append(logprob)
            sequence.sampling_logprobs.append(sampling_logprob)
            sequence.weight_versions.append(weight_version)
            finish = check_stop(sequence, self._decode)
            if finish is not None:
                finished.append(self._finish(sequence, finish))
        self.counters.sampled_tokens += len(batch.draws)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if sequence.group.params.max_tokens == 0 and sequence.num_pending == 0:
                finished.append(self._finish(sequence, Finish("length")))
        if finished:
            self._running = [s for s in self._running if s.state is SequenceState.RUNNING]
        return finished

    def _advance(self, chunk: Chunk, scores: list[float]) -> None:
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        self.blocks.register(sequence)
        recorded = sequence.group.prompt_logprobs
        if scores and sequence.index == 0:  # a chunk that is computed anew after a preemption adds only what is missing
            recorded.extend(scores[max(0, len(recorded) - chunk.start) :])
        if chunk.length == 1 and chunk.start >= len(sequence.group.prompt_token_ids):
            self.counters.decode_tokens += 1
        else:
            self.counters.prefill_tokens += chunk.length

    def _fork_followers(self, leader: Sequence) -> None:
        """The prompt is computed: every follower shares its blocks and goes its own way."""
        for follower in self._release_followers(leader.group):
            self.blocks.fork(leader, follower)
            follower.num_computed = leader.num_computed
            self.counters.cached_tokens += leader.num_computed
            self._running.append(follower)

    def _finish(self, sequence: Sequence, finish: Finish) -> FinishedCompletion:
        self.blocks.free(sequence)
        sequence.state = SequenceState.FINISHED
        group = sequence.group
        group.num_unfinished -= 1
        self.counters.num_finished += 1
        if group.num_unfinished == 0:
            del self._groups[group.request_id]
        text = finish.text if finish.text is not None else self._text(sequence)
        return FinishedCompletion(
            request_id=group.request_id,
            completion=sequence.completion(finish.reason, finish.stop_reason, text),
            is_last=group.num_unfinished == 0,
            prompt_logprobs=[float("nan"), *group.prompt_logprobs] if group.scores_prompt else None,
        )

    def _text(self, sequence: Sequence) -> str:
        output = sequence.token_ids[len(sequence.group.prompt_token_ids) :]
        return self._decode(output) if self._decode is not None and output else ""

    # ----------------------------------------------------------------- weights

    def weights_changed(self, running: RunningPolicy) -> list[FinishedCompletion]:
        """Forget cached prefixes and treat what runs as `running` says; return what `abort` ended."""
        self.blocks.forget_prefixes()
        if running == "abort":
            return [done for request_id in list(self._groups) for done in self.abort(request_id)]
        if running == "recompute":
            for sequence in reversed(list(self._running)):
                self._preempt(sequence)
            return []
        for sequence in self._running:
            sequence.kv_is_mixed = True
        return []

    def live_sequences(self) -> Iterator[Sequence]:
        """Yield every sequence that may hold blocks."""
        return (sequence for group in self._groups.values() for sequence in group.sequences)
