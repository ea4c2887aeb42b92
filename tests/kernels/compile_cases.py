"""Run by test_kernels.py in a process of its own: triton is loaded before the kernels, which else do without it.

The kernels compile for GPUs that are not here: the interpreter runs Python, and takes what the compiler refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rolloutd.kernels.add_rms_norm import add_rms_norm_kernel
from rolloutd.kernels.begin_step import begin_step_kernel
from rolloutd.kernels.draw import draw_config, draw_from_tiles_kernel, tile_statistics_kernel
from rolloutd.kernels.end_step import end_step_kernel
from rolloutd.kernels.head_and_draw import MAX_ROWS, head_config, head_tiles_kernel
from rolloutd.kernels.launch import next_power_of_two
from rolloutd.kernels.store_kv import store_kv_kernel
from rolloutd.kernels.truncate import find_cuts_kernel, truncate_config


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, int], capability: int) -> str:
    """Return the PTX of a kernel; arguments not named in `types` are 64-bit integers."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    return str(compiled.asm["ptx"])


@pytest.fixture(autouse=True)
def _own_compiler_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # else a second run would compile nothing


@pytest.mark.parametrize("capability", [80, 90])
def test_store_kv_compiles(capability: int) -> None:
    pointers = {"k_ptr": "*fp32", "v_ptr": "*fp32", "k_cache_ptr": "*bf16", "v_cache_ptr": "*bf16", "slot_ptr": "*i64"}
    constants = {"B": 16, "K": 3, "D": 80, "BLOCK_K": 4, "BLOCK_D": 128}
    ptx = compile_kernel(store_kv_kernel, pointers, constants, capability)
    assert f".target sm_{capability}" in ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_add_rms_norm_compiles_without_fused_multiply_add(capability: int, dtype: str) -> None:
    pointers = dict.fromkeys(("residual_ptr", "weight_ptr", "out_ptr", "sum_ptr"), f"*{dtype}")
    types = dict.fromkeys(("x_ptr", "tail_ptr", "b_ptr"), "*bf16") | dict.fromkeys(("eps", "scaling"), "fp32")
    constants = {"E": 1536, "RANK": 16, "BLOCK_E": 2048}
    ptx = compile_kernel(add_rms_norm_kernel, types | pointers, constants, capability)
    assert f".target sm_{capability}" in ptx
    assert "fma.rn.f32" not in ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("cells_apart", ["i32", "i64", 1])
def test_the_ends_of_a_decode_step_compile(capability: int, cells_apart: str | int) -> None:
    columns = {"TOKEN": 0, "POSITION": 1, "LIMIT": 2, "DONE": 3, "SEED": 4, "INDEX": 5, "TOP_K": 6, "FIRST_STOP": 7}
    columns |= {"TEMPERATURE": 0, "TOP_P": 1, "MIN_P": 2, "NUM_STOPS": 8, "BLOCK_R": 128, "B": 16}
    floats = ("floats_ptr", "temperature_ptr", "top_p_ptr", "min_p_ptr", "logprob_ptr", "sampling_logprob_ptr")
    int32 = ("tables_ptr", "len_ptr", "cursor_ptr", "record_ptr")
    types = dict.fromkeys((*floats, "record_float_ptr"), "*fp32") | dict.fromkeys(int32, "*i32")
    for kernel in (begin_step_kernel, end_step_kernel):
        constants = {name: value for name, value in columns.items() if name in kernel.arg_names}
        pointers = {name: types.get(name, "*i64") for name in kernel.arg_names if name.endswith("_ptr")}
        if kernel is end_step_kernel and isinstance(cells_apart, int):
            constants["cells_apart"] = cells_apart  # as Triton specialises an argument that is 1
        elif kernel is end_step_kernel:
            pointers["cells_apart"] = str(cells_apart)
        ptx = compile_kernel(kernel, pointers, constants, capability)
        assert f".target sm_{capability}" in ptx


VOCAB = 151_936
DRAW_TYPES = {
    **dict.fromkeys(("temperature_ptr", "max_ptr", "sum_ptr", "kept_ptr", "top_p_ptr", "min_p_ptr"), "*fp32"),
    **dict.fromkeys(("logprob_ptr", "sampling_logprob_ptr"), "*fp32"),
    **dict.fromkeys(("seed_ptr", "index_ptr", "position_ptr", "token_ptr", "top_k_ptr"), "*i64"),
    **dict.fromkeys(("cut_ptr", "last_ptr"), "*i32"),
}


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_the_draw_compiles(capability: int, dtype: str) -> None:
    config, types = draw_config(VOCAB), {**DRAW_TYPES, "logits_ptr": f"*{dtype}"}
    constants = {"V": VOCAB, "N": config.num_tiles, "BLOCK_V": config.block_v, "TRUNCATED": True}
    assert "ex2" in compile_kernel(tile_statistics_kernel, types, constants, capability)
    constants["BLOCK_N"] = next_power_of_two(config.num_tiles)
    assert ".f64" in compile_kernel(draw_from_tiles_kernel, types, constants, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_search_for_cuts_compiles(capability: int) -> None:
    constants = {"HAS_TOP_K": 1, "HAS_TOP_P": 1, "HAS_MIN_P": 1, "V": VOCAB, "BLOCK": truncate_config(VOCAB)}
    ptx = compile_kernel(find_cuts_kernel, {**DRAW_TYPES, "logits_ptr": "*bf16"}, constants, capability)
    assert f".target sm_{capability}" in ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_the_head_compiles_to_tensor_core_products(capability: int) -> None:
    config = head_config(torch.bfloat16)
    types = dict.fromkeys(("hidden_ptr", "head_ptr", "logits_ptr"), "*bf16") | {"divisor": "fp32", "softcap": "fp32"}
    blocks = {"BLOCK_R": MAX_ROWS, "BLOCK_V": config.block_v, "BLOCK_E": config.block_e}
    switches = {"HAS_DIVISOR": 1, "HAS_SOFTCAP": 1}
    constants = {"V": VOCAB, "E": 896, "N": -(-VOCAB // config.block_v), **blocks, **switches}
    ptx = compile_kernel(head_tiles_kernel, {**DRAW_TYPES, **types}, constants, capability)
    assert "mma" in ptx
    assert "cvt.rn.bf16" in ptx
