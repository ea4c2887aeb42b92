"""Prompts and completions as flat arrays: what the frames of `Generate` and `Completions` hold."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rolloutd.errors import ProtocolError
from rolloutd.outputs import CompletionOutput, FinishedCompletion, TopLogprobs
from rolloutd.sampling_params import MAX_TOP_LOGPROBS

from .protocol import CompletionItem, Frame, PromptItem

_Count = Callable[[CompletionItem], int]


def _num_tokens(item: CompletionItem) -> int:
    return item.num_tokens


def _num_top(item: CompletionItem) -> int:
    return item.num_tokens * item.num_top


def _num_prompt_top(item: CompletionItem) -> int:
    return item.num_prompt_logprobs * item.num_prompt_top


_COLUMNS: tuple[tuple[str, _Count], ...] = (
    ("<i4", _num_tokens),
    ("<f4", _num_tokens),
    ("<f4", _num_tokens),
    ("<i8", _num_tokens),
    ("<i4", lambda item: item.num_prompt_ids),
    ("<f4", lambda item: item.num_prompt_logprobs),
    ("<i4", _num_top),
    ("<f4", _num_top),
    ("<i4", _num_prompt_top),
    ("<f4", _num_prompt_top),
)
_NUM_ALWAYS = 6
"""Columns of every message; the others travel where an item asks for them."""


def split_prompts(items: Sequence[PromptItem], frames: Sequence[memoryview]) -> list[list[int] | None]:
    """Return each item's token ids, None for a text; `ProtocolError` if the frame is not as long as they say."""
    total = sum(item.num_ids for item in items)
    if len(frames) != 1 or any(item.num_ids < 0 for item in items) or frames[0].nbytes != 4 * total:
        raise ProtocolError(f"prompts of {total} ids need one frame of {4 * total} bytes.")
    ids = np.frombuffer(frames[0], "<i4").tolist()
    result: list[list[int] | None] = []
    at = 0
    for item in items:
        result.append(None if item.text is not None else ids[at : at + item.num_ids])
        at += item.num_ids
    return result


def join_prompts(prompts: Iterable[Sequence[int]]) -> bytes:
    """Return the frame of prompts' ids; `ProtocolError` for an id that does not fit 32 bits."""
    try:
        return np.concatenate([np.array([], "<i4"), *(np.array(ids, "<i4") for ids in prompts)]).astype("<i4").tobytes()
    except OverflowError:
        raise ProtocolError("a token id does not fit into 32 bits. Check the tokenizer.") from None


@dataclass(frozen=True, slots=True)
class Finished:
    """A completion on its way: header item and the slice of each frame."""

    item: CompletionItem
    columns: tuple[Frame, ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(column) for column in self.columns) + len(self.item.text) + 128

    def output(self) -> CompletionOutput:
        """Return the completion as callers see it."""
        ids, logprobs, sampling, versions = (self._column(at).tolist() for at in range(4))
        return CompletionOutput(
            index=self.item.index,
            token_ids=ids,
            text=self.item.text,
            logprobs=logprobs,
            sampling_logprobs=sampling,
            finish_reason=self.item.finish_reason,
            stop_reason=self.item.stop_reason,
            weight_versions=versions,
            beam_score=self.item.beam_score,
            top_logprobs=self._top(self.item.num_top, 6),
        )

    def _column(self, at: int) -> np.ndarray:
        return np.frombuffer(self.columns[at], _COLUMNS[at][0])

    def _top(self, k: int, at: int) -> TopLogprobs | None:
        if not k:
            return None
        ids, logprobs = self._column(at).astype(np.int32), self._column(at + 1).astype(np.float32)
        return TopLogprobs(k, array("i", ids.tobytes()), array("f", logprobs.tobytes()))

    def prompt_ids(self) -> list[int]:
        """Return the ids of a prompt that the daemon tokenised."""
        ids: list[int] = self._column(4).tolist()
        return ids

    def prompt_logprobs(self) -> list[float] | None:
        """Return the prompt's log-probabilities, if they were asked for."""
        if not self.item.num_prompt_logprobs:
            return None
        values: list[float] = self._column(5).tolist()
        return values

    def prompt_top_logprobs(self) -> TopLogprobs | None:
        """Return the most likely tokens at each position of the prompt, if they were asked for."""
        return self._top(self.item.num_prompt_top, 8)


def pack_finished(done: FinishedCompletion, prompt_ids: Sequence[int]) -> Finished:
    """Return a completion for the wire. Prompt ids and log-probabilities travel with the last one."""
    completion = done.completion
    prompt_logprobs = done.prompt_logprobs if done.is_last and done.prompt_logprobs else []
    top, prompt_top = completion.top_logprobs, done.prompt_top_logprobs if prompt_logprobs else None
    ids = prompt_ids if done.is_last else []
    item = CompletionItem(
        request_id=done.request_id,
        index=completion.index,
        num_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        text=completion.text,
        is_last=done.is_last,
        num_prompt_ids=len(ids),
        num_prompt_logprobs=len(prompt_logprobs),
        num_top=top.k if top is not None else 0,
        num_prompt_top=prompt_top.k if prompt_top is not None else 0,
        beam_score=completion.beam_score,
    )
    values = (
        completion.token_ids,
        completion.logprobs,
        completion.sampling_logprobs,
        completion.weight_versions,
        ids,
        prompt_logprobs,
        *((top.token_ids, top.logprobs) if top is not None else ((), ())),
        *((prompt_top.token_ids, prompt_top.logprobs) if prompt_top is not None else ((), ())),
    )
    columns = zip(values, _COLUMNS, strict=True)
    return Finished(item, tuple(np.array(v, dtype).tobytes() for v, (dtype, _) in columns))


def join_finished(finished: Sequence[Finished]) -> tuple[list[CompletionItem], list[bytes]]:
    """Return the items and frames of one `Completions` message."""
    items = [one.item for one in finished]
    return items, [b"".join(one.columns[at] for one in finished) for at in range(_num_columns(items))]


def _num_columns(items: Iterable[CompletionItem]) -> int:
    return len(_COLUMNS) if any(item.num_top or item.num_prompt_top for item in items) else _NUM_ALWAYS


def split_finished(items: Sequence[CompletionItem], frames: Sequence[memoryview]) -> Iterator[Finished]:
    """Yield the completions of one message; `ProtocolError` if the frames are not as long as the items say."""
    num_columns = _num_columns(items)
    sizes = [np.dtype(dtype).itemsize for dtype, _ in _COLUMNS[:num_columns]]
    counts = [[count(item) for item in items] for _, count in _COLUMNS[:num_columns]]
    expected = [size * sum(count) for size, count in zip(sizes, counts, strict=True)]
    is_negative = any(c < 0 for count in counts for c in count)
    most = max((max(item.num_top, item.num_prompt_top) for item in items), default=0)
    least = min((min(item.num_top, item.num_prompt_top) for item in items), default=0)
    if [frame.nbytes for frame in frames] != expected or is_negative or least < 0 or most > MAX_TOP_LOGPROBS:
        raise ProtocolError("completions whose frames are not as long as their header says.")
    at = [0] * num_columns
    absent = (memoryview(b""),) * (len(_COLUMNS) - num_columns)
    for i, item in enumerate(items):
        columns = []
        for c, size in enumerate(sizes):
            end = at[c] + size * counts[c][i]
            columns.append(frames[c][at[c] : end])
            at[c] = end
        yield Finished(item, (*columns, *absent))
