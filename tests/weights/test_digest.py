"""The tensor digest: what it must see, what it must not depend on, and what it costs in memory."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rolloutd.weights import digest as module
from rolloutd.weights.digest import Digest, tensor_digest
from rolloutd.weights.manifest import TensorSpec, WeightManifest

BLOCK_BYTES = 4 << 11
SPEC = TensorSpec("model.norm.weight", "bfloat16", (8,))


def random_bytes(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def digest_in_chunks(data: bytes, cuts: list[int]) -> int:
    digest = Digest(SPEC)
    for start, stop in pairwise([0, *sorted(cuts), len(data)]):
        digest.update(memoryview(data)[start:stop])
    return digest.value()


@pytest.fixture(params=["c", "numpy"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: with the sum in C, where there is a compiler, and in numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(module, "_native", lambda: None)
    elif module._native() is None:
        pytest.skip("this machine has no C compiler")


def test_c_and_numpy_agree_and_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for native in (module._native, lambda: None):
        monkeypatch.setattr(module, "_native", native)
        content, digest = random_bytes(300 * BLOCK_BYTES + 7), Digest(SPEC)
        copy, at = bytearray(len(content)), 0
        for size in (5, 3, 4096, 1, 2, 7 * BLOCK_BYTES + 1, 150 * BLOCK_BYTES, len(content)):
            part = memoryview(content)[at : at + size]
            digest.update(part, memoryview(copy)[at : at + len(part)])
            at += len(part)
        assert copy == content
        found.append((digest.value(), tensor_digest(SPEC, content)))
    assert len({value for pair in found for value in pair}) == 1


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunks_of_any_size_give_the_same_digest(data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=200))
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=12))
    assert digest_in_chunks(content, cuts) == tensor_digest(SPEC, content)


def test_chunks_across_block_boundaries_give_the_same_digest() -> None:
    content, rng = random_bytes(3 * BLOCK_BYTES + 3), random.Random(1)
    expected = tensor_digest(SPEC, content)
    near_boundaries = [block * BLOCK_BYTES + offset for block in (1, 2) for offset in (-3, -1, 0, 1, 2)]
    assert digest_in_chunks(content, near_boundaries) == expected
    for _ in range(10):
        assert digest_in_chunks(content, [rng.randrange(len(content)) for _ in range(20)]) == expected


def test_it_is_the_sum_of_words_times_odd_factors() -> None:
    """An independent evaluation: the factors are read off one-word tensors, then summed in Python integers."""
    num_words = 50
    blank = tensor_digest(SPEC, bytes(4 * num_words))
    factors = []
    for i in range(num_words):
        one = bytearray(4 * num_words)
        one[4 * i] = 1
        factors.append((tensor_digest(SPEC, one) - blank) % 2**64)
    assert all(factor % 2 == 1 for factor in factors)
    assert len(set(factors)) == num_words
    content = random_bytes(4 * num_words)
    words = np.frombuffer(content, "<u4").tolist()
    weighted = sum(word * factor for word, factor in zip(words, factors, strict=True))
    assert tensor_digest(SPEC, content) == (blank + weighted) % 2**64


def test_every_single_bit_is_seen() -> None:
    content = random_bytes(131)
    digests = {tensor_digest(SPEC, content)}
    for bit in range(8 * len(content)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        digests.add(tensor_digest(SPEC, altered))
    assert len(digests) == 1 + 8 * len(content)


@given(position=st.integers(0, 2 * BLOCK_BYTES + 6), bit=st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_a_bit_in_any_block_is_seen(position: int, bit: int) -> None:
    content = bytes(2 * BLOCK_BYTES + 7)
    altered = bytearray(content)
    altered[position] ^= 1 << bit
    assert tensor_digest(SPEC, altered) != tensor_digest(SPEC, content)


def test_swapped_words_are_seen() -> None:
    words, rng = np.frombuffer(random_bytes(4000), "<u4"), random.Random(2)
    expected = tensor_digest(SPEC, words.tobytes())
    for _ in range(2000):
        i, j = rng.sample(range(len(words)), 2)
        swapped = words.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert tensor_digest(SPEC, swapped.tobytes()) != expected


def test_swapped_blocks_and_other_orders_are_seen() -> None:
    first, second = random_bytes(BLOCK_BYTES, 1), random_bytes(BLOCK_BYTES, 2)
    words = np.frombuffer(first[:4096], "<u4")
    orders = [first + second, second + first, words.tobytes(), words[::-1].tobytes(), np.roll(words, 1).tobytes()]
    assert len({tensor_digest(SPEC, content) for content in orders}) == len(orders)


def test_bfloat16_neighbours_swapped_within_a_word_are_seen() -> None:
    content = random_bytes(16)
    swapped = content[2:4] + content[0:2] + content[4:]
    assert tensor_digest(SPEC, swapped) != tensor_digest(SPEC, content)


@pytest.mark.parametrize("length", range(9))
def test_length_counts_even_where_all_bytes_are_zero(length: int) -> None:
    others = {tensor_digest(SPEC, bytes(n)) for n in range(9) if n != length}
    assert tensor_digest(SPEC, bytes(length)) not in others


@pytest.mark.parametrize(
    "other",
    [replace(SPEC, name="model.norm.weigh"), replace(SPEC, dtype="float16"), replace(SPEC, shape=(2, 4))],
    ids=["name", "dtype", "shape"],
)
def test_name_dtype_and_shape_count(other: TensorSpec) -> None:
    content = random_bytes(16)
    assert tensor_digest(other, content) != tensor_digest(SPEC, content)


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_an_empty_array_has_a_digest(shape: tuple[int, ...]) -> None:
    assert tensor_digest(SPEC, np.empty(shape, np.float32).data) == tensor_digest(SPEC, b"")


def test_views_of_other_formats_are_read_as_bytes() -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert tensor_digest(SPEC, values.data) == tensor_digest(SPEC, values.tobytes())


def test_temporaries_do_not_grow_with_the_tensor() -> None:
    content = np.ones(32 << 20, dtype=np.uint8).data
    tensor_digest(SPEC, bytes(4))  # builds the table of factors
    tracemalloc.start()
    try:
        tensor_digest(SPEC, content)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20


def test_the_manifests_digest_is_a_function_of_the_pairs() -> None:
    digests = {"a": 1, "b": 2, "c": 3}
    expected = WeightManifest(digests, 12).digest
    assert len(expected) == 16
    assert int(expected, 16) >= 0
    assert WeightManifest(dict(reversed(digests.items())), 12).digest == expected
    for other in ({"a": 1, "b": 2}, {"a": 2, "b": 1, "c": 3}, {"a": 1, "b": 2, "d": 3}, {"a": 1, "b": 2, "c": 4}):
        assert WeightManifest(other, 12).digest != expected


@pytest.mark.parametrize(
    ("dtype", "shape", "num_bytes"),
    [("float32", (3, 5), 60), ("bfloat16", (3, 5), 30), ("float16", (), 2), ("float32", (1 << 40, 1 << 40), 1 << 82)],
)
def test_spec_counts_bytes_in_unbounded_integers(dtype: str, shape: tuple[int, ...], num_bytes: int) -> None:
    assert TensorSpec("x", dtype, shape).num_bytes == num_bytes
