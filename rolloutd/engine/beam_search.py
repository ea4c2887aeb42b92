"""Which beams of a search go on and which completions it keeps: the rules of transformers' beam search in plain Python.

One step at a time: each live beam comes with its most likely next tokens; `advance` returns the beams of the next step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

from rolloutd.outputs import CompletionOutput, FinishReason

from .block_manager import BlockManager
from .sequence import Group, Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class Continuation:
    """Beam number `parent` with one more token."""

    parent: int
    token_id: int
    logprob: float
    score: float
    """Sum of log-probabilities, this token's included."""
    weight_version: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A complete completion and its length-normalised score."""

    score: float
    token_ids: list[int]
    logprobs: list[float]
    weight_versions: list[int]
    finish_reason: FinishReason

    def completion(self, index: int, text: str, finish_reason: FinishReason | None) -> CompletionOutput:
        """Return what leaves the engine, as its number `index`; `finish_reason` where the search was cut short."""
        reason = finish_reason or self.finish_reason
        return CompletionOutput(
            index=index,
            token_ids=self.token_ids,
            text=text,
            logprobs=self.logprobs,
            sampling_logprobs=[0.0] * len(self.token_ids),
            finish_reason=reason,
            stop_reason=self.token_ids[-1] if reason == "stop" else None,
            weight_versions=self.weight_versions,
            beam_score=self.score,
        )


class BeamSearch:
    """The state of one search beside its live beams: the best completions found so far."""

    def __init__(self, group: Group) -> None:
        self._params = group.params
        self._stop_token_ids = group.stop_token_ids
        self._finished: list[Hypothesis] = []
        self.is_done = False

    @property
    def width(self) -> int:
        return self._params.beam_width

    @property
    def num_candidates(self) -> int:
        """Next tokens wanted of each beam: so many that `width` go on even if every stop token is among them."""
        return max(2, 1 + len(self._stop_token_ids)) * self.width

    def results(self, live_beams: Many[Sequence]) -> list[Hypothesis]:
        """Return n completions, the best first: the complete ones, then what `live_beams` have, then empty ones."""
        live = [Hypothesis(b.score, b.output_token_ids, b.logprobs, b.weight_versions, "length") for b in live_beams]
        empty = Hypothesis(float("-inf"), [], [], [], "length")
        return [*self._finished, *live, *[empty] * self._params.n][: self._params.n]

    def advance(self, beams: Many[Sequence], weight_version: int) -> list[Continuation]:
        """Return the beams of the next step, the best first; none once `is_done`.

        Every beam has its candidates. Of the best `num_candidates` continuations those that end are kept as completions
        if they are among the first `width`; those that go on are the next beams.
        """
        ranked = heapq.nlargest(
            self.num_candidates,
            (
                Continuation(i, token_id, logprob, beam.score + logprob, weight_version)
                for i, beam in enumerate(beams)
                for token_id, logprob in beam.candidates or ()
            ),
            key=lambda one: one.score,
        )
        length = beams[0].num_output + 1
        is_last = length >= self._params.max_tokens
        running = [one for one in ranked if not is_last and one.token_id not in self._stop_token_ids]
        running = running[: self.width]
        for one in ranked[: self.width]:
            if is_last or one.token_id in self._stop_token_ids:
                self._keep(one, beams[one.parent], length)
        self.is_done = not running or self._cannot_improve(running[0], length)
        return [] if self.is_done else running

    def _keep(self, one: Continuation, beam: Sequence, length: int) -> None:
        """Add a complete continuation if it is among the `width` best."""
        ended = one.token_id in self._stop_token_ids
        self._finished.append(
            Hypothesis(
                score=one.score / math.pow(length, self._params.length_penalty),
                token_ids=[*beam.output_token_ids, one.token_id],
                logprobs=[*beam.logprobs, one.logprob],
                weight_versions=[*beam.weight_versions, one.weight_version],
                finish_reason="stop" if ended else "length",
            )
        )
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self.width :]

    def _cannot_improve(self, best: Continuation, length: int) -> bool:
        """True where the search holds `width` completions and, by transformers' estimate, no better one can come.

        The estimate divides the best live score by the present length, which is exact for a penalty of 0 only.
        """
        if len(self._finished) < self.width:
            return False
        if self._params.early_stopping:
            return True
        return best.score / math.pow(length, self._params.length_penalty) <= self._finished[-1].score


def replace_beams(group: Group, continuations: Many[Continuation], blocks: BlockManager) -> list[Sequence]:
    """Put the beams of the next step in place of the present ones; return those that are new.

    A beam goes on in its own blocks with its last child; other children share them until one writes. Beams without a
    child give theirs back.
    """
    parents, group.sequences = group.sequences, []
    last_child = {one.parent: rank for rank, one in enumerate(continuations)}
    forked: list[Sequence] = []
    for rank, one in enumerate(continuations):
        beam = parents[one.parent]
        if last_child[one.parent] != rank:
            beam = _fork(beam, blocks)
            forked.append(beam)
        beam.candidates = None
        beam.score = one.score
        beam.token_ids.append(one.token_id)
        beam.logprobs.append(one.logprob)
        beam.weight_versions.append(one.weight_version)
        group.sequences.append(beam)
    for i, parent in enumerate(parents):
        if i not in last_child:
            blocks.free(parent)
            parent.state = SequenceState.FINISHED
    return forked


def _fork(parent: Sequence, blocks: BlockManager) -> Sequence:
    group = parent.group
    beam = Sequence(group, group.next_index)
    group.next_index += 1
    beam.token_ids = list(parent.token_ids)
    beam.logprobs = list(parent.logprobs)
    beam.weight_versions = list(parent.weight_versions)
    beam.state = SequenceState.RUNNING
    blocks.fork(parent, beam)
    return beam
