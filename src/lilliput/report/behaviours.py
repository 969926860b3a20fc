"""The section on what a model leaves out while it runs: the share of work that its rules promise, and that it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lilliput.report import cells, figures
from lilliput.report.blocks import Block, Section
from lilliput.report.cells import Cell, Table, table, words
from lilliput.report.sections import label
from lilliput.report.svg import Picture

Data = Mapping[str, Any]


def behaviours(evidence: Data) -> Section | None:
    part = evidence.get("work")
    if not part:
        return None
    blocks: list[Block] = [work_table(part)]
    lengths = part.get("kv_lengths") or ()
    if lengths:
        blocks.append(_kept(lengths, int(part["prompt"])))
    lead = "Token pruning and dynamic pruning: work that need not be done. It does not say how long the rest takes."
    return Section("behaviours", "What is left out while it runs", blocks, lead)


def work_table(part: Data) -> Table:
    """Multiply-adds of the blocks' linears: of the whole model, as the rules say, and as counted."""
    predicted, dense = part.get("predicted"), part["dense"]
    return table(
        ("", "whole", "predicted", "executed"),
        [
            (
                words("multiply-adds of the blocks' linears"),
                cells.count(dense),
                cells.count(None if predicted is None else predicted * dense),
                cells.count(part["executed"]),
            ),
            (words("share of them"), Cell("100 %", 1.0), cells.share(predicted), cells.share(part["share"])),
        ],
        note="Counted over the evaluation's tokens, predictors included; attention's own products are not counted.",
    )


def _kept(lengths: Any, prompt: int) -> Picture:
    values = [(n, float(x), f"block {n}: {x} of {prompt}") for n, x in enumerate(lengths)]
    rows = [(cells.number(n), cells.number(int(x)), cells.share(x / prompt if prompt else 1.0)) for n, x, _ in values]
    data = table(("block", "keys and values kept", "share of the prompt"), rows)
    caption = f"Keys and values that each block keeps of a prompt of {prompt} tokens."
    drawings = figures.columns("kept", values, "tokens of the prompt", False)
    return Picture(*drawings, label(caption, data), caption, data)
