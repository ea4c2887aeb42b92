"""Request -> Group -> n Sequences, and the Batch that a step runs."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from rolloutd.errors import RolloutdError
from rolloutd.outputs import CompletionOutput, FinishReason, TopLogprobs
from rolloutd.sampling_params import SamplingParams

if TYPE_CHECKING:
    from .beam_search import BeamSearch


RunningPolicy = Literal["keep", "recompute", "drain", "abort"]
"""What happens to a sequence in flight when the weights change: keep its KV, compute it anew, come first, or end it."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to sample it, as it comes in."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    min_version: int = 0
    """Of the weights that may compute its tokens."""
    adapter: str | None = None
    """Which weights these are: None the policy, `base`, or an adapter that was kept under this name."""
    on_update: RunningPolicy | None = None
    """What new weights do to it while it is in flight; None leaves it to the update."""


MAX_DEVICE_STOPS = 8
"""Stop token ids of a sequence that several steps in a row can look for without the host."""

Candidates = list[tuple[int, float]]
"""Token ids with their log-probabilities, the most likely first."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRules:
    """What requests of equal options add to logits and forbid; flat arrays, so that a runner reads them as they lie.

    Requests whose rules are the same object are adjusted together.
    """

    bias_ids: array[int]
    """int64, as all ids here."""
    bias: array[float]
    """float32, one for each of `bias_ids`."""
    allowed: array[int] | None
    """All others are forbidden; None allows all."""
    banned: array[int]
    bad_words: tuple[tuple[int, ...], ...]
    """Token sequences of two and more: the last is forbidden where the others are the end of the output."""


class SequenceState(enum.Enum):
    """WAITING for a seat and blocks, RUNNING (holds both, or waits for its group's prefill), FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Group:
    """The n sequences of one request; they share the blocks of its prompt and come into being as they get seats."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    prompt_key: int
    """The prompt's hash. Two prompts with one hash share a guess at their length, nothing else."""
    params: SamplingParams
    seed: int
    """64 bits; with (index, position) it decides every draw."""
    stop_token_ids: frozenset[int]
    """The request's own and, unless ignored, the model's end-of-sequence ids."""
    num_unfinished: int
    num_unseated: int
    """Sequences that never had a seat yet."""
    on_update: RunningPolicy | None = None
    rules: TokenRules | None = None
    """Bias, allowed and forbidden tokens, where there are any."""
    beam: BeamSearch | None = None
    """Set where the sequences are the beams of one search and not independent samples."""
    ticket: int = -1
    """Order of the first seat; -1 before it. Lower ones keep their blocks when these run out."""
    sequences: list[Sequence] = field(default_factory=list)
    """Those that are or were seated and may still hold blocks."""
    leader: Sequence | None = None
    """The sequence that prefills the prompt for all, until it has."""
    followers: list[Sequence] = field(default_factory=list)
    """Seated siblings that are forked when the leader's prefill reaches the prompt's end."""
    cancelled: set[int] = field(default_factory=set)
    """Indices of samples that ended before they had a seat."""
    next_index: int = 0
    num_sampled: int = 0
    """Tokens sampled so far, all sequences together."""
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: TopLogprobs | None = None
    """Of the whole prompt's positions so far; nothing predicts the first."""

    @classmethod
    def from_request(
        cls, request: Request, *, seed: int, eos_token_ids: frozenset[int], rules: TokenRules | None = None
    ) -> Group:
        """Return the group, with no sequence yet."""
        params = request.params
        stop_ids = params.all_stop_token_ids(eos_token_ids)
        num_top = params.num_prompt_top_logprobs
        return cls(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            prompt_key=hash(request.prompt_token_ids),
            params=params,
            seed=seed,
            stop_token_ids=stop_ids,
            num_unfinished=params.n,
            num_unseated=1 if params.beam_width else params.n,
            on_update=request.on_update,
            rules=rules,
            prompt_top_logprobs=TopLogprobs.empty(num_top, num_positions=1) if num_top else None,
        )

    def spawn(self) -> Sequence:
        """Return the next sequence, waiting for its first seat."""
        while self.next_index in self.cancelled:
            self.next_index += 1
        sequence = Sequence(self, self.next_index)
        self.next_index += 1
        self.num_unseated -= 1
        self.sequences.append(sequence)
        return sequence

    def record_prompt(self, start: int, scores: list[float], top: TopLogprobs | None) -> None:
        """Record what was computed of the tokens that follow positions `start` and on; what is known stays."""
        skip = max(0, len(self.prompt_logprobs) - start)
        self.prompt_logprobs.extend(scores[skip:])
        if self.prompt_top_logprobs is not None and top is not None:
            self.prompt_top_logprobs.extend(top, skip=skip)

    @property
    def scores_prompt(self) -> bool:
        """True where every prompt token's log-probability is wanted, so that no cached prefix may be skipped."""
        return self.params.prompt_logprobs is not None

    @property
    def draws_without_host(self) -> bool:
        """True where a token follows from logits, seed and position alone, and so can be drawn several steps ahead."""
        p = self.params
        return not (
            self.rules is not None
            or self.beam is not None
            or p.penalises
            or p.logits_processors
            or p.num_top_logprobs
            or p.group_token_budget is not None
            or len(self.stop_token_ids) > MAX_DEVICE_STOPS
        )

    @property
    def is_spent(self) -> bool:
        """True once the group's token budget is used up."""
        budget = self.params.group_token_budget
        return budget is not None and self.num_sampled >= budget


class Sequence:
    """One sample of a group: its tokens, where their KV lies, and what was recorded of each draw."""

    __slots__ = (
        "block_table",
        "cache_node",
        "candidates",
        "group",
        "index",
        "kv_is_mixed",
        "logprobs",
        "num_computed",
        "num_registered_blocks",
        "num_writable",
        "sampling_logprobs",
        "score",
        "state",
        "text",
        "token_ids",
        "top_logprobs",
        "weight_versions",
    )

    def __init__(self, group: Group, index: int) -> None:
        self.group = group
        self.index = index
        self.state = SequenceState.WAITING
        self.token_ids: list[int] = list(group.prompt_token_ids)
        self.logprobs: list[float] = []
        self.sampling_logprobs: list[float] = []
        self.weight_versions: list[int] = []
        num_top = group.params.num_top_logprobs
        self.top_logprobs = TopLogprobs.empty(num_top) if num_top else None
        self.text: StopText | None = None
        self.score = 0.0
        """Of a beam: the sum of its log-probabilities."""
        self.reset_kv()

    def reset_kv(self) -> None:
        """Forget where KV lies; the tokens stay."""
        self.block_table: list[int] = []
        self.num_computed = 0
        self.num_writable = 0
        """Tokens up to here go to slots that are this sequence's own, without asking for blocks."""
        self.num_registered_blocks = 0
        self.cache_node = 0
        self.kv_is_mixed = False
        self.candidates: Candidates | None = None
        """Of a beam whose tokens are all computed: what may come next. It waits for the other beams."""

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.group.prompt_token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet through the model: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_fresh(self) -> bool:
        """True before anything was computed or sampled."""
        return self.num_computed == 0 and self.num_output == 0

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.group.prompt_token_ids) :]

    def completion(self, finish_reason: FinishReason, stop_reason: int | str | None, text: str) -> CompletionOutput:
        """Return what leaves the engine."""
        return CompletionOutput(
            index=self.index,
            token_ids=self.output_token_ids,
            text=text,
            logprobs=self.logprobs,
            sampling_logprobs=self.sampling_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            weight_versions=self.weight_versions,
            top_logprobs=self.top_logprobs,
        )


@dataclass(slots=True)
class StopText:
    """Output decoded so far, for stop strings; `[prefix:read]` is the context that new tokens are decoded after."""

    text: str = ""
    """Of the tokens before `read`; it ends with a whole character."""
    prefix: int = 0
    read: int = 0
    num_searched: int = 0
    """Characters that were searched, those of tokens from `read` on included."""


class Chunk(NamedTuple):
    """Tokens `start : start + length` of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Draw(NamedTuple):
    """One token to sample for `sequence` from the logits of the last token of chunk number `chunk_index`."""

    sequence: Sequence
    chunk_index: int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A shared block that is about to be written: copy `source` to `target` before the step computes."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that one step computes. After a group's prefill n draws name the same chunk.

    With `num_steps` > 1 it is a run: that many decode steps in a row. Every chunk is then the first step's token of a
    sequence, every chunk has its draw, nothing is copied, and block tables reach to the run's last token.
    """

    chunks: tuple[Chunk, ...]
    draws: tuple[Draw, ...]
    copies: tuple[BlockCopy, ...]
    num_steps: int = 1
    continues: bool = False
    """Launched while the run before it computes: its sequences are some of that one's, and what they drew there is
    known to the device alone."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The runner's answer to a batch, in the order of its draws; `prompt_logprobs` in the order of its chunks."""

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    prompt_logprobs: list[list[float]]
    """For chunks of a group that scores its prompt: log p of each prompt token that follows one of the chunk's."""
    candidates: dict[int, Candidates] = field(default_factory=dict)
    """For each draw of a beam, by its number: the most likely next tokens. Its sampled token is ignored."""
    top_logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    """For draws whose request asked for them, by their number: one position."""
    prompt_top_logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    """For chunks whose request asked for them, by their number: as many positions as in `prompt_logprobs`."""
    failures: dict[int, RolloutdError] = field(default_factory=dict)
    """Draws that could not be made, by their number, and why. Their sampled token means nothing; others are sound."""

    def result(self) -> SampledTokens:
        """Return the answer itself: what is computed at once is its own handle."""
        return self


@dataclass(frozen=True, slots=True)
class SampledRun:
    """The answer to a run, by chunk: up to `num_steps` tokens, fewer where a stop token or the length limit came."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    sampling_logprobs: list[list[float]]

    def result(self) -> SampledRun:
        """Return the answer itself."""
        return self


class Handle(Protocol):
    """A batch that is being computed."""

    def result(self) -> SampledTokens | SampledRun:
        """Wait for the answer, which has a deadline, and return it."""
        ...
