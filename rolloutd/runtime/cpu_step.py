"""A step of decoding on a CPU as one call of C: what a model called of `CpuKernels`, recorded once, run many times.

The calls are recorded without being run, for as many rows as there may be, and run for as many as there are: each row
of each call depends on its own row of the calls before. What they hand to each other lies in one piece of memory, where
what is never needed at the same time lies at the same place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cpu_calls import KINDS, Arguments, Attention, Call, StepInputs, Value
from .cpu_kernels import CpuKernels
from .inputs import ForwardInputs
from .memory import in_large_pages

ALIGNMENT = 64
"""Bytes: a line of a cache, and the widest vector."""


class NotRecordable(Exception):
    """A step does something that is no call of `CpuKernels`, or that is not the same for every number of rows."""


@dataclass(frozen=True)
class RecordedCall:
    """One call, with the tensors that it was given."""

    kind: type[Arguments]
    values: dict[str, Value]

    @property
    def num_rows(self) -> Value:
        """How many rows it was recorded for."""
        return self.values[self.kind.rows]


class Tape:
    """Records calls. A `Recorder`."""

    def __init__(self) -> None:
        self.calls: list[RecordedCall] = []
        self.between: dict[int, Tensor] = {}
        """What calls hand to each other, by address; all of it is kept, so that no address comes twice."""

    def add(self, kind: type[Arguments], values: dict[str, Value]) -> None:
        """Take a call."""
        self.calls.append(RecordedCall(kind, values))

    def empty(self, *shape: int) -> Tensor:
        """Return memory that nobody touches while the tape runs."""
        tensor = torch.empty(*shape)
        self.between[tensor.data_ptr()] = tensor
        return tensor


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets torch look at tensors in other ways, and compute nothing."""

    allowed: ClassVar[set[Any]] = {torch.ops.aten.empty.memory_format}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func not in self.allowed:
            raise NotRecordable(f"torch computes {func} in it")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Span:
    """Memory that is needed from one call on to another one."""

    first: int
    last: int
    num_bytes: int


class RecordedStep:
    """A step for up to `num_rows` rows that decode; the tensors of its calls hold all memory that it reads."""

    def __init__(self, kernels: CpuKernels, calls: Sequence[RecordedCall], outputs: tuple[Tensor, ...]) -> None:
        self.calls = tuple(calls)
        self.num_items = 0
        """What attention read in the last run, all layers."""
        self._kernels = kernels
        self._outputs = outputs
        self._arguments = [call.kind.of(call.values) for call in calls]
        entries = zip(calls, self._arguments, strict=True)
        self._array = (Call * len(self.calls))(
            *(Call(KINDS.index(call.kind), ctypes.addressof(given)) for call, given in entries)
        )
        self._seconds = (ctypes.c_double * len(KINDS))()

    @property
    def num_rows(self) -> int:
        """Rows that a run may have."""
        return len(self._outputs[0])

    def run(self, inputs: ForwardInputs) -> tuple[Tensor, ...]:
        """Return what the recorded function returns for these rows; it is overwritten by the next run."""
        num_rows, tables_RM = len(inputs.token_ids_T), inputs.decode_block_tables_RM
        assert num_rows <= self.num_rows, "more rows than were recorded"
        assert not inputs.prefills, "only rows that decode were recorded"
        assert tables_RM.dtype == torch.int64, "addresses are read as such"
        given = StepInputs(
            *(tensor.data_ptr() for tensor in _step_tensors(inputs)),
            num_rows,
            inputs.num_decode,
            len(inputs.slot_mapping_T),
            tables_RM.stride(0),
        )
        self.num_items = self._kernels.run_step(self._array, given, self._seconds)
        return tuple(output[:num_rows] for output in self._outputs)

    def seconds_of(self, kind: type[Arguments]) -> float:
        """Return the seconds that runs have spent so far in calls of a kind."""
        return float(self._seconds[KINDS.index(kind)])


def record(kernels: CpuKernels, forward: Callable[[ForwardInputs], tuple[Tensor, ...]], num_rows: int) -> RecordedStep:
    """Return `forward` for up to `num_rows` rows that decode; `NotRecordable` where it is more than calls and views.

    Nothing is computed, and nothing that `forward` would write is written.
    """
    inputs, tape = _inputs_of(num_rows), Tape()
    with torch.inference_mode(), kernels.recorded_by(tape), _OnlyViews():  # type: ignore[no-untyped-call]
        outputs = forward(inputs)
    addresses = [tensor.data_ptr() for tensor in _step_tensors(inputs)]
    mine = dict(zip(StepInputs.TENSORS, addresses, strict=True))
    calls = [_checked(call, mine, num_rows) for call in tape.calls]
    attended = {tuple(call.values[size] for size in "HKB") for call in calls if call.kind is Attention}
    if len(attended) > 1:
        raise NotRecordable(f"attention of layers differs in heads or blocks: {sorted(attended, key=str)}")
    return _placed(kernels, calls, outputs, tape.between)


def _inputs_of(num_rows: int) -> ForwardInputs:
    """Return inputs that stand for those of every step."""
    ids, positions, slots, lens = torch.zeros(4, num_rows, dtype=torch.int64)
    return ForwardInputs(
        token_ids_T=ids,
        positions_T=positions,
        slot_mapping_T=slots,
        num_decode=num_rows,
        decode_block_tables_RM=torch.zeros(num_rows, 1, dtype=torch.int64),
        decode_lens_R=lens,
        prefills=(),
        last_row_of_chunk=lens.numpy(),
    )


def _step_tensors(inputs: ForwardInputs) -> tuple[Tensor, ...]:
    """Return what changes from step to step, in the order of `StepInputs.TENSORS`."""
    rows = inputs.token_ids_T, inputs.positions_T, inputs.slot_mapping_T
    return (*rows, inputs.decode_block_tables_RM, inputs.decode_lens_R)


def _checked(call: RecordedCall, mine: dict[str, int], num_rows: int) -> RecordedCall:
    """Return a call without the step's own tensors, which lie at these addresses and which each run puts in."""
    values = dict(call.values)
    for name in mine.keys() & values.keys():
        tensor = values[name]
        if not isinstance(tensor, Tensor) or tensor.data_ptr() != mine[name]:
            raise NotRecordable(f"{call.kind.__name__} reads other {name} than the step's")
        values[name] = None
    if call.num_rows != num_rows:
        raise NotRecordable(f"{call.kind.__name__} computes {call.num_rows} of {num_rows} rows")
    return RecordedCall(call.kind, values)


def _placed(
    kernels: CpuKernels, calls: list[RecordedCall], outputs: tuple[Tensor, ...], between: dict[int, Tensor]
) -> RecordedStep:
    """Return the step with what calls hand to each other in one piece of memory."""
    addresses = {address: index for index, address in enumerate(between)}

    def number(tensor: Tensor) -> int | None:
        return addresses.get(tensor.untyped_storage().data_ptr())

    uses: list[list[int]] = [[] for _ in between]
    for i, call in enumerate(calls):
        for value in call.values.values():
            if isinstance(value, Tensor) and (buffer := number(value)) is not None:
                uses[buffer].append(i)
    for output in outputs:
        last = number(output)
        if last is None:
            raise NotRecordable("it returns what no call has written")
        uses[last].append(len(calls))
    sizes = [tensor.untyped_storage().nbytes() for tensor in between.values()]
    spans = [_Span(min(at, default=0), max(at, default=0), size) for at, size in zip(uses, sizes, strict=True)]
    offsets, num_bytes = _offsets(spans)
    arena = in_large_pages(torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8))
    arena = arena[-arena.data_ptr() % ALIGNMENT :][:num_bytes]
    numbers = arena.view(torch.float32)

    def there(value: Tensor) -> Tensor:
        buffer = number(value)
        if buffer is None:
            return value
        begin = offsets[buffer] // value.itemsize + numbers.storage_offset() + value.storage_offset()
        return numbers.as_strided(value.shape, value.stride(), int(begin))

    moved = [
        RecordedCall(call.kind, {name: there(x) if isinstance(x, Tensor) else x for name, x in call.values.items()})
        for call in calls
    ]
    return RecordedStep(kernels, moved, tuple(map(there, outputs)))


def _offsets(spans: Sequence[_Span]) -> tuple[list[int], int]:
    """Return where each span lies, none where another one is needed at the same time, and the bytes of all together."""
    offsets = [0] * len(spans)
    alive: list[tuple[int, int, int]] = []
    """Begin, end, and last call of what is needed."""
    num_bytes = 0
    for i in sorted(range(len(spans)), key=lambda i: spans[i].first):
        span = spans[i]
        alive = sorted(entry for entry in alive if entry[2] >= span.first)
        size, at = -(-span.num_bytes // ALIGNMENT) * ALIGNMENT, 0
        for begin, end, _ in alive:
            if begin - at >= size:
                break
            at = max(at, end)
        offsets[i] = at
        alive.append((at, at + size, span.last))
        num_bytes = max(num_bytes, at + size)
    return offsets, num_bytes
