"""begin_step and end_step as kernels, against their references and against a plain Python walk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rolloutd.kernels import begin_step as begin_module
from rolloutd.kernels import end_step as end_module
from rolloutd.kernels.begin_step import StepRows, begin_step, begin_step_reference
from rolloutd.kernels.end_step import end_step, end_step_reference
from rolloutd.kernels.row_state import DONE, FIRST_STOP, LIMIT, POSITION, TOKEN, RowState

NUM_STOPS = 3
BLOCK_SIZE = 5
SCRATCH = 977 * BLOCK_SIZE


def random_state(num_rows: int, generator: torch.Generator, device: torch.device) -> RowState:
    """Return rows of 64-bit numbers, the last of which has ended."""
    state = RowState.allocate(num_rows, NUM_STOPS, device)
    ints = torch.randint(-(2**62), 2**62, state.ints_SI.shape, generator=generator)
    ints[:, TOKEN] = torch.randint(0, 50, (num_rows,), generator=generator)
    ints[:, POSITION] = torch.randint(0, 40, (num_rows,), generator=generator)
    ints[:, LIMIT] = ints[:, POSITION] + torch.randint(1, 5, (num_rows,), generator=generator)
    ints[:, DONE] = torch.randint(0, 2, (num_rows,), generator=generator)
    ints[:, FIRST_STOP:] = torch.randint(-1, 9, (num_rows, NUM_STOPS), generator=generator)
    ints[-1, DONE] = 1
    state.ints_SI.copy_(ints)
    state.floats_SF.copy_(torch.rand(state.floats_SF.shape, generator=generator))
    return state


def random_active(num_rows: int, num_padding: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return all rows but the last in any order, then the last as often as asked."""
    rows = torch.randperm(num_rows - 1, generator=generator)
    return torch.cat((rows, torch.full((num_padding,), num_rows - 1))).to(device)


def poisoned_rows(num_rows: int, device: torch.device) -> StepRows:
    rows = StepRows.allocate(num_rows, device)
    for tensor in rows.tensors():
        tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
    return rows


@pytest.mark.parametrize(("num_state_rows", "num_padding"), [(2, 0), (4, 1), (9, 7), (131, 14)])
def test_a_step_begins_with_what_its_rows_remember(
    device: torch.device, generator: torch.Generator, num_state_rows: int, num_padding: int
) -> None:
    state = random_state(num_state_rows, generator, device)
    active = random_active(num_state_rows, num_padding, generator, device)
    wide = torch.randint(0, 900, (len(active), 11), generator=generator).int().to(device)
    tables = wide[:, 1:10]
    actual, wanted = poisoned_rows(len(active), device), poisoned_rows(len(active), device)
    begin_step(active, state, tables, actual, block_size=BLOCK_SIZE, scratch_slot=SCRATCH)
    begin_step_reference(active, state, tables, wanted, block_size=BLOCK_SIZE, scratch_slot=SCRATCH)
    for a, b in zip(actual.tensors(), wanted.tensors(), strict=True):
        assert torch.equal(a, b)
    for i, row in enumerate(active.tolist()):
        token, position, _, done, seed, index, top_k = state.ints_SI[row, :7].tolist()
        slot = int(tables[i, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        position = 0 if done else position
        ints = [tensor[i].item() for tensor in actual.tensors()[:8]]
        expected = [0 if done else token, position, SCRATCH if done else slot, 0 if done else position + 1]
        assert ints == [*expected, position + 1, seed, index, top_k]
        temperature, *cuts = state.floats_SF[row].tolist()
        assert [tensor[i].item() for tensor in actual.tensors()[8:]] == [-1.0 if done else temperature, *cuts]


@pytest.mark.parametrize("logprob_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_state_rows", "num_padding"), [(2, 0), (4, 1), (9, 7), (131, 14)])
def test_a_step_ends_with_what_was_drawn(
    device: torch.device,
    generator: torch.Generator,
    num_state_rows: int,
    num_padding: int,
    logprob_dtype: torch.dtype,
) -> None:
    state = random_state(num_state_rows, generator, device)
    active = random_active(num_state_rows, num_padding, generator, device)
    n, apart = len(active), 4
    drawn = [torch.randint(0, 9, (n,), generator=generator).to(device)]
    drawn += [(-torch.rand(n, generator=generator)).to(logprob_dtype).to(device) for _ in range(2)]
    ended = state.ints_SI[active, DONE] == 1
    drawn[1][ended], drawn[2][ended] = float("nan"), float("nan")  # what an ended row computes is nothing
    cursor = torch.randint(0, apart, (n,), generator=generator).int().to(device)
    record = torch.full((3 * apart + 1, n + 2), -9, dtype=torch.int32, device=device)
    before = state.ints_SI.clone(), cursor.clone()
    states = [RowState(state.ints_SI.clone(), state.floats_SF.clone()) for _ in range(2)]
    cursors, records = [cursor.clone(), cursor.clone()], [record.clone(), record.clone()]
    end_step(*drawn, active, states[0], cursors[0], records[0], cells_apart=apart)
    end_step_reference(*drawn, active, states[1], cursors[1], records[1], cells_apart=apart)
    for a, b in ((states[0].ints_SI, states[1].ints_SI), (cursors[0], cursors[1]), (records[0], records[1])):
        assert torch.equal(a, b)
    for i, row in enumerate(active.tolist()):
        old, new, at = before[0][row].tolist(), states[0].ints_SI[row].tolist(), int(before[1][i])
        if old[DONE]:
            assert new == old
            assert int(cursors[0][i]) == at
            assert bool((records[0][:, i] == -9).all())
            continue
        token = int(drawn[0][i])
        assert int(records[0][at, i]) == token
        floats = records[0].view(torch.float32)[:, i]
        assert [float(floats[at + apart]), float(floats[at + 2 * apart])] == [float(d[i].float()) for d in drawn[1:]]
        assert int((records[0][:, i] != -9).sum()) == 3
        assert int(cursors[0][i]) == at + 1
        assert (new[TOKEN], new[POSITION]) == (token, old[POSITION] + 1)
        assert new[DONE] == (token in old[FIRST_STOP:] or old[POSITION] + 2 >= old[LIMIT])


def test_a_cursor_outside_the_record_writes_nothing(device: torch.device, generator: torch.Generator) -> None:
    state = random_state(4, generator, device)
    state.ints_SI[:3, DONE] = 0
    big = torch.full((20, 4), -9, dtype=torch.int32, device=device)
    cursor = torch.tensor([-1, 2, 1 << 30], dtype=torch.int32, device=device)
    token, logprob = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(3, device=device)
    end_step(token, logprob, logprob, torch.arange(3, device=device), state, cursor, big[6:13], cells_apart=3)
    assert bool((big == -9).all())


class CountingKernel:
    """Stands in for a kernel and counts its launches."""

    def __init__(self) -> None:
        self.num_launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, **options: Any) -> None:
        self.num_launches += 1


class RecordingMode(TorchDispatchMode):
    """Notes every torch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_each_end_of_a_step_is_one_launch_and_no_other_work_on_the_device(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = CountingKernel(), CountingKernel()
    monkeypatch.setattr(begin_module, "begin_step_kernel", kernels[0])
    monkeypatch.setattr(end_module, "end_step_kernel", kernels[1])
    state, rows = random_state(300, generator, device), StepRows.allocate(290, device)
    active, tables = torch.arange(290, device=device), torch.zeros(290, 4, dtype=torch.int32, device=device)
    drawn = torch.zeros(290, dtype=torch.int64, device=device), *(torch.zeros(290, device=device) for _ in range(2))
    cursor = torch.zeros(290, dtype=torch.int32, device=device)
    record = torch.zeros(13, 384, dtype=torch.int32, device=device)
    with RecordingMode() as seen:
        begin_step(active, state, tables, rows, block_size=16, scratch_slot=0)
        end_step(*drawn, active, state, cursor, record, cells_apart=4)
    assert [kernel.num_launches for kernel in kernels] == [1, 1]
    assert set(seen.ops) <= {"aten.view.dtype", "aten.detach.default"}  # no work: other names of the same memory
