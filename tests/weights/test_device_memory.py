"""Memory of a GPU that two processes share: what is offered, mapped, refused by name, and given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from rolloutd.errors import DigestMismatch, ManifestMismatch
from rolloutd.weights import device_memory
from rolloutd.weights.device_memory import DeviceHandle, DeviceSegment
from rolloutd.weights.manifest import TensorSpec, WeightManifest
from rolloutd.weights.staging import StagedUpdate
from rolloutd.weights.tensors import bytes_of, digest_of, flat_bytes, spec_of, tensor_from
from tests.cpu_as_gpu import cpu_as_gpu


def test_what_one_side_writes_the_other_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)
    with DeviceSegment.create(4096, torch.device("cpu")) as made:
        with DeviceSegment.attach(made.handle, "cpu", peers=False) as mapped:
            made.buffer.copy_(torch.arange(4096).to(torch.uint8))
            made.settle()
            assert mapped.buffer.tolist() == made.buffer.tolist()
        assert made.buffer[5] == 5, "the other side's leaving takes nothing away"


def test_the_maker_takes_its_offer_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)
    offer, taken_back = device_memory._shared, []
    monkeypatch.setattr(device_memory, "_shared", lambda buffer: (offer(buffer)[0], lambda: taken_back.append(1)))
    segment = DeviceSegment.create(64, torch.device("cpu"))
    for _ in range(2):
        segment.close()
    assert taken_back == [1]


@pytest.mark.parametrize(
    "change", [{"num_bytes": 0}, {"num_bytes": -1}, {"offset": -1}, {"allocation": b""}, {"allocation": bytes(1 << 13)}]
)
def test_a_handle_that_cannot_be_one_is_refused(change: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)
    handle = replace(DeviceHandle("cpu", 64, b"x", 0), **change)  # type: ignore[arg-type]
    with pytest.raises(ManifestMismatch, match="no rolloutd client"):
        DeviceSegment.attach(handle, "cpu", peers=False)


def test_memory_of_another_gpu_and_of_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = DeviceHandle("GPU-1", 64, b"x", 0)
    with pytest.raises(ManifestMismatch, match="lie on GPU GPU-1, and the daemon computes on cpu"):
        DeviceSegment.attach(handle, "cpu", peers=True)
    cpu_as_gpu(monkeypatch)
    with pytest.raises(ManifestMismatch, match="lie on GPU GPU-1"):
        DeviceSegment.attach(handle, "cpu", peers=False)


def test_memory_that_cannot_be_mapped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_as_gpu(monkeypatch)
    gone = DeviceHandle("cpu", 64, f"/proc/{os.getpid()}/fd/99999".encode(), 0)
    with pytest.raises(ManifestMismatch, match=r"cannot be mapped \(.*Use transport='shared_memory'"):
        DeviceSegment.attach(gone, "cpu", peers=False)


# ------------------------------------------------------------------ what lands from there


class Rows:
    """Places for tensors of one dtype; others are cast."""

    def __init__(self) -> None:
        self.tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
        self.num_filled = 0

    def of(self, spec: TensorSpec, data: object) -> torch.Tensor | None:
        assert isinstance(data, torch.Tensor)
        return flat_bytes(self.tensors[spec.name]) if spec.dtype == "float32" else None

    def filled(self, spec: TensorSpec) -> None:
        self.num_filled += 1

    def add(self, spec: TensorSpec, data: object) -> None:
        assert isinstance(data, torch.Tensor)
        self.tensors[spec.name].copy_(tensor_from(spec, data))


def landed(name: str, tensor: torch.Tensor, cuts: list[int]) -> tuple[Rows, StagedUpdate, WeightManifest]:
    rows, spec, data = Rows(), spec_of(name, tensor), flat_bytes(tensor)
    update = StagedUpdate("u", lambda spec: None, rows)  # type: ignore[arg-type]
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        update.write(spec, start, data[start:stop])
    return rows, update, WeightManifest({name: digest_of(spec, tensor)}, spec.num_bytes)


@pytest.mark.parametrize("cuts", [[], [4], [3, 17, 40]])
def test_bytes_land_where_they_will_serve_from(cuts: list[int]) -> None:
    tensor = torch.randn(3, 4)
    rows, update, manifest = landed("a", tensor, cuts)
    assert update.verify(manifest) == {}
    assert rows.num_filled == 1
    assert torch.equal(rows.tensors["a"], tensor)


@pytest.mark.parametrize("cuts", [[], [2], [1, 7]])
def test_another_dtype_is_cast(cuts: list[int]) -> None:
    """At once if it comes whole; else it lands beside its place first."""
    tensor = torch.randn(5).bfloat16()
    rows, update, manifest = landed("b", tensor, cuts)
    for found in update.verify(manifest).values():
        rows.tensors["b"].copy_(found)
    assert torch.equal(rows.tensors["b"], tensor.float())


def test_what_comes_twice_is_equal_or_refused() -> None:
    tensor = torch.randn(3, 4)
    _, update, manifest = landed("a", tensor, [8])
    spec, data = spec_of("a", tensor), flat_bytes(tensor)
    update.write(spec, 4, data[4:12])
    with pytest.raises(ManifestMismatch, match="a: bytes 4 to 8 came twice and differ"):
        update.write(spec, 4, data[4:8] + 1)
    assert update.verify(manifest) == {}


def test_bytes_from_the_host_land_beside_those_of_a_gpu() -> None:
    """A client may change its way in the middle; ours does not."""
    tensor = torch.randn(3, 4)
    rows, update, manifest = landed("a", tensor, [])
    update.write(spec_of("a", tensor), 8, bytes_of(tensor)[8:16])
    assert update.verify(manifest) == {}
    assert torch.equal(rows.tensors["a"], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_bit_is_found(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4 if dtype == torch.float32 else 1).to(dtype)
    name = "a" if dtype == torch.float32 else "b"
    honest = tensor if name == "a" else tensor.reshape(-1).repeat(2)[:5]
    flipped = honest.clone()
    flat_bytes(flipped)[3] ^= 4
    _, update, _ = landed(name, flipped, [])
    with pytest.raises(DigestMismatch, match=f"{name}: the bytes that landed"):
        update.verify(WeightManifest({name: digest_of(spec_of(name, honest), honest)}, 1))


def test_elements_that_would_lie_askew_are_copied() -> None:
    data = torch.arange(9, dtype=torch.uint8)[1:]
    assert bytes_of(tensor_from(TensorSpec("x", "float32", (2,)), data)) == bytes(range(1, 9))


# ------------------------------------------------------------------ on a GPU

CHILD = """
import json, sys, torch
from rolloutd.weights.device_memory import DeviceHandle, DeviceSegment
fields = json.loads(sys.stdin.readline())
handle = DeviceHandle(**{**fields, "allocation": bytes.fromhex(fields["allocation"])})
with DeviceSegment.attach(handle, "cuda", peers=False) as segment:
    while sys.stdin.readline().strip() == "read":
        total = segment.buffer.to(torch.int64).sum().item()
        segment.settle()
        print(total, flush=True)
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.gpu
def test_another_process_reads_a_gpus_memory_and_what_it_held_is_free_again() -> None:
    before = torch.cuda.memory_allocated()
    segment = DeviceSegment.create(64 << 20, torch.device("cuda", torch.cuda.current_device()))
    fields = asdict(segment.handle) | {"allocation": segment.handle.allocation.hex()}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(fields) + "\n")
        for value in (1, 7):
            segment.buffer.fill_(value)
            segment.settle()
            child.stdin.write("read\n")
            child.stdin.flush()
            assert int(child.stdout.readline()) == value * (64 << 20)
        child.stdin.write("leave\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == "closed"
        segment.close()
        assert torch.cuda.memory_allocated() == before, "also while the other process lives"
    finally:
        child.kill()
        child.wait(10.0)


@pytest.mark.gpu
def test_memory_that_nobody_mapped_is_free_again() -> None:
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        DeviceSegment.create(64 << 20, torch.device("cuda")).close()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_a_gpus_digest_is_that_of_the_host() -> None:
    for shape in [(1,), (4097,), (3, 1 << 20)]:
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.randn(shape).to(dtype)
            spec = spec_of("w", tensor)
            assert digest_of(spec, tensor.cuda()) == digest_of(spec, tensor)
