"""The terminal's tables: the verdict first, names whole, colour only where it is wanted."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
from rich.console import Console, RenderableType

from lilliput.report import terminal
from lilliput.report.table import text


def coloured(content: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True, color_system="standard").print(content)
    return out.getvalue()


def test_the_verdict_comes_first_and_every_part_follows(sample: dict[str, Any]) -> None:
    said = text(terminal.evaluation(sample), 120)
    assert "\x1b" not in said
    lines = said.splitlines()
    assert lines[0].startswith("▼ LOSS  Perplexity rises by 5.2 %")
    for word in ("1.052 [1.046, 1.058]", "--max-kl", "passed", "no detectable loss", "1.31× [1.28, 1.34]"):
        assert word in said, word
    assert re.search(r"decode +21.3 ms +16.2 ms +16.7 ms +17.8 ms", said)
    assert re.search(r"model FLOPs utilisation \(MFU\) +32 % +31 %", said)
    assert "model.layers.5.mlp.down_proj" in said
    assert max(len(line) for line in lines) <= 120


def test_without_parts_there_is_still_a_verdict() -> None:
    assert text(terminal.evaluation({"schema": 1})).startswith("? UNSURE  Not compared with an original")


def test_names_are_not_taken_for_markup_and_not_folded(sample: dict[str, Any]) -> None:
    sample["tasks"][0]["name"] = "[bold]choice[/bold]"
    assert "[bold]choice[/bold]" in text(terminal.evaluation(sample), 80)


def test_colour_repeats_the_level(sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;33m▼ LOSS\x1b[0m" in coloured(terminal.evaluation(sample))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;33m" not in coloured(terminal.evaluation(sample))


def test_models_side_by_side(sample: dict[str, Any]) -> None:
    other = copy.deepcopy(sample) | {"model": "out/sample-lm-w8"}
    other["size"]["bytes"] = 1
    lines = text(terminal.comparison([sample, other]), 120).splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("  sample-lm")}
    assert rows.keys() == {"sample-lm-w4", "sample-lm-w8"}
    assert "★\N{NO-BREAK SPACE}size, ★\N{NO-BREAK SPACE}speed" in rows["sample-lm-w8"]
    assert "★\N{NO-BREAK SPACE}size" not in rows["sample-lm-w4"]
