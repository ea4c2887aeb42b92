"""Completions as they finish, and the control that goes with watching them: ending samples that nobody needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from contextlib import suppress
from typing import Any

from rolloutd.errors import RequestError
from rolloutd.outputs import CompletionOutput

Item = tuple[int, CompletionOutput]
"""A prompt's number and one of its completions."""

AbortCall = Callable[[str, "Collection[int] | None"], Coroutine[Any, Any, int]]


class AsyncRolloutStream:
    """Yields (prompt's number, completion). Leaving the loop, or `aclose`, cancels what is unfinished."""

    def __init__(self, request_ids: list[str], completions: AsyncIterator[Item], abort: AbortCall) -> None:
        self._request_ids = request_ids
        self._completions = completions
        self._abort = abort

    def __aiter__(self) -> AsyncIterator[Item]:
        return self._completions

    async def abort(self, prompt: int, samples: Collection[int] | None = None) -> int:
        """End the rest of a prompt's group, or those of its samples; return 1, or 0 where nothing was unfinished.

        They come out of the stream as `abort` completions with the tokens that they have.
        """
        if not 0 <= prompt < len(self._request_ids):
            raise RequestError(f"prompt={prompt} is outside 0 to {len(self._request_ids) - 1}. Pass a prompt's number.")
        return await self._abort(self._request_ids[prompt], samples)

    async def aclose(self) -> None:
        """Cancel what is unfinished."""
        close = getattr(self._completions, "aclose", None)
        if close is not None:
            await close()


class RolloutStream:
    """The same for callers without an event loop."""

    def __init__(self, stream: AsyncRolloutStream, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._stream = stream
        self._run = run

    def __iter__(self) -> Iterator[Item]:
        completions = aiter(self._stream)
        try:
            while (item := self._run(_next_or_none(completions))) is not None:
                yield item
        finally:
            self.close()

    def abort(self, prompt: int, samples: Collection[int] | None = None) -> int:
        """End the rest of a prompt's group, or those of its samples; see `AsyncRolloutStream.abort`."""
        ended: int = self._run(self._stream.abort(prompt, samples))
        return ended

    def close(self) -> None:
        """Cancel what is unfinished."""
        with suppress(RequestError):  # the client was closed before: nothing is left to cancel
            self._run(self._stream.aclose())


async def _next_or_none(items: AsyncIterator[Item]) -> Item | None:
    """Return the next item; a coroutine must not raise StopAsyncIteration."""
    return await anext(items, None)
