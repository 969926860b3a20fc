"""Models that keep documents of a row apart, and one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput.model.stored import open_model
from lilliput.training.packing import leaks


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "qwen3_moe", "gpt2", "neox"])
def test_documents_of_a_row_do_not_see_each_other(tiny: Callable[[str], Path], name: str) -> None:
    model = open_model(tiny(name))
    model.load(model.skeleton.shapes)
    skeleton = model.skeleton
    assert not leaks(skeleton)
    plain = skeleton.read
    skeleton.read = lambda ids, positions=None: plain(ids)  # type: ignore[method-assign]
    assert leaks(skeleton)
