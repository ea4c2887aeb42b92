"""Which tokens of which sequences run next: admission, chunked prefill, forking of groups and beams, preemption."""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from rolloutd.outputs import CompletionOutput, FinishedCompletion, TopLogprobs

from .beam_search import BeamSearch, replace_beams
from .block_manager import BlockManager
from .run_ahead import continued_run, long_run
from .sequence import (
    Batch,
    BlockCopy,
    Chunk,
    Draw,
    Group,
    RunningPolicy,
    SampledRun,
    SampledTokens,
    Sequence,
    SequenceState,
)
from .stop import Decode, Finish, check_new_tokens, check_stop
from .waiting import LengthHistory, WaitingGroups

log = logging.getLogger(__name__)

RECOVERY_STEPS = 64
"""Batches after which a limit that came from a lack of memory doubles: what took the memory may be gone."""


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
    prefix_queries: int = 0
    prefix_hits: int = 0
    block_copies: int = 0
    num_out_of_memory: int = 0


@dataclass(slots=True)
class _Plan:
    """A batch being put together, and what is left of the step's budget."""

    budget: int
    chunks: list[Chunk]
    copies: list[BlockCopy]


class Scheduler:
    """Decides every step. `schedule` gives a batch, `commit` takes what was sampled for it; nothing here computes.

    Running sequences come first, the decoding ones before the prefilling ones. What the budget leaves goes to those
    that lost their blocks, then to the rest of groups that began, then to new groups, the longest expected first. When
    blocks run out, the sequence that was seated last gives up its own and is computed anew later, with the same tokens.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, decode: Decode | None = None
    ) -> None:
        self.blocks = blocks
        self.counters = Counters()
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._token_limit = max_num_batched_tokens
        """Tokens of a step that the device is known to have memory for, or not known not to."""
        self._num_since_shrunk = 0
        self._decode = decode
        self._groups: dict[str, Group] = {}
        self._new = WaitingGroups()
        self._history = LengthHistory()
        self._begun: deque[Group] = deque()
        """Groups with a ticket whose samples do not all have a seat yet."""
        self._returned: list[tuple[int, int, Sequence]] = []
        """A heap by (ticket, index) of sequences that wait for blocks; entries of ended ones are stale."""
        self._num_returned = 0
        self._num_unseated = 0
        self._next_ticket = 0
        self._running: list[Sequence] = []
        self._num_followers = 0
        self._searches: dict[str, Group] = {}
        """Beam searches with a seated beam."""
        self.holds_new = False
        """Groups that have not begun wait, until what has is finished and the weights change."""

    @property
    def num_waiting(self) -> int:
        return self._num_unseated + self._num_returned

    @property
    def num_running(self) -> int:
        """Seats taken: sequences that compute, those that wait for their leader's prefill, and beams to come."""
        return len(self._running) + self._num_followers + sum(map(_seats_kept_free, self._searches.values()))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._groups

    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def request_ids(self) -> list[str]:
        """Return the requests that are queued or run."""
        return list(self._groups)

    def add(self, group: Group) -> None:
        """Queue a group."""
        if group.params.beam_width:
            group.beam = BeamSearch(group)
        self._groups[group.request_id] = group
        self._num_unseated += group.num_unseated
        self._new.add(group, self._history.expected_len(group))

    def abort(self, request_id: str, indices: Collection[int] | None = None) -> list[FinishedCompletion]:
        """End what is unfinished of a request, or of those samples, and return it as `abort` completions.

        An unknown request, or a sample that has ended, ends nothing. A beam search ends as a whole.
        """
        group = self._groups.get(request_id)
        if group is None:
            return []
        ended = self._end_unfinished(group, Finish("abort"), indices)
        self._running = [sequence for sequence in self._running if sequence.state is SequenceState.RUNNING]
        return ended

    # ---------------------------------------------------------------- schedule

    def schedule(self, max_steps: int = 1) -> Batch:
        """Return what the next step computes, or the next steps, up to `max_steps`; empty where there is no work."""
        plan = _Plan(self._token_limit, [], [])
        self._plan_step(plan)
        while not plan.chunks and self._groups:
            # Beams hold blocks and wait for siblings that cannot get any: the search that came last steps back.
            assert self._running, "work is left, nothing runs, and nothing can be seated"
            self._preempt(max(self._running, key=_seniority))
            self._plan_step(plan)
        batch = Batch(tuple(plan.chunks), tuple(self._draws(plan.chunks)), tuple(plan.copies))
        return long_run(batch, self.blocks, max_steps) if max_steps > 1 else batch

    def continue_run(self, run: Batch, max_steps: int) -> Batch | None:
        """Return the run that follows one which still computes; None where the host must see that one's tokens first.

        That is where a waiting sequence may get a seat, nothing is left to run, or the blocks do not suffice.
        """
        if self.num_waiting and self.num_running < self._max_num_seqs:
            return None
        return continued_run(run, self.blocks, max_steps)

    def take_back(self, batch: Batch) -> Group | None:
        """Undo a batch that the device had no memory for; the next ones are at most half as large.

        Its sequences keep what was computed before. Return the group that cannot go on where it was one token alone.
        """
        self.counters.num_out_of_memory += 1
        targets = {copy.target for copy in batch.copies}
        for chunk in batch.chunks:
            if not targets.isdisjoint(chunk.sequence.block_table):
                self._preempt(chunk.sequence, has_tail=False)  # what should have been copied there was not
        if batch.num_tokens == 1:
            return batch.chunks[0].sequence.group
        self._token_limit, self._num_since_shrunk = batch.num_tokens // 2, 0
        log.warning("out of memory step_tokens=%d next_at_most=%d", batch.num_tokens, self._token_limit)
        return None

    def _recover(self) -> None:
        """Let batches grow again, some time after a lack of memory."""
        self._num_since_shrunk += 1
        if self._num_since_shrunk == RECOVERY_STEPS:
            self._token_limit = min(2 * self._token_limit, self._max_num_batched_tokens)
            self._num_since_shrunk = 0

    def _plan_step(self, plan: _Plan) -> None:
        pending = [(sequence, len(sequence.token_ids) - sequence.num_computed) for sequence in self._running]
        decoding = [sequence for sequence, length in pending if length == 1]
        prefilling = [sequence for sequence, length in pending if length > 1]
        before = self.counters.num_preemptions
        for sequence in chain(decoding, prefilling):
            # An earlier sequence of this loop may have taken this one's blocks.
            if sequence.state is not SequenceState.RUNNING or plan.budget == 0:
                continue
            if sequence.num_computed < sequence.num_writable and sequence.num_pending == 1:
                plan.chunks.append(Chunk(sequence, sequence.num_computed, 1))
                plan.budget -= 1
            else:
                self._continue(sequence, plan)
        if self.counters.num_preemptions == before:
            self._admit(plan)

    def _continue(self, sequence: Sequence, plan: _Plan) -> None:
        """Plan the next chunk of a running sequence, which may cost others, or itself, their blocks."""
        length = min(sequence.num_pending, plan.budget)
        while self.blocks.num_new_blocks(sequence, length) > self.blocks.num_available:
            planned = {chunk.sequence for chunk in plan.chunks}
            self._preempt(max((s for s in self._running if s not in planned), key=_seniority))
            if sequence.state is not SequenceState.RUNNING:
                return
        self._add_chunk(sequence, length, plan)

    def _preempt(self, victim: Sequence, *, has_tail: bool = True) -> None:
        """Take the blocks of `victim`; it waits for new ones before everything that is younger."""
        self.counters.num_preemptions += 1
        self._running.remove(victim)
        returned = [victim]
        if victim.group.leader is victim:
            returned += self._release_followers(victim.group)
        if has_tail:
            self._free(victim)
        else:
            self.blocks.free(victim)
        for sequence in returned:
            self._return(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Give back a sequence's blocks; what they hold can still be found."""
        self.blocks.register_tail(sequence)
        self.blocks.free(sequence)

    def _return(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        heapq.heappush(self._returned, (*_seniority(sequence), sequence))
        self._num_returned += 1

    def _release_followers(self, group: Group) -> list[Sequence]:
        """Dissolve the bond of leader and followers; return the followers."""
        followers, group.followers, group.leader = group.followers, [], None
        self._num_followers -= len(followers)
        return followers

    def _admit(self, plan: _Plan) -> None:
        """Seat waiting sequences while seats, budget and blocks last; a group's fresh siblings follow their leader."""
        while (sequence := self._next_waiting()) is not None:
            if sequence.is_fresh and sequence.group.leader is not None:
                self._leave_queue(sequence)
                self._seat_follower(sequence)
                continue
            if plan.budget == 0 or not self._seat(sequence, plan):
                return

    def _next_waiting(self) -> Sequence | None:
        """Return the sequence whose turn it is, if a seat is free for it."""
        while self._returned and self._returned[0][2].state is not SequenceState.WAITING:
            heapq.heappop(self._returned)
        num_free = self._max_num_seqs - self.num_running
        if self._returned:
            sequence = self._returned[0][2]
            is_kept = sequence.group.request_id in self._searches  # a search keeps the seats of its beams
            return sequence if num_free > 0 or is_kept else None
        group = self._group_to_seat()
        if group is None or num_free < min(self._max_num_seqs, group.params.beam_width or 1):
            return None
        if group.ticket < 0:
            group.ticket = self._next_ticket
            self._next_ticket += 1
            self._new.remove(group)
            self._begun.append(group)
        sequence = group.spawn()
        self._num_unseated -= 1
        self._return(sequence)
        return sequence

    def _group_to_seat(self) -> Group | None:
        """Return the group whose next sample gets a seat: one that has begun before any new one."""
        while self._begun and self._begun[0].num_unseated == 0:
            self._begun.popleft()
        if self._begun:
            return self._begun[0]
        return None if self.holds_new else self._new.peek()

    def _leave_queue(self, sequence: Sequence) -> None:
        assert self._returned[0][2] is sequence, "sequences are seated in the order of the queue"
        heapq.heappop(self._returned)
        self._num_returned -= 1

    def _seat_follower(self, sibling: Sequence) -> None:
        """Give a fresh sequence a seat beside the leader that prefills its prompt."""
        sibling.state = SequenceState.RUNNING
        sibling.group.followers.append(sibling)
        self._num_followers += 1

    def _seat(self, sequence: Sequence, plan: _Plan) -> bool:
        """Give a sequence seat, blocks and its first chunk; False where the blocks do not suffice."""
        cached = self.blocks.match_prefix(sequence)
        # One block for each seated sequence stays free, or somebody would be preempted at once.
        room = self.blocks.num_available - self.num_running if self._running else self.blocks.num_available
        if self.blocks.num_new_blocks(sequence, sequence.num_pending) > room:
            self.blocks.free(sequence)
            if self._running:
                return False
            # Alone in the pool and still too long: the copy of a shared last block is one too many.
            cached = self.blocks.match_prefix(sequence, whole_blocks_only=True)
        self._leave_queue(sequence)
        self.counters.prefix_queries += len(sequence.token_ids)
        self.counters.prefix_hits += cached
        self.counters.cached_tokens += cached
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)
        group = sequence.group
        if group.beam is not None:
            self._searches[group.request_id] = group
        elif sequence.num_output == 0:
            group.leader = sequence
        self._add_chunk(sequence, min(sequence.num_pending, plan.budget), plan)
        return True

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
            sequence = chunk.sequence
            if chunk.start + chunk.length < len(sequence.token_ids):
                continue
            group = sequence.group
            if group.params.max_tokens > 0:
                yield Draw(sequence, i)
                if group.leader is sequence:
                    yield from (Draw(follower, i) for follower in group.followers)

    # ------------------------------------------------------------------ commit

    def commit(
        self, batch: Batch, sampled: SampledTokens | SampledRun, *, weight_version: int
    ) -> list[FinishedCompletion]:
        """Record what a step, or a run of steps, computed and return the completions that it ended."""
        self.counters.num_steps += batch.num_steps
        if self._token_limit < self._max_num_batched_tokens:
            self._recover()
        if isinstance(sampled, SampledRun):
            return self._record_run(batch, sampled, weight_version)
        for i, (chunk, scores) in enumerate(zip(batch.chunks, sampled.prompt_logprobs, strict=True)):
            self._advance(chunk, scores, sampled.prompt_top_logprobs.get(i))
        for chunk in batch.chunks:
            if chunk.sequence.group.leader is chunk.sequence and chunk.sequence.num_pending == 0:
                self._fork_followers(chunk.sequence)
        finished = self._record_draws(batch, sampled, weight_version)
        finished += self._advance_searches(batch, sampled, weight_version)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if sequence.group.params.max_tokens == 0 and sequence.num_pending == 0:
                finished.append(self._finish(sequence, Finish("length")))
        if finished or self._searches:
            self._running = [s for s in self._running if s.state is SequenceState.RUNNING]
        return finished

    def _advance(self, chunk: Chunk, scores: list[float], top: TopLogprobs | None) -> None:
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        if sequence.num_computed >= (sequence.num_registered_blocks + 1) * self.blocks.block_size:
            self.blocks.register(sequence)
        if scores and sequence.index == 0:  # a chunk that is computed anew after a preemption adds only what is missing
            sequence.group.record_prompt(chunk.start, scores, top)
        if chunk.length == 1 and chunk.start >= len(sequence.group.prompt_token_ids):
            self.counters.decode_tokens += 1
        else:
            self.counters.prefill_tokens += chunk.length

    def _fork_followers(self, leader: Sequence) -> None:
        """The prompt is computed: every follower shares its blocks and goes its own way."""
        for follower in self._release_followers(leader.group):
            self.blocks.fork(leader, follower)
            self.counters.cached_tokens += leader.num_computed
            self._running.append(follower)

    def _record_draws(self, batch: Batch, sampled: SampledTokens, weight_version: int) -> list[FinishedCompletion]:
        """Append what independent samples drew, and end those that are complete."""
        finished: list[FinishedCompletion] = []
        rows = zip(batch.draws, sampled.token_ids, sampled.logprobs, sampled.sampling_logprobs, strict=True)
        for i, (draw, token_id, logprob, sampling_logprob) in enumerate(rows):
            sequence, group = draw.sequence, draw.sequence.group
            if group.beam is not None or sequence.state is SequenceState.FINISHED:
                continue
            sequence.token_ids.append(token_id)
            sequence.logprobs.append(logprob)
            sequence.sampling_logprobs.append(sampling_logprob)
            sequence.weight_versions.append(weight_version)
            if sequence.top_logprobs is not None:
                sequence.top_logprobs.extend(sampled.top_logprobs[i])
            group.num_sampled += 1
            self.counters.sampled_tokens += 1
            finish = check_stop(sequence, self._decode)
            if finish is not None:
                finished.append(self._finish(sequence, finish))
            if group.is_spent:
                finished += self._end_unfinished(group, Finish("length"))
        return finished

    def _record_run(self, run: Batch, sampled: SampledRun, weight_version: int) -> list[FinishedCompletion]:
        """Append each sequence's tokens up to where it ends; what the device drew beyond a stop string is dropped."""
        finished: list[FinishedCompletion] = []
        rows = zip(run.chunks, sampled.token_ids, sampled.logprobs, sampled.sampling_logprobs, strict=True)
        for chunk, token_ids, logprobs, sampling_logprobs in rows:
            sequence = chunk.sequence
            if sequence.state is SequenceState.FINISHED:
                continue  # by a stop string of the run before, or by an abort
            assert chunk.start == sequence.num_computed, "runs are recorded in the order in which they were launched"
            finish, num_new = check_new_tokens(sequence, token_ids, self._decode)
            assert finish is not None or num_new == run.num_steps, "a row ended early on the device, not on the host"
            sequence.logprobs += logprobs[:num_new]
            sequence.sampling_logprobs += sampling_logprobs[:num_new]
            sequence.weight_versions += [weight_version] * num_new
            sequence.num_computed += num_new
            sequence.group.num_sampled += num_new
            self.counters.sampled_tokens += num_new
            self.counters.decode_tokens += num_new
            if sequence.num_computed >= (sequence.num_registered_blocks + 1) * self.blocks.block_size:
                self.blocks.register(sequence)
            if finish is not None:
                finished.append(self._finish(sequence, finish))
        if finished:
            self._running = [s for s in self._running if s.state is SequenceState.RUNNING]
        return finished

    def _finish(self, sequence: Sequence, finish: Finish) -> FinishedCompletion:
        self._free(sequence)
        sequence.state = SequenceState.FINISHED
        if finish.reason != "abort":
            self._history.record(sequence.group, sequence.num_output)
        text = finish.text if finish.text is not None else self._text(sequence.output_token_ids)
        return self._deliver(sequence.group, sequence.completion(finish.reason, finish.stop_reason, text))

    def _deliver(self, group: Group, completion: CompletionOutput) -> FinishedCompletion:
        """Return a completion on its way out, and forget its group with the last one."""
        self.counters.num_finished += 1
        group.num_unfinished -= 1
        if group.num_unfinished == 0:
            del self._groups[group.request_id]
            self._new.remove(group)
            group.sequences = []  # they name the group too: without this only the garbage collector would free both
        return FinishedCompletion(
            request_id=group.request_id,
            completion=completion,
            is_last=group.num_unfinished == 0,
            prompt_logprobs=[float("nan"), *group.prompt_logprobs] if group.scores_prompt else None,
            prompt_top_logprobs=group.prompt_top_logprobs,
        )

    def _end_unfinished(
        self, group: Group, finish: Finish, indices: Collection[int] | None = None
    ) -> list[FinishedCompletion]:
        """End the unfinished samples of a group, or those of `indices`; the caller sweeps `_running`."""
        if group.beam is not None:
            return self._end_search(group, finish)

        def is_meant(index: int) -> bool:
            return indices is None or index in indices

        ended: list[FinishedCompletion] = []
        unfinished = [s for s in group.sequences if s.state is not SequenceState.FINISHED and is_meant(s.index)]
        if group.leader in unfinished:
            for follower in self._release_followers(group):
                self._return(follower)
        for sequence in unfinished:
            if sequence.state is SequenceState.WAITING:
                self._num_returned -= 1
            elif sequence in group.followers:
                group.followers.remove(sequence)
                self._num_followers -= 1
            ended.append(self._finish(sequence, finish))
        unseated = [i for i in range(group.next_index, group.params.n) if i not in group.cancelled and is_meant(i)]
        for index in unseated:
            group.cancelled.add(index)
            group.num_unseated -= 1
            self._num_unseated -= 1
            ended.append(self._deliver(group, Sequence(group, index).completion(finish.reason, None, "")))
        return ended

    def _text(self, token_ids: list[int]) -> str:
        return self._decode(token_ids) if self._decode is not None and token_ids else ""

    # ------------------------------------------------------------- beam search

    def _advance_searches(self, batch: Batch, sampled: SampledTokens, weight_version: int) -> list[FinishedCompletion]:
        """Note each beam's candidates; a search whose beams all have theirs goes on by one token, or ends."""
        drawn: dict[str, Group] = {}
        for i, candidates in sampled.candidates.items():
            beam = batch.draws[i].sequence
            beam.candidates = candidates
            drawn[beam.group.request_id] = beam.group
        finished: list[FinishedCompletion] = []
        for group in drawn.values():
            if any(beam.candidates is None for beam in group.sequences):
                continue
            search = _search_of(group)
            self.counters.sampled_tokens += len(group.sequences)
            self._running += replace_beams(group, search.advance(group.sequences, weight_version), self.blocks)
            if search.is_done:
                finished += self._end_search(group, None)
        return finished

    def _end_search(self, group: Group, finish: Finish | None) -> list[FinishedCompletion]:
        """Free all beams and return n completions; cut short (`finish`), the best live beams fill what is missing."""
        hypotheses = _search_of(group).results(group.sequences if finish is not None else ())
        self._num_returned -= sum(beam.state is SequenceState.WAITING for beam in group.sequences)
        self._num_unseated -= group.num_unseated
        group.num_unseated = 0
        self._searches.pop(group.request_id, None)
        for beam in group.sequences:
            self.blocks.free(beam)
            beam.state = SequenceState.FINISHED
        return [
            self._deliver(group, one.completion(i, self._text(one.token_ids), "abort" if finish is not None else None))
            for i, one in enumerate(hypotheses)
        ]

    # ----------------------------------------------------------------- weights

    def is_drained(self, running: RunningPolicy) -> bool:
        """Whether no group that has begun is to be finished before the weights change."""
        return all(group.ticket < 0 or (group.on_update or running) != "drain" for group in self._groups.values())

    def weights_changed(self, running: RunningPolicy) -> list[FinishedCompletion]:
        """Forget cached prefixes and treat what runs as it asked for, or as `running` says; return what was aborted."""
        self.blocks.forget_prefixes()
        self.holds_new = False
        for sequence in self._running:
            sequence.kv_is_mixed = True  # also of those that give it up now: nobody may find it
        aborted = [name for name, group in self._groups.items() if (group.on_update or running) == "abort"]
        ended = [done for request_id in aborted for done in self.abort(request_id)]
        for sequence in list(self._running):
            if (sequence.group.on_update or running) == "recompute":
                self._preempt(sequence)
        return ended

    def live_sequences(self) -> Iterable[Sequence]:
        """Return every sequence that may hold blocks."""
        return (sequence for group in self._groups.values() for sequence in group.sequences)


def _seniority(sequence: Sequence) -> tuple[int, int]:
    """Sort key of seated sequences; the highest gives up its blocks first."""
    return sequence.group.ticket, sequence.index


def _search_of(group: Group) -> BeamSearch:
    assert group.beam is not None, "only a search has beams"
    return group.beam


def _seats_kept_free(group: Group) -> int:
    """Return how many beams of a search do not run yet, or wait for blocks."""
    return _search_of(group).width - sum(beam.state is SequenceState.RUNNING for beam in group.sequences)
