"""Rows that begin alike: what the work list says against a look at every pair, and that it changes no completion."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rolloutd.engine.sequence import Batch, Chunk, Group, Request, Sequence
from rolloutd.kernels.prefix_attention import ITEM_ROWS, prefix_attention_reference
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.ops import AttentionSpec, Ops
from rolloutd.runtime.shared_prefix import MIN_TOKENS, SharedPrefixes, SharingRule, WorkList
from rolloutd.sampling_params import SamplingParams
from tests.runtime.loop_bench import Bench, ReplayingCapture, assert_same
from tests.runtime.test_decode_loop import CUT, GREEDY, SAMPLED

TinyModel = Callable[..., Path]
B = 4


def group(prompt_len: int, tables: list[list[int]]) -> list[Chunk]:
    """Return decode chunks of one group with these block tables."""
    made = Group.from_request(
        Request("r", tuple(range(prompt_len)), SamplingParams(n=len(tables))), seed=0, eos_token_ids=frozenset()
    )
    chunks = []
    for index, table in enumerate(tables):
        sequence = Sequence(made, index)
        sequence.block_table = list(table)
        chunks.append(Chunk(sequence, prompt_len, 1))
    return chunks


def sharing(option: str, num_rows: int, kv_bytes: int = 1 << 10) -> SharedPrefixes:
    rule = SharingRule.of(option, B)
    assert rule is not None
    return SharedPrefixes(rule, num_rows, B, kv_bytes)


def items_of(work: WorkList | None) -> list[tuple[int, list[int]]]:
    """Return (prefix, rows) of each item."""
    assert work is not None
    items = [[row for row in line if row >= 0] for line in work.item_rows_IW.tolist()]
    return [(int(work.prefix_lens_R[rows[0]]), rows) for rows in items]


def test_a_group_is_an_item_and_a_large_one_several_of_equal_size() -> None:
    shared = list(range(3))
    chunks = group(14, [[*shared, 10 + i] for i in range(2)]) + group(13, [[7, 8, 9, 30 + i] for i in range(19)])
    prefixes = sharing("on", 21)
    prefixes.begin(chunks)
    items = items_of(prefixes.work_list(np.arange(21)))
    assert [(prefix, len(rows)) for prefix, rows in items] == [(12, 2), (12, 7), (12, 6), (12, 6)]
    assert sorted(row for _, rows in items for row in rows) == list(range(21))
    assert max(len(rows) for _, rows in items) <= ITEM_ROWS


def test_a_sample_that_computed_its_own_copy_is_left_out() -> None:
    chunks = group(9, [[1, 2, 10], [3, 4, 11], [1, 2, 12], [3, 4, 13], [5, 6, 14]])
    prefixes = sharing("on", 5)
    prefixes.begin(chunks)
    assert items_of(prefixes.work_list(np.arange(5))) == [(8, [0, 2]), (8, [1, 3])]


def test_a_last_block_of_its_own_shortens_the_prefix() -> None:
    chunks = group(12, [[1, 2, 3, 10], [1, 2, 3, 11], [1, 2, 9, 12]])
    prefixes = sharing("on", 3)
    prefixes.begin(chunks)
    assert items_of(prefixes.work_list(np.arange(3))) == [(8, [0, 1, 2])]


def test_who_has_left_is_not_in_the_list_and_the_last_one_shares_with_nobody() -> None:
    prefixes = sharing("on", 6)
    prefixes.begin(group(8, [[1, 2, 10 + i] for i in range(3)]) + group(8, [[4, 5, 20 + i] for i in range(3)]))
    assert items_of(prefixes.work_list(np.array([5, 0, 3, 2]))) == [(8, [1, 3]), (8, [0, 2])]
    assert items_of(prefixes.work_list(np.array([5, 0, 2]))) == [(8, [1, 2])]
    assert prefixes.work_list(np.array([5, 0])) is None
    prefixes.begin(group(3, [[1], [1]]))
    assert prefixes.work_list(np.arange(2)) is None


def test_auto_asks_for_long_prefixes_and_for_bytes_that_are_worth_it() -> None:
    """1.5B (1 KiB a token and layer), groups of 8: on from 32 groups at 256 tokens and from 8 at 512, as estimated."""

    def pays(num_groups: int, prompt_len: int, samples: int = 8, kv_bytes: int = 1 << 10) -> bool:
        blocks = list(range(prompt_len // B))
        chunks = [chunk for _ in range(num_groups) for chunk in group(prompt_len, [[*blocks, 1]] * samples)]
        prefixes = sharing("auto", len(chunks), kv_bytes)
        prefixes.begin(chunks)
        return prefixes.work_list(np.arange(len(chunks))) is not None

    assert pays(32, MIN_TOKENS)
    assert not pays(32, MIN_TOKENS - B)
    assert pays(8, 512)
    assert not pays(4, 512)
    assert not pays(32, 1024, samples=1)
    assert not pays(8, 512, kv_bytes=512)
    assert SharingRule.of("off", B) is None


class SharedOps(Ops):
    """Attends as the work list says; a wrong list gives other tokens, or the reference's error."""

    def __init__(self) -> None:
        self.num_shared = 0

    def paged_attention(
        self, q_THD: Tensor, k_cache_NBKD: Tensor, v_cache_NBKW: Tensor, inputs: ForwardInputs, spec: AttentionSpec
    ) -> Tensor:
        shared = inputs.shared
        if shared is None or spec.window is not None:
            return super().paged_attention(q_THD, k_cache_NBKD, v_cache_NBKW, inputs, spec)
        self.num_shared += int((shared.item_rows_IW >= 0).sum())
        rows = inputs.decode_block_tables_RM, inputs.decode_lens_R
        lists = shared.prefix_lens_R, shared.item_rows_IW
        options = {"scale": spec.scale, "softcap": spec.softcap}
        return prefix_attention_reference(q_THD, k_cache_NBKD, v_cache_NBKW, *rows, *lists, **options)


def groups_come_and_go(bench: Bench) -> None:
    """Send random groups, some while others run; many of their samples end early."""
    rng = random.Random(21)
    for i in range(40):
        prompt = [rng.randrange(300) for _ in range(rng.choice([3, 8, 13, 21]))]
        params = dict(rng.choice([GREEDY, SAMPLED, SAMPLED, CUT]), n=rng.choice([1, 2, 3, 10]))
        stops = [rng.randrange(512) for _ in range(8)]
        bench.add(
            f"r{i}", prompt, max_tokens=rng.choice([9, 17, 40]), stop_token_ids=stops, ignore_eos=True, seed=i, **params
        )
        for _ in range(rng.choice([0, 1, 3])):
            bench.step()
    bench.finish()


def check_against_tables(monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    """Hold every work list against the block tables of the run's sequences, pair by pair."""
    from rolloutd.runtime.loop_rows import DeviceRows

    send = DeviceRows.send

    def checked(self: DeviceRows, run: Batch, staging: Any) -> Any:
        sent = send(self, run, staging)
        if sent.shared is None:
            return sent
        prefixes = sent.shared.prefix_lens_R.tolist()
        placed = [0] * len(prefixes)
        for line in sent.shared.item_rows_IW.tolist():
            rows = [row for row in line if row >= 0]
            assert len(rows) >= 2
            sequences = [run.chunks[row].sequence for row in rows]
            assert len({id(sequence.group) for sequence in sequences}) == 1
            num_blocks = prefixes[rows[0]] // B
            assert len({tuple(sequence.block_table[:num_blocks]) for sequence in sequences}) == 1
            assert all(run.chunks[row].start >= prefixes[row] == num_blocks * B for row in rows)
            for row in rows:
                placed[row] += 1
            seen.append(len(rows))
        assert placed == [int(prefix > 0) for prefix in prefixes]
        return sent

    monkeypatch.setattr(DeviceRows, "send", checked)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
@pytest.mark.parametrize("pool", [{}, {"kv_cache_bytes": 90 * 4 * 2 * 2 * 2 * 16 * 4}])
def test_random_traffic_gives_the_same_completions(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: str, pool: dict[str, Any]
) -> None:
    seen: list[int] = []
    check_against_tables(monkeypatch, seen)
    model, capture, ops = tiny_model(kind, extra_eos=4), ReplayingCapture(), SharedOps()
    plain = Bench(model, loop=False, **pool)
    loop = Bench(model, loop=True, capture=capture, sharing="on", **pool)
    loop.runner._model._ops = ops
    for bench in (plain, loop):
        groups_come_and_go(bench)
    assert_same(loop, plain)
    assert len(seen) > 40
    assert len(set(seen)) > 2
    assert ops.num_shared > 100
    assert {key[3] for key in loop.runner._graphs._replays} == {False, True}


def test_late_samples_share_too(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples than seats: those seated late found the prompt in the prefix cache."""
    seen: list[int] = []
    check_against_tables(monkeypatch, seen)
    model, rng = tiny_model(), random.Random(0)
    plain, loop = Bench(model, loop=False), Bench(model, loop=True, sharing="on")
    loop.runner._model._ops = SharedOps()
    prompt = [rng.randrange(300) for _ in range(3 * B)]
    for bench in (plain, loop):
        bench.add("r", prompt, n=40, max_tokens=30, seed=1)
        bench.finish()
    assert_same(loop, plain)
    assert max(seen) >= 6


def test_the_pytorch_stub_sees_a_list_that_is_wrong(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: rows of other groups are attended to wrongly."""

    def work_list(self: SharedPrefixes, rows_R: Any) -> WorkList:
        items = np.full((1, ITEM_ROWS), -1, np.int32)
        items[0, :2] = [0, len(rows_R) - 1]
        prefix_lens = np.zeros(len(rows_R), np.int32)
        prefix_lens[[0, -1]] = B
        return WorkList(items, prefix_lens)

    monkeypatch.setattr(SharedPrefixes, "work_list", work_list)
    plain, loop = Bench(tiny_model(), loop=False), Bench(tiny_model(), loop=True, sharing="on")
    loop.runner._model._ops = SharedOps()
    for bench in (plain, loop):
        for i in range(4):
            bench.add(f"r{i}", [i + 1] * (B + 3), max_tokens=9, ignore_eos=True, seed=i)
        bench.finish()
    with pytest.raises(AssertionError):
        assert_same(loop, plain)
    assert torch.isfinite(torch.tensor([p for out in loop.outputs.values() for p in out.logprobs])).all()
