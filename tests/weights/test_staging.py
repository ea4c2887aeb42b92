"""A staged update: cut anywhere, disordered, doubled or altered, it is whole and verified or it is refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolloutd.errors import DigestMismatch, ManifestMismatch, WeightsError
from rolloutd.weights.digest import tensor_digest
from rolloutd.weights.manifest import TensorSpec, WeightManifest
from rolloutd.weights.shared_memory import Segment
from rolloutd.weights.staging import StagedUpdate
from rolloutd.weights.tensors import bytes_of, spec_of, tensor_from

CHUNK_BYTES = 24


@dataclass(frozen=True, slots=True)
class Chunk:
    spec: TensorSpec
    offset: int
    data: bytes


def make_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 7), "b": (64,), "c": (3, 1, 4), "d": ()}
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float32}
    return {name: torch.randn(shape, generator=generator).to(dtypes[name]) for name, shape in shapes.items()}


TENSORS = make_tensors()
SPECS = {name: spec_of(name, tensor) for name, tensor in TENSORS.items()}
MANIFEST = WeightManifest(
    {name: tensor_digest(SPECS[name], bytes_of(tensor)) for name, tensor in TENSORS.items()},
    sum(spec.num_bytes for spec in SPECS.values()),
)
CHUNKS = [
    Chunk(SPECS[name], offset, bytes(bytes_of(tensor)[offset : offset + CHUNK_BYTES]))
    for name, tensor in TENSORS.items()
    for offset in range(0, SPECS[name].num_bytes, CHUNK_BYTES)
]


def check(spec: TensorSpec) -> None:
    """What a model with the tensors of `SPECS` says."""
    if spec.name not in SPECS or spec.shape != SPECS[spec.name].shape:
        raise ManifestMismatch(f"the model has no {spec.name!r} of shape {list(spec.shape)}.")


def stage(chunks: list[Chunk]) -> StagedUpdate:
    update = StagedUpdate("update", check)
    for chunk in chunks:
        update.write(chunk.spec, chunk.offset, memoryview(chunk.data))
    return update


def assert_verified(update: StagedUpdate) -> None:
    tensors = update.verify(MANIFEST)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_the_tensors_come_out_as_they_went_in() -> None:
    assert_verified(stage(CHUNKS))


@pytest.mark.parametrize("num_landed", range(len(CHUNKS)))
def test_a_cut_at_every_chunk_boundary_is_refused(num_landed: int) -> None:
    update = stage(CHUNKS[:num_landed])
    with pytest.raises(ManifestMismatch, match=r"incomplete|never landed"):
        update.verify(MANIFEST)
    for chunk in CHUNKS[num_landed:]:
        update.write(chunk.spec, chunk.offset, memoryview(chunk.data))
    assert_verified(update)


@pytest.mark.parametrize("lost", range(len(CHUNKS)))
def test_one_lost_chunk_is_refused_by_the_tensors_name(lost: int) -> None:
    update = stage(CHUNKS[:lost] + CHUNKS[lost + 1 :])
    with pytest.raises(ManifestMismatch, match=rf"\b{CHUNKS[lost].spec.name}\b.*Push again"):
        update.verify(MANIFEST)


def test_the_first_gap_is_named() -> None:
    spec = SPECS["b"]
    update = stage([chunk for chunk in CHUNKS if chunk.spec != spec or chunk.offset != 2 * CHUNK_BYTES])
    with pytest.raises(ManifestMismatch, match=r"b is incomplete: 104 of 128 bytes landed, none at 48"):
        update.verify(MANIFEST)


def test_chunks_may_come_in_any_order_and_twice() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        chunks = CHUNKS + rng.sample(CHUNKS, 10)
        rng.shuffle(chunks)
        assert_verified(stage(chunks))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_overlapping_cuts_of_equal_bytes_land(data: st.DataObject) -> None:
    update = StagedUpdate("update", check)
    for name, tensor in TENSORS.items():
        spec, content = SPECS[name], bytes_of(tensor)
        for start in data.draw(st.lists(st.integers(0, spec.num_bytes), max_size=8)):
            stop = data.draw(st.integers(start, spec.num_bytes))
            update.write(spec, start, content[start:stop])
        update.write(spec, 0, content)
    assert_verified(update)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_what_landed_is_known_to_the_byte(data: st.DataObject) -> None:
    spec, content = SPECS["b"], bytes_of(TENSORS["b"])
    update, landed = StagedUpdate("update", check), set[int]()
    manifest = WeightManifest({"b": MANIFEST.digests["b"]}, spec.num_bytes)
    update.write(spec, 0, content[:0])
    for start in data.draw(st.lists(st.integers(0, spec.num_bytes), max_size=10)):
        stop = data.draw(st.integers(start, spec.num_bytes))
        update.write(spec, start, content[start:stop])
        landed |= set(range(start, stop))
    if len(landed) == spec.num_bytes:
        assert torch.equal(update.verify(manifest)["b"], TENSORS["b"])
    else:
        with pytest.raises(ManifestMismatch, match=f"{len(landed)} of 128 bytes landed"):
            update.verify(manifest)


def test_every_flipped_bit_is_refused_by_name() -> None:
    for index, chunk in enumerate(CHUNKS):
        for bit in range(8 * len(chunk.data)):
            altered = bytearray(chunk.data)
            altered[bit // 8] ^= 1 << bit % 8
            update = stage([*CHUNKS[:index], replace(chunk, data=bytes(altered)), *CHUNKS[index + 1 :]])
            with pytest.raises(DigestMismatch, match=rf"^DIGEST_MISMATCH: {chunk.spec.name}: .*Push again"):
                update.verify(MANIFEST)


def test_swapped_chunks_are_refused() -> None:
    chunks = list(CHUNKS)
    chunks[0], chunks[1] = replace(chunks[0], data=chunks[1].data), replace(chunks[1], data=chunks[0].data)
    with pytest.raises(DigestMismatch, match="a: the bytes that landed"):
        stage(chunks).verify(MANIFEST)


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 24), (0, 12), (8, 24), (12, 100), (90, 38)])
def test_bytes_that_come_twice_and_differ_are_refused_and_do_not_land(offset: int, num_bytes: int) -> None:
    update = stage(CHUNKS)
    content = bytearray(bytes_of(TENSORS["b"])[offset : offset + num_bytes])
    content[-1] ^= 1
    with pytest.raises(ManifestMismatch, match=rf"b: bytes {offset} to {offset + num_bytes} came twice and differ"):
        update.write(SPECS["b"], offset, memoryview(content))
    assert_verified(update)


SPEC_A = SPECS["a"]


@pytest.mark.parametrize(
    ("spec", "offset", "num_bytes", "words"),
    [
        (SPEC_A, -4, 4, "a: bytes -4 to 0 are outside its 140"),
        (SPEC_A, 138, 4, "a: bytes 138 to 142 are outside its 140"),
        (SPEC_A, 1 << 70, 4, "are outside its 140"),
        (replace(SPEC_A, dtype="int64"), 0, 4, "a has dtype int64; use one of float32, bfloat16, float16"),
        (replace(SPEC_A, shape=(7, 5)), 0, 4, r"no 'a' of shape \[7, 5\]"),
        (replace(SPEC_A, shape=(-5, -7)), 0, 4, "negative"),
        (replace(SPEC_A, name="z"), 0, 4, "no 'z'"),
    ],
    ids=["before", "after", "far after", "dtype", "shape", "negative shape", "name"],
)
def test_a_chunk_that_cannot_land_is_refused_at_once(spec: TensorSpec, offset: int, num_bytes: int, words: str) -> None:
    update = StagedUpdate("update", check)
    with pytest.raises(ManifestMismatch, match=words):
        update.write(spec, offset, memoryview(bytes(num_bytes)))
    for chunk in CHUNKS:
        update.write(chunk.spec, chunk.offset, memoryview(chunk.data))
    assert_verified(update)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"shape": (35,)}])
def test_a_tensor_keeps_the_spec_it_began_with(change: dict[str, object]) -> None:
    update = StagedUpdate("update", lambda spec: None)
    update.write(SPEC_A, 0, memoryview(bytes(4)))
    other = TensorSpec(**{"name": "a", "dtype": SPEC_A.dtype, "shape": SPEC_A.shape, **change})  # type: ignore[arg-type]
    with pytest.raises(ManifestMismatch, match=r"a came as .* after float32 \[5, 7\]"):
        update.write(other, 4, memoryview(bytes(4)))


def test_memory_that_is_not_to_be_had_is_a_named_error() -> None:
    update = StagedUpdate("update", lambda spec: None)
    for size in (1 << 58, 1 << 90):
        with pytest.raises(ManifestMismatch, match=r"q \[\d+\] needs \d+ bytes of host memory"):
            update.write(TensorSpec("q", "float32", (size,)), 0, memoryview(bytes(4)))


def test_the_right_dtype_under_the_wrong_manifest_is_refused() -> None:
    """The same bytes under another dtype have another digest."""
    update = StagedUpdate("update", lambda spec: None)
    tensor = torch.ones(8, dtype=torch.bfloat16)
    update.write(TensorSpec("x", "float16", (8,)), 0, bytes_of(tensor))
    sent = tensor_digest(spec_of("x", tensor), bytes_of(tensor))
    with pytest.raises(DigestMismatch, match="x: the bytes"):
        update.verify(WeightManifest({"x": sent}, 16))


def test_the_manifest_and_what_landed_have_the_same_names() -> None:
    short = WeightManifest({name: value for name, value in MANIFEST.digests.items() if name != "c"}, 0)
    with pytest.raises(ManifestMismatch, match="1 tensors landed that the manifest does not list: c"):
        stage(CHUNKS).verify(short)
    long = WeightManifest({**MANIFEST.digests, "e": 1}, 0)
    with pytest.raises(ManifestMismatch, match="1 of 5 tensors never landed: e"):
        stage(CHUNKS).verify(long)
    with pytest.raises(ManifestMismatch, match="never landed"):
        StagedUpdate("update", check).verify(MANIFEST)


def test_long_lists_of_names_are_shortened() -> None:
    names = [f"model.layers.{i:02}.weight" for i in range(15)]
    with pytest.raises(WeightsError) as caught:
        StagedUpdate("update", check).verify(WeightManifest(dict.fromkeys(names, 0), 0))
    assert "and 12 more" in caught.value.message
    assert len(caught.value.message) < 200


def test_an_error_leaves_the_senders_memory_free_to_close() -> None:
    """A view kept alive by the traceback would turn the refusal into a BufferError."""
    update = stage(CHUNKS)
    refused = pytest.raises(ManifestMismatch, match="came twice")
    with refused, Segment.create(4096) as segment, segment.buffer[:8] as data:
        update.write(SPEC_A, 0, data)


# ---------------------------------------------------------------- tensors


def transposed() -> Tensor:
    return torch.arange(12, dtype=torch.float32).reshape(3, 4).T


@pytest.mark.parametrize(
    "make",
    [
        transposed,
        lambda: torch.arange(20, dtype=torch.float32)[::3],
        lambda: torch.randn(3, 0, 2),
        lambda: torch.tensor(2.5, dtype=torch.bfloat16),
        lambda: torch.tensor([float("nan"), float("inf"), -0.0]).half(),
        lambda: torch.nn.Parameter(torch.ones(4)),
    ],
    ids=["transposed", "strided", "empty", "scalar", "special values", "parameter"],
)
def test_bytes_are_dense_and_come_back_as_the_tensor(make: Callable[[], Tensor]) -> None:
    tensor = make()
    spec, data = spec_of("x", tensor), bytes_of(tensor)
    assert data.nbytes == spec.num_bytes
    assert data.format == "B"
    again = tensor_from(spec, bytearray(data))
    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    assert bytes(bytes_of(again)) == bytes(data)


def test_bytes_of_a_dense_tensor_are_no_copy() -> None:
    tensor = torch.zeros(4)
    data = bytes_of(tensor)
    tensor[0] = 1.0
    assert bytes(data[:4]) == b"\x00\x00\x80\x3f", "1.0 in little-endian float32"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64])
def test_other_dtypes_are_named(dtype: torch.dtype) -> None:
    with pytest.raises(ManifestMismatch, match=f"x has dtype {str(dtype).removeprefix('torch.')}"):
        spec_of("x", torch.zeros(2, dtype=dtype))
