"""Prefixes and prompts: positions, padding, what has no room for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.errors import LilliputError


@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning"])
def test_rows_of_several_lengths_see_the_same_prefix(
    lab: Callable[..., Any], shared: Any, tmp_path: Path, method: str
) -> None:
    made = lab(method, length=3)
    stock = shared.loaded(made.folder, made.save(tmp_path / "adapter"))
    text = shared.ids()
    short = text.clone()
    short[1, 7:] = 0
    mask = torch.ones_like(text)
    mask[1, 7:] = 0
    with torch.no_grad():
        both = stock(short, attention_mask=mask).logits[:, -12:]
    torch.testing.assert_close(both[0], made.logits(text)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(both[1, :7], made.logits(text[1:, :7])[0], rtol=0, atol=1e-4)


def test_a_prefix_is_longer_context_and_not_text(lab: Callable[..., Any]) -> None:
    made = lab("prefix-tuning", length=3, direct=True)
    assert made.logits().shape[1] == 12
    assert made.student.adapter.inner.get_prompt(2).get_seq_length() == 3


def test_documents_in_one_row_are_refused(lab: Callable[..., Any], shared: Any) -> None:
    made = lab("prompt-tuning", length=3)
    with pytest.raises(LilliputError, match="several documents"):
        made.student.adapter.read(made.student.skeleton, shared.ids(), torch.zeros(2, 12, dtype=torch.int64), None)
