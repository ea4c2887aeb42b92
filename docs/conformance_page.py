"""Writes docs/conformance.md from measurements on this machine: `python -m docs.conformance_page`, from the root.

A test measures again and holds the limits; the page's digits are one machine's.
"""

from __future__ import annotations

import datetime
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rolloutd.check import Gap, versions
from tests.conformance.table import (
    ALIGNED,
    FALLBACKS,
    FP32_MAX,
    MAX_TOKENS,
    MEAN_LIMIT,
    NOISE_FACTOR,
    ODD,
    SHAPE,
    Row,
    model_of,
    rows_of,
)
from tests.tiny_models import KINDS

PAGE = Path(__file__).parent / "conformance.md"

COLUMNS = (
    ("architecture", "served by the engine, random weights"),
    ("mode", "of engine and trainer"),
    ("decode, whole blocks", "sampled log p against the trainer's unpadded forward; lengths are multiples of 16"),
    ("decode, other lengths", "the same at lengths that are not"),
    ("score", "`LLM.score`, a prefill, against the same forward, all lengths"),
    ("decode, TRL's batch", "sampled log p against the trainer's forward in rows of 8, padded as TRL pads"),
    ("trainer: batch", "the trainer against itself: rows of a batch of 8 against the same rows alone"),
    ("trainer: padding", "the trainer against itself: padded against unpadded"),
)
"""Title and meaning of each column."""

TEXT = """# Conformance

How far each family's log-probabilities are from transformers' own forward in the trainer's mode, and how far that is
from itself when only its batch changes. Each cell is mean / max of |difference of log p| per token, in nats; 0 is bit
for bit. `docs/conformance_page.py` generates the page; `tests/conformance/test_table.py` measures again and fails
beyond the limits. To measure your own model, run `rolloutd check`, see [numerics](numerics.md).

Measured {date} on {machine}, with {versions}. Models of
{num_layers} layers, hidden size {hidden}, vocabulary {vocab}, tied, with random weights of a spread that keeps
attention far from uniform; {num_samples} completions of {max_tokens} tokens. The last {num_fallbacks} architectures
run by transformers' own code; their models are smaller (2 layers, hidden size 64).

{table}

{legend}

## Limits

- fp32: no token beyond {fp32_max:.0e}, in any column of ours.
- Whole blocks and score, means: at most {bf16:.0e} in bf16, {autocast:.0e} in autocast.
- Other lengths and TRL's batch, means: at most {factor:g} times the larger of the trainer's own two.

## What the columns say

Rounding happens where the trainer rounds: `score` computes what the trainer's unpadded forward computes, and returns
its bits. Decoding returns them too where prompt and completion fill whole blocks of 16 tokens, but for a rare last bit.
At other lengths it does not, and one operation is why: the attention of a decoding row reads whole KV blocks, with
the unused places masked, while the trainer's row ends at its last token. The fp32 sum over keys is then taken in
another order, here and there an output falls to its other neighbour in bf16, and the layers above spread that to the
level of bf16's own noise. Where experts are mixed such a bit can send a token to another expert, hence the large maxima
there, in the trainer's own columns too. The trainer's order depends on the length that its row has in the end, which is
not known while a token is sampled: no sampler can follow it.

The trainer's own figure is larger, and its operation is the rotary embedding. TRL pads on the left and passes no
positions, so padding shifts them: angles, and with them every rounded query and key, change from the first layer on.
(Given true positions, padded and unpadded agree to 6e-04 here.) TRL compares with padded batches; the last of our
columns is what a training run sees, and most of it is the trainer's.
"""


def cell(gap: Gap) -> str:
    """Return `mean / max` of a gap."""
    return " / ".join(f"{value:.1e}" if value else "0" for value in (gap.mean, gap.max))


def page(rows: Iterable[Row], *, date: str, machine: str) -> str:
    """Return the text of docs/conformance.md."""
    lines = [
        "| " + " | ".join(title for title, _ in COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in rows:
        gaps = (row.aligned, row.odd, row.scored, row.padded, row.trainer_batch, row.trainer_padding)
        lines.append("| " + " | ".join([row.architecture, row.mode, *map(cell, gaps)]) + " |")
    return TEXT.format(
        date=date,
        machine=machine,
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        num_layers=SHAPE["layers"],
        hidden=SHAPE["hidden"],
        vocab=SHAPE["vocab"],
        num_samples=len(ALIGNED) + len(ODD),
        max_tokens=MAX_TOKENS,
        num_fallbacks=len(FALLBACKS),
        table="\n".join(lines),
        legend="\n".join(f"- **{title}**: {meaning}" for title, meaning in COLUMNS[2:]),
        fp32_max=FP32_MAX,
        bf16=MEAN_LIMIT["bf16"],
        autocast=MEAN_LIMIT["autocast"],
        factor=NOISE_FACTOR,
    )


def main() -> None:
    """Measure every kind and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        rows = list(rows_of((*KINDS, *FALLBACKS), model_of(Path(folder))))
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    machine = f"a CPU ({platform.machine()}, {cpu_flag()})"
    PAGE.write_text(page(rows, date=date, machine=machine), encoding="utf-8")


def cpu_flag() -> str:
    """Return the instruction set that torch's CPU kernels use here."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


if __name__ == "__main__":
    main()
