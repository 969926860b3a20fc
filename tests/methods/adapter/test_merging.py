"""Merged folders compute what the adapter did, codes stay, and what codes cannot take up is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lilliput import api
from lilliput.errors import PlanError


@pytest.mark.parametrize(("method", "name"), [("lora", "llama"), ("adalora", "llama"), ("lora", "gpt2")])
def test_plain_linears_take_a_product_up(
    lab: Callable[..., Any], shared: Any, tiny: Callable[[str], Path], tmp_path: Path, method: str, name: str
) -> None:
    made = lab(method, tiny(name), target={"rank": 4}, lr=1e-3)
    made.steps(0, 1, 2, 3)
    api.merge(tiny(name), tmp_path / "out", adapter=made.save(tmp_path / "adapter"))
    with torch.no_grad():
        merged, own = shared.opened(tmp_path / "out")(shared.ids()).logits, made.logits()
    assert float((merged - own).abs().max() / own.abs().max()) < 1e-5
    assert float((shared.opened(tiny(name))(shared.ids()).logits - own).detach().abs().max()) > 1e-4


def test_a_product_is_cut_while_it_is_merged(
    lab: Callable[..., Any], shared: Any, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    made = lab("dylora", tiny("llama"), target={"rank": 8}, lr=1e-3)
    made.steps(0, 1)
    api.merge(tiny("llama"), tmp_path / "out", adapter=made.save(tmp_path / "adapter"), rank=2)
    made.student.adapter.width = 2
    with torch.no_grad():
        merged, own = shared.opened(tmp_path / "out")(shared.ids()).logits, made.logits()
    assert float((merged - own).abs().max() / own.abs().max()) < 1e-5


def test_zeros_take_up_means_of_groups_and_codes_stay(
    lab: Callable[..., Any], shared: Any, coded: Callable[..., Path], tmp_path: Path
) -> None:
    folder = coded("llama", shared.AFFINE)
    made = lab("qa-lora", folder, target={"rank": 2})
    made.steps(0, 1, 2, 3)
    api.merge(folder, tmp_path / "out", adapter=made.save(tmp_path / "adapter"))
    with torch.no_grad():
        merged, own = shared.opened(tmp_path / "out")(shared.ids()).logits, made.logits()
    assert float((merged - own).abs().max() / own.abs().max()) < 1e-5
    old, new = (load_file(x / "model.safetensors") for x in (folder, tmp_path / "out"))
    assert {n.rsplit("_", 1)[-1] for n in old if not torch.equal(old[n], new[n])} == {"zero"}
    assert api.verify(tmp_path / "out").whole


def test_what_cannot_be_merged_says_what_it_would_cost(
    lab: Callable[..., Any], coded: Callable[..., Path], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    made = lab("lora", target={"rank": 2})
    made.steps(0)
    with pytest.raises(PlanError, match=r"quantizing anew would lose \d+% of what the adapter adds"):
        api.merge(coded(), tmp_path / "out", adapter=made.save(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()
    prompt = lab("prompt-tuning", length=2).save(tmp_path / "prompt")
    with pytest.raises(PlanError, match="no change of weights"):
        api.merge(coded(), tmp_path / "out", adapter=prompt)
    with pytest.raises(PlanError, match="adapter of another model"):
        api.merge(tiny("gpt2"), tmp_path / "out", adapter=tmp_path / "adapter")


def test_only_nested_products_are_cut(lab: Callable[..., Any], tiny: Callable[[str], Path], tmp_path: Path) -> None:
    made = lab("lora", tiny("llama"), target={"rank": 4})
    made.steps(0, 1)
    with pytest.raises(PlanError, match=r"not said to be one: leave --rank out"):
        api.merge(tiny("llama"), tmp_path / "out", adapter=made.save(tmp_path / "adapter"), rank=2)
