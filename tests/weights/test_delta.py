"""Deltas between two versions of a tensor: exact, no larger than the tensor, and refused where they do not add up."""

from __future__ import annotations

import numpy as np
import pytest

from rolloutd.errors import ManifestMismatch
from rolloutd.weights import delta as delta_module
from rolloutd.weights.delta import PIECE_ITEMS, Delta, DeltaBase, decode, encode, pieces
from rolloutd.weights.manifest import TensorSpec

ITEM = {"bfloat16": 2, "float32": 4}


@pytest.fixture(params=["c", "numpy"], autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a compiler."""
    if request.param == "numpy":
        monkeypatch.setattr(delta_module, "_native", lambda: None)
    else:
        assert delta_module._native() is not None


def versions(num_items: int, ratio: float, dtype: str, seed: int = 0) -> tuple[memoryview, memoryview]:
    """Return bytes of a tensor before and after a share of its elements changed."""
    rng = np.random.default_rng(seed)
    unsigned = np.dtype(f"<u{ITEM[dtype]}")
    old = rng.integers(0, np.iinfo(unsigned).max, num_items, unsigned)
    changed = rng.random(num_items) < ratio
    return memoryview(old.tobytes()), memoryview(np.where(changed, ~old, old).astype(unsigned).tobytes())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_items", [1, 7, 65_535, 65_536, 65_537, 200_001])
@pytest.mark.parametrize("ratio", [0.0, 1e-4, 0.01, 0.05, 0.3, 0.8, 1.0])
def test_a_delta_gives_the_new_bytes(dtype: str, num_items: int, ratio: float) -> None:
    old, new = versions(num_items, ratio, dtype)
    found = encode(new, old, dtype)
    if found is None:
        assert ratio >= 0.8 or num_items <= 7
        return
    encoding, data = found
    assert len(data) < new.nbytes
    spec = TensorSpec("w", dtype, (num_items,))
    assert decode(spec, Delta(encoding, new.nbytes), memoryview(data), old) == new


@pytest.mark.parametrize(
    ("ratio", "encoding", "largest"), [(0.01, "positions", 0.021), (0.05, "positions", 0.105), (0.3, "bitmap", 0.37)]
)
def test_bytes_of_a_bf16_delta(ratio: float, encoding: str, largest: float) -> None:
    old, new = versions(1 << 20, ratio, "bfloat16")
    found = encode(new, old, "bfloat16")
    assert found is not None
    assert found[0] == encoding
    assert len(found[1]) <= largest * new.nbytes


def test_elements_are_compared_as_bits() -> None:
    old = memoryview(np.array([0.0, np.nan, 1.0], "<f4").tobytes() * 100)
    new = memoryview(np.array([-0.0, np.nan, 1.0], "<f4").tobytes() * 100)
    found = encode(new, old, "float32")
    assert found is not None
    assert decode(TensorSpec("w", "float32", (300,)), Delta(found[0], 1200), memoryview(found[1]), old) == new


@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_a_delta_that_does_not_add_up_is_refused(ratio: float) -> None:
    old, new = versions(1000, ratio, "bfloat16")
    found = encode(new, old, "bfloat16")
    assert found is not None
    spec, delta = TensorSpec("w", "bfloat16", (1000,)), Delta(found[0], 2000)
    for data in (b"", found[1][:3], found[1][:-1], found[1] + b"\0\0", b"\xff" * len(found[1])):
        with pytest.raises(ManifestMismatch, match="w: a delta that does not add up"):
            decode(spec, delta, memoryview(data), old)


def test_places_that_fall_are_refused() -> None:
    old, new = versions(1000, 0.05, "bfloat16")
    found = encode(new, old, "bfloat16")
    assert found is not None
    assert found[0] == "positions"
    data = bytearray(found[1])
    data[4:6], data[6:8] = data[6:8], data[4:6]
    with pytest.raises(ManifestMismatch, match="do not rise"):
        decode(TensorSpec("w", "bfloat16", (1000,)), Delta("positions", 2000), memoryview(data), old)


def test_both_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ITEM:
        for ratio in (0.01, 0.3):
            old, new = versions(70_003, ratio, dtype)
            compiled = encode(new, old, dtype)
            with monkeypatch.context() as patch:
                patch.setattr(delta_module, "_native", lambda: None)
                assert encode(new, old, dtype) == compiled


def test_a_delta_may_lie_anywhere() -> None:
    """Pieces follow each other in shared memory at odd addresses."""
    old, new = versions(1000, 0.05, "float32")
    found = encode(new, old, "float32")
    assert found is not None
    shifted = memoryview(b"x" + found[1])[1:]
    assert decode(TensorSpec("w", "float32", (1000,)), Delta(found[0], 4000), shifted, old) == new


def test_pieces_cover_a_tensor() -> None:
    spec = TensorSpec("w", "bfloat16", (2, PIECE_ITEMS + 3))
    cut = list(pieces(spec))
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == spec.num_bytes
    assert len(cut) == 3


def test_a_base_knows_a_tensor_by_name_dtype_and_shape() -> None:
    base = DeltaBase()
    memory, is_known = base.tensor(TensorSpec("w", "float32", (4,)))
    assert memory.nbytes == 16
    assert not is_known
    assert base.tensor(TensorSpec("w", "float32", (4,))) == (memory, True)
    assert not base.tensor(TensorSpec("w", "float32", (2, 2)))[1], "another shape"
    assert not base.tensor(TensorSpec("w", "float32", (4,)))[1], "it was replaced meanwhile"
