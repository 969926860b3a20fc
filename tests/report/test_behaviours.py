"""The page's section on work that is left out, and the share that rules predict, against counts written out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import lilliput.report
from lilliput import api
from lilliput.progress import Quiet
from lilliput.report.behaviours import behaviours
from lilliput.report.page import render

WORK = {"executed": 600, "dense": 1000, "share": 0.6, "predicted": 0.59, "prompt": 8, "kv_lengths": [8, 8, 4, 4]}


def test_the_share_of_work_stands_beside_its_prediction(sample: dict[str, Any]) -> None:
    assert behaviours(sample) is None
    sample["work"] = WORK
    schema = json.loads((Path(lilliput.report.__file__).parent / "schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(sample, schema)
    text = render(sample)
    part = re.search(r'<section id="behaviours".*?</section>', text, re.DOTALL)
    assert part is not None
    words = re.sub(r"<[^>]*>", " ", part[0])
    for said in ("predicted", "executed", "60", "59", "block 3: 4 of 8", "What is left out while it runs"):
        assert said in words + part[0], said
    sample["work"] = {"executed": 600, "dense": 1000, "share": 0.6}
    jsonschema.validate(sample, schema)
    again = behaviours(sample)
    assert again is not None
    assert len(again.blocks) == 1


@pytest.mark.parametrize("keep", [0.5, 0.37])
def test_rules_predict_what_an_evaluation_counts(tiny: Callable[[str], Path], tmp_path: Path, keep: float) -> None:
    """Tokens leave after block 1; gates that keep whole groups."""
    recipe = (
        f"steps:\n  - {{method: dynamic-pruning, options: {{channels: 8, keep: {keep}}}}}\n"
        f"  - {{method: token-pruning, options: {{layers: [1], keep: {keep}}}}}\n"
    )
    run: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32", "progress": Quiet()}
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, eval_windows=2, **run).evaluation
    assert done is not None
    work = done.work
    assert work is not None
    assert work.prompt is not None
    tokens = 2 * work.prompt  # of a window, whose first half is the prompt
    mlp, rest, groups = 3 * 64 * 128, 64 * (64 * 2 + 32 * 2), 16
    used = math.ceil(groups * keep - 1e-9)
    each = rest + mlp * used // groups + groups * 64
    left = math.ceil(work.prompt * keep - 1e-9) + tokens - work.prompt
    expected = (2 * tokens + 2 * left) * each / (4 * tokens * (mlp + rest))
    assert work.predicted == pytest.approx(expected, rel=1e-12)
    assert work.share == pytest.approx(expected, rel=1e-12)
