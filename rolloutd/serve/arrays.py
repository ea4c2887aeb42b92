"""Prompts and completions as flat arrays: what the frames of `Generate` and `Completions` hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rolloutd.errors import ProtocolError
from rolloutd.outputs import CompletionOutput, FinishedCompletion

from .protocol import CompletionItem, Frame, PromptItem

_COLUMNS = (("<i4", "num_tokens"), ("<f4", "num_tokens"), ("<f4", "num_tokens"), ("<i8", "num_tokens"))
_TAIL = (("<i4", "num_prompt_ids"), ("<f4", "num_prompt_logprobs"))


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
        ids, logprobs, sampling, versions = (
            np.frombuffer(column, dtype).tolist() for column, (dtype, _) in zip(self.columns, _COLUMNS, strict=False)
        )
        return CompletionOutput(
            index=self.item.index,
            token_ids=ids,
            text=self.item.text,
            logprobs=logprobs,
            sampling_logprobs=sampling,
            finish_reason=self.item.finish_reason,
            stop_reason=self.item.stop_reason,
            weight_versions=versions,
        )

    def prompt_ids(self) -> list[int]:
        """Return the ids of a prompt that the daemon tokenised."""
        ids: list[int] = np.frombuffer(self.columns[4], "<i4").tolist()
        return ids

    def prompt_logprobs(self) -> list[float] | None:
        """Return the prompt's log-probabilities, if they were asked for."""
        if not self.item.num_prompt_logprobs:
            return None
        values: list[float] = np.frombuffer(self.columns[5], "<f4").tolist()
        return values


def pack_finished(done: FinishedCompletion, prompt_ids: Sequence[int]) -> Finished:
    """Return a completion for the wire. Prompt ids and log-probabilities travel with the last one."""
    completion = done.completion
    prompt_logprobs = done.prompt_logprobs if done.is_last and done.prompt_logprobs else []
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
    )
    values = (
        completion.token_ids,
        completion.logprobs,
        completion.sampling_logprobs,
        completion.weight_versions,
        ids,
        prompt_logprobs,
    )
    dtypes = [dtype for dtype, _ in (*_COLUMNS, *_TAIL)]
    return Finished(item, tuple(np.array(v, dtype).tobytes() for v, dtype in zip(values, dtypes, strict=True)))


def join_finished(finished: Sequence[Finished]) -> tuple[list[CompletionItem], list[bytes]]:
    """Return the items and frames of one `Completions` message."""
    columns = range(len(_COLUMNS) + len(_TAIL))
    return [f.item for f in finished], [b"".join(f.columns[c] for f in finished) for c in columns]


def split_finished(items: Sequence[CompletionItem], frames: Sequence[memoryview]) -> Iterator[Finished]:
    """Yield the completions of one message; `ProtocolError` if the frames are not as long as the items say."""
    layout = (*_COLUMNS, *_TAIL)
    sizes = [np.dtype(dtype).itemsize for dtype, _ in layout]
    counts = [[int(getattr(item, name)) for item in items] for _, name in layout]
    expected = [size * sum(count) for size, count in zip(sizes, counts, strict=True)]
    if [frame.nbytes for frame in frames] != expected or any(c < 0 for count in counts for c in count):
        raise ProtocolError("completions whose frames are not as long as their header says.")
    at = [0] * len(layout)
    for i, item in enumerate(items):
        columns = []
        for c, size in enumerate(sizes):
            end = at[c] + size * counts[c][i]
            columns.append(frames[c][at[c] : end])
            at[c] = end
        yield Finished(item, tuple(columns))
