"""New weights under captured steps, and what the runner does with its cache and with single steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rolloutd.models import registry
from rolloutd.models.model import pack
from rolloutd.runtime.inputs import ForwardInputs
from rolloutd.runtime.ops import AttentionSpec, Ops, Projection
from rolloutd.runtime.row_invariant import RowInvariantOps
from rolloutd.runtime.step_graphs import StepGraphs
from rolloutd.runtime.triton_ops import TritonOps
from rolloutd.weights.in_place import overwrite
from rolloutd.weights.lora import LoraPair
from rolloutd.weights.packing import DecoderWeights, Linear
from rolloutd.weights.relocation import Relocation
from rolloutd.weights.store import WeightStore
from tests.runtime.loop_bench import Bench, ReplayingCapture, assert_same

TinyModel = Callable[..., Path]
Update = Callable[[Bench, Path], DecoderWeights]

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def trained(folder: Path, seed: int) -> dict[str, Tensor]:
    """Return the checkpoint's tensors, each changed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor + torch.randn(tensor.shape, generator=generator) * 0.05 for name, tensor in tensors.items()}


def full(seed: int) -> Update:
    return lambda bench, folder: pack(bench.runner._model, trained(folder, seed).items())


def adapter(seed: int, *, merge: bool = False, rank: int = 4, scaling: float = 2.0) -> Update:
    """Return an adapter on what the checkpoint has, as the weight store would build it."""

    def build(bench: Bench, folder: Path) -> DecoderWeights:
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for path in (Q, DOWN):
            rows, columns = bench.runner._model.lora_targets[path]
            a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
            pairs[path] = LoraPair(a * 0.2, b * 0.2, scaling)
        weights: DecoderWeights = bench.runner._model.with_adapter(bench.base, pairs, merge=merge)
        return weights

    return build


class AppendingOps(Ops):
    """Leaves adapters to the op that follows, as a GPU's ops do; those are PyTorch's here."""

    appends_adapters = True

    def project(self, x: Tensor, layer: Linear) -> Projection:
        return TritonOps.project(self, x, layer)  # type: ignore[arg-type]


class UpdatedBench(Bench):
    """A bench that does to its weights what the engine and its store do."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.folder = folder
        self.base: DecoderWeights = self.runner.weights

    def update(self, build: Update) -> None:
        weights = build(self, self.folder)
        self.runner.weights = weights
        if not weights.adapters and weights.packed["model.norm.weight"] is not self.base.packed["model.norm.weight"]:
            self.base = self.runner.weights

    def rollout(self, name: str) -> None:
        for i in range(4):
            self.add(f"{name}{i}", [7, 8, 9 + i], max_tokens=12, ignore_eos=True, seed=i, temperature=1.0)
        self.finish()


@pytest.mark.parametrize(
    ("updates", "num_resets"),
    [
        ([full(1), full(2), full(3)], 0),
        ([adapter(1), adapter(2), adapter(3)], 1),
        ([adapter(1), adapter(2, scaling=0.5), adapter(3, rank=2)], 3),
        ([adapter(1, merge=True), adapter(2, merge=True), adapter(3)], 3),
        ([full(1), adapter(1), adapter(2), full(2), adapter(3)], 3),
        ([full(1), adapter(1, merge=True), full(2), full(3), adapter(2)], 2),
    ],
)
@pytest.mark.parametrize("appends", [False, True])
def test_new_weights_serve_and_graphs_that_can_stay_do(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, updates: list[Update], num_resets: int, appends: bool
) -> None:
    folder, capture = tiny_model(tie=True), ReplayingCapture()
    plain = UpdatedBench(folder, loop=False)
    if appends:
        monkeypatch.setattr(registry, "_ops_for", lambda *args: AppendingOps())
    loop = UpdatedBench(folder, loop=True, capture=capture, max_lora_rank=4)
    resets_before = capture.num_resets
    for bench in (plain, loop):
        for i, update in enumerate(updates):
            bench.rollout(f"r{i} ")
            bench.update(update)
            lies_below = bool(list(bench.runner.weights.appended()))
            assert lies_below == bool(appends and bench is loop and bench.runner.weights.adapters)
        bench.rollout("last ")
    assert_same(loop, plain)
    assert capture.num_resets - resets_before == num_resets


@pytest.mark.parametrize("updates", [[], [adapter(1)], [adapter(1, merge=True)]])
def test_weights_that_moved_are_read_by_new_graphs(tiny_model: TinyModel, updates: list[Update]) -> None:
    folder, capture = tiny_model(tie=True), ReplayingCapture()
    plain, loop = UpdatedBench(folder, loop=False), UpdatedBench(folder, loop=True, capture=capture)
    for bench in (plain, loop):
        for update in updates:
            bench.update(update)
        bench.rollout("before ")
    resets, old = capture.num_resets, loop.runner.weights
    loop.runner.relocate(loop.runner._model.relocated(old, Relocation.to(torch.device("cpu"))))
    for tensor in old.tensors():
        tensor.fill_(float("nan"))
    for bench in (plain, loop):
        bench.rollout("after ")
    assert_same(loop, plain)
    assert capture.num_resets == resets + 1


def test_the_base_is_never_written_while_an_adapter_serves(tiny_model: TinyModel) -> None:
    bench = UpdatedBench(tiny_model(), loop=True, capture=ReplayingCapture())
    before = {name: tensor.clone() for name, tensor in bench.base.packed.items()}
    for update in (adapter(1), adapter(2), adapter(3, merge=True), adapter(4, merge=True), adapter(5)):
        bench.update(update)
    for name, tensor in bench.base.packed.items():
        assert torch.equal(tensor, before[name]), name


def test_overwriting_copies_all_or_nothing(tiny_model: TinyModel) -> None:
    bench = UpdatedBench(tiny_model(), loop=True)
    serving, new = bench.base, full(1)(bench, bench.folder)
    addresses = [tensor.data_ptr() for tensor in serving.tensors()]
    assert overwrite(serving, new)
    assert [tensor.data_ptr() for tensor in serving.tensors()] == addresses
    assert all(torch.equal(serving.packed[name], tensor) for name, tensor in new.packed.items())
    assert torch.equal(serving.layers[0].qkv.weight, new.layers[0].qkv.weight)
    merged = adapter(1, merge=True)(bench, bench.folder)
    before = {name: tensor.clone() for name, tensor in serving.packed.items()}
    assert not overwrite(serving, merged)
    assert all(torch.equal(serving.packed[name], tensor) for name, tensor in before.items())


def test_the_store_takes_the_serving_copy_of_a_full_update_as_its_base_and_no_adapters() -> None:
    model, first, second = object(), object(), object()
    store: WeightStore[Any] = WeightStore(model, first)  # type: ignore[arg-type]
    store.begin("u1", "lora")
    store.adopt(second)
    assert store._base is first
    store.abort("u1")
    store.begin("u2", "full")
    store.adopt(second)
    assert store._base is second


def test_the_cache_comes_back_with_new_graphs(tiny_model: TinyModel) -> None:
    capture = ReplayingCapture()
    plain, loop = UpdatedBench(tiny_model(), loop=False), UpdatedBench(tiny_model(), loop=True, capture=capture)
    for bench in (plain, loop):
        bench.rollout("before ")
        bench.engine.sleep()
        bench.engine.wake_up()
        bench.poison()
        bench.rollout("after ")
    assert_same(loop, plain)
    assert capture.num_captured == 2
    num_blocks = loop.engine.info.num_blocks
    assert loop.runner._cache.keys[0].shape[0] == num_blocks + 1
    assert loop.runner._loop._sizes.scratch_block == num_blocks


def test_without_a_capture_steps_stay_eager() -> None:
    graphs, calls = StepGraphs(None), []
    step = graphs.replay_of("key", lambda: calls.append(1))
    assert not calls
    step()
    assert calls == [1]
    assert len(graphs) == 0
    graphs.forget()


@pytest.mark.parametrize("ops", [Ops(), RowInvariantOps()])
@pytest.mark.parametrize("spec", [AttentionSpec(0.3), AttentionSpec(0.3, window=3), AttentionSpec(0.3, softcap=2.0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_decode_rows_of_length_zero_give_zeros_and_masked_places_are_not_read(
    ops: Ops, spec: AttentionSpec, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 7, 4, 2, 16, generator=generator)
    q = torch.randn(5, 4, 16, generator=generator)
    lens = [6, 0, 1, 8, 0]
    tables = torch.tensor([[3, 1], [6, 6], [2, 6], [5, 4], [0, 0]], dtype=dtype)

    def attend(rows: list[int], width: int) -> Tensor:
        inputs = ForwardInputs(
            token_ids_T=torch.zeros(len(rows), dtype=torch.int64),
            positions_T=torch.zeros(len(rows), dtype=torch.int64),
            slot_mapping_T=torch.zeros(len(rows), dtype=torch.int64),
            num_decode=len(rows),
            decode_block_tables_RM=tables[rows][:, :width],
            decode_lens_R=torch.tensor([lens[row] for row in rows], dtype=dtype),
            prefills=(),
            last_row_of_chunk=torch.arange(len(rows)).numpy(),
        )
        return ops.paged_attention(q[rows], keys, values, inputs, spec)

    clean = attend([0, 1, 2, 3, 4], 2)
    assert clean.isfinite().all()
    assert not clean[[1, 4]].any()
    assert not attend([1, 4], 1).any()
    if isinstance(ops, RowInvariantOps):
        return  # its pieces are read whole
    for cache in (keys, values):
        cache[6], cache[0], cache[1, 2:], cache[2, 1:] = (float("nan"),) * 4
    assert torch.equal(attend([0, 1, 2, 3, 4], 2), clean)
    torch.testing.assert_close(attend([2], 1)[0], values[2, 0].repeat_interleave(2, 0))
