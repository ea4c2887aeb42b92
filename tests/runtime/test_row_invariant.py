"""`RowInvariantOps`: a row's bits against row count, place, chunking and pool; and a proof that can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rolloutd.errors import ConfigError
from rolloutd.runtime.inputs import ForwardInputs, PrefillRows
from rolloutd.runtime.kv_cache import KVLayer
from rolloutd.runtime.ops import AttentionSpec, Ops
from rolloutd.runtime.row_invariant import ROW_COUNTS, RowInvariantOps
from rolloutd.runtime.row_proof import proven_counts
from rolloutd.weights.packing import Linear, LoraSlice


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(num_out: int, num_in: int, dtype: torch.dtype = torch.float32) -> Linear:
    return Linear(random(num_out, num_in).to(dtype), random(num_out, seed=1).to(dtype))


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_out", "num_in"), [(96, 32), (64, 50), (8, 33), (1, 50), (3, 5), (257, 96)])
def test_a_row_has_the_same_bits_in_every_company(num_out: int, num_in: int, dtype: torch.dtype, threads: None) -> None:
    ops, layer = RowInvariantOps(), linear_of(num_out, num_in, dtype)
    x = random(300, num_in, seed=2).to(dtype)
    alone = torch.cat([ops.linear(row[None].clone(), layer) for row in x])
    for num_rows in [*range(1, 71), 255, 257, 300]:
        for first in {0, 1, 300 - num_rows} - ({1} if num_rows == 300 else set()):
            rows = slice(first, first + num_rows)  # a view: its rows start anywhere in memory
            assert torch.equal(ops.linear(x[rows], layer), alone[rows]), (num_rows, first)
    torch.testing.assert_close(alone, Ops().linear(x, layer), atol=1e-5 if dtype == torch.float32 else 0.2, rtol=1e-2)


def test_an_adapter_goes_by_rows_too() -> None:
    cut = LoraSlice(8, 40, random(3, 48, seed=3), random(32, 3, seed=4), 0.5)
    layer = Linear(random(64, 48), None, (cut,))
    ops, x = RowInvariantOps(), random(70, 48, seed=5)
    alone = torch.cat([ops.linear(row[None], layer) for row in x])
    assert all(torch.equal(ops.linear(x[:n], layer), alone[:n]) for n in range(1, 71))
    torch.testing.assert_close(alone, Ops().linear(x, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_activations_do_not_depend_on_where_a_row_ends(name: str, threads: None) -> None:
    ops, x = RowInvariantOps(), random(68, 2 * 1001, seed=6)
    activation = getattr(ops, name)
    alone = torch.cat([activation(row[None].clone()) for row in x])
    assert all(torch.equal(activation(x[:n]), alone[:n]) for n in (1, 2, 3, 33, 67, 68))
    torch.testing.assert_close(alone, getattr(Ops(), name)(x), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------- attention

B, NUM_BLOCKS, LENGTH = 7, 60, 300

SPECS = [
    (4, 2, 16, 16, AttentionSpec(0.25)),
    (7, 1, 5, 5, AttentionSpec(5**-0.5)),
    (6, 3, 8, 2, AttentionSpec(8**-0.5, window=20)),
    (2, 2, 2, 24, AttentionSpec(0.5, softcap=3.0)),
]


class Attention:
    """One sequence of `LENGTH` tokens in a poisoned pool, and others beside it."""

    def __init__(self, heads: int, kv_heads: int, key_dim: int, value_dim: int, spec: AttentionSpec) -> None:
        self.spec, self.ops = spec, RowInvariantOps()
        self.q = random(LENGTH, heads, key_dim, seed=7)
        self.caches = (
            random(NUM_BLOCKS, B, kv_heads, key_dim, seed=8),
            random(NUM_BLOCKS, B, kv_heads, value_dim, seed=9),
        )
        for cache in self.caches:
            cache[0] *= 1e4  # tables are padded with block 0: what it holds must not matter
        self.table = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1))[: -(-LENGTH // B)] + 1

    def decode(self, positions: list[int], extra_blocks: int = 0) -> Tensor:
        tables = F.pad(self.table, (0, extra_blocks)).expand(len(positions), -1)
        return self._run(self.q[positions], inputs(tables, torch.tensor(positions) + 1, ()))

    def chunk(self, start: int, length: int) -> Tensor:
        rows = PrefillRows(0, start, length, self.table[: -(-(start + length) // B)])
        none = torch.empty((0, 0), dtype=torch.long)
        return self._run(self.q[start : start + length], inputs(none, none.flatten(), (rows,)))

    def _run(self, q: Tensor, inputs: ForwardInputs) -> Tensor:
        return self.ops.paged_attention(q, *self.caches, inputs, self.spec)


def inputs(tables: Tensor, lens: Tensor, prefills: tuple[PrefillRows, ...]) -> ForwardInputs:
    ids = torch.zeros(1, dtype=torch.long)
    return ForwardInputs(
        token_ids_T=ids,
        positions_T=ids,
        slot_mapping_T=ids,
        num_decode=len(lens),
        decode_block_tables_RM=tables,
        decode_lens_R=lens,
        prefills=prefills,
        last_row_of_chunk=np.zeros(1, np.int64),
    )


@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim", "spec"), SPECS)
def test_a_query_has_the_same_bits_decoded_or_in_any_chunk(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, spec: AttentionSpec, threads: None
) -> None:
    attention = Attention(heads, kv_heads, key_dim, value_dim, spec)
    whole = attention.chunk(0, LENGTH)
    for start, length in [(0, 1), (0, 127), (0, 128), (0, 129), (37, 3), (120, 20), (1, 299), (299, 1), (255, 45)]:
        assert torch.equal(attention.chunk(start, length), whole[start : start + length]), (start, length)
    for positions in ([0], [126, 127, 128], [5, 299], list(range(0, 300, 7)), [299] * 5):
        for extra_blocks in (0, 40):
            assert torch.equal(attention.decode(positions, extra_blocks), whole[positions]), positions


@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim", "spec"), SPECS)
def test_attention_is_close_to_float64(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, spec: AttentionSpec
) -> None:
    attention = Attention(heads, kv_heads, key_dim, value_dim, spec)
    k, v = (cache[attention.table].flatten(0, 1)[:LENGTH].double() for cache in attention.caches)
    k, v = (tensor.repeat_interleave(heads // kv_heads, 1) for tensor in (k, v))
    scores = torch.einsum("thd,lhd->htl", attention.q.double(), k) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    seen = torch.ones(LENGTH, LENGTH).tril().bool()
    if spec.window is not None:
        seen &= torch.ones(LENGTH, LENGTH).triu(1 - spec.window).bool()
    expected = torch.einsum("htl,lhw->thw", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    torch.testing.assert_close(attention.chunk(0, LENGTH).double(), expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------- the proof


def bump(y: Tensor, rows: object) -> Tensor:
    """Return `y` with the last bits of some rows changed."""
    y = y.clone()
    y[rows] = torch.nextafter(y[rows], torch.tensor(math.inf))
    return y


FAULTS = {
    "last row": lambda y: bump(y, -1),
    "odd rows": lambda y: bump(y, slice(1, None, 2)),
    "one place of four": lambda y: bump(y, slice(2, None, 4)),
    "one number in a hundred": lambda y: torch.where(torch.arange(y.numel()).view_as(y) % 101 == 7, y * (1 + 2e-7), y),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("num_out", [1, 64])
def test_a_product_whose_bits_go_by_place_is_refused(fault: str, num_out: int) -> None:
    ops = RowInvariantOps(product=lambda x, w, b: FAULTS[fault](F.linear(x, w, b)))
    with pytest.raises(ConfigError, match=rf"deterministic=True.*{max(16, num_out)} x 32 matrix.*Leave deterministic"):
        ops.prepare([linear_of(num_out, 32)], [])


def test_a_matrix_of_zeros_is_no_proof() -> None:
    """B of a new adapter: every product with it is zero, and the next adapter has the same shape."""
    ops = RowInvariantOps(product=lambda x, w, b: FAULTS["last row"](F.linear(x, w, b)) * (w != 0).any())
    with pytest.raises(ConfigError):
        ops.prepare([Linear(torch.zeros(64, 8), None)], [])


def test_counts_that_disagree_are_left_out() -> None:
    """Another kernel from 48 rows on, which differs in one row of a hundred: what is kept are the smaller ones."""

    def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = F.linear(x, w, b)
        return bump(y, -1) if len(x) >= 48 else y

    layer, ops = linear_of(96, 32), RowInvariantOps(product=product)
    x = random(200, 32, seed=2)
    alone = torch.cat([ops.linear(row[None], layer) for row in x])
    assert torch.equal(ops.linear(x, layer), alone)
    assert torch.equal(ops.linear(x[:61], layer), alone[:61])


@pytest.mark.parametrize("fault", ["a row's place", "a product's place", "the batch"])
def test_batched_products_whose_bits_go_by_place_are_refused(fault: str) -> None:
    def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        y = torch.bmm(a, b)
        if fault == "a row's place":
            y = bump(y.transpose(0, 1), -1).transpose(0, 1)
        elif len(y) > 1:
            y = bump(y, -1 if fault == "a product's place" else slice(None))
        return y if out is None else out.copy_(y)

    with pytest.raises(ConfigError, match=r"deterministic=True.*piece of keys"):
        RowInvariantOps(batched_product=bmm).prepare([], [KVLayer(2, 8, 8)])


def test_a_proof_holds_for_the_number_of_threads_that_it_was_made_with() -> None:
    calls = []
    ops = RowInvariantOps(product=lambda x, w, b: (calls.append(len(x)), F.linear(x, w, b))[1])
    layer, before = linear_of(32, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ops.prepare([layer], [])
        num_calls = len(calls)
        ops.prepare([layer], [])
        assert len(calls) == num_calls
        torch.set_num_threads(2)
        ops.prepare([layer], [])
        assert len(calls) == 2 * num_calls
    finally:
        torch.set_num_threads(before)


def test_a_large_matrix_is_proven_in_few_rows() -> None:
    """The work is bounded: no product of 256 rows with a matrix of 10^9 numbers."""
    sizes: list[int] = []

    def product(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x[:, :1]

    proven = proven_counts(product, random(256, 2), 10**9, ROW_COUNTS)
    assert 0 < max(proven) <= max(sizes) <= 16
