"""Every family that is served, in every mode: near the trainer, and no farther than the trainer is from itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from docs.conformance_page import COLUMNS, PAGE, page
from rolloutd.check import Gap
from rolloutd.models.config import SUPPORTED_ARCHITECTURES
from tests.conformance.table import FALLBACKS, MODES, Row, failures, model_of, rows_of
from tests.tiny_models import KINDS

GOOD = Gap(mean=1e-7, p99=1e-6, max=1e-6, kl=0.0, dropped=0)
ROW = Row("llama", "LlamaForCausalLM", "fp32", *(GOOD,) * 6)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models of this size gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [*KINDS, *FALLBACKS])
def test_a_family_keeps_its_limits(kind: str, tmp_path: Path) -> None:
    rows = list(rows_of((kind,), model_of(tmp_path)))
    assert [row.mode for row in rows] == list(MODES)
    assert (architecture_of(kind) in SUPPORTED_ARCHITECTURES) == (kind not in FALLBACKS)
    found = [line for row in rows for line in failures(row)]
    assert not found, "\n".join(found)
    in_page = [row for row in table_of(PAGE.read_text(encoding="utf-8")) if row[0] == architecture_of(kind)]
    assert [row[1] for row in in_page] == [row.mode for row in rows], "run python -m docs.conformance_page"


def architecture_of(kind: str) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def table_of(text: str) -> list[list[str]]:
    """Return the cells of the page's table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_is_what_the_generator_writes() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert {len(row) for row in table_of(written)} == {len(COLUMNS)}
    made = page([ROW], date="2026-01-01", machine="a CPU")
    assert table_of(made) == [["LlamaForCausalLM", "fp32", *["1.0e-07 / 1.0e-06"] * 6]]
    tail = "\n## Limits\n"
    assert made.partition(tail)[2] == written.partition(tail)[2], "run python -m docs.conformance_page"
    for word in ("torch ", "transformers ", "rolloutd ", "Measured 20"):
        assert word in written


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (replace(ROW, aligned=replace(GOOD, mean=3e-6)), "aligned"),
        (replace(ROW, mode="autocast", scored=replace(GOOD, mean=3e-3)), "scored"),
        (replace(ROW, mode="bf16", aligned=replace(GOOD, mean=6e-3)), "aligned"),
        (replace(ROW, odd=replace(GOOD, mean=1.6e-7)), "odd"),
        (replace(ROW, padded=replace(GOOD, mean=1.6e-7)), "padded"),
        (replace(ROW, padded=replace(GOOD, max=3e-5)), "a token differs"),
        (replace(ROW, padded=replace(GOOD, mean=float("nan"))), "padded"),
        (replace(ROW, scored=replace(GOOD, max=float("nan"))), "a token differs"),
    ],
)
def test_a_row_beyond_a_limit_is_named(row: Row, word: str) -> None:
    assert failures(ROW) == []
    assert any(word in line for line in failures(row))
