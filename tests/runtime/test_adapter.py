"""What an adapter's folder says, and inputs that a linear rounds for itself alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lilliput.errors import PlanError, SourceError
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.runtime import adapter, inputs


def written(folder: Path, **config: object) -> Path:
    """A product of rank 2 beside the linear "0"."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(4, 2, generator=generator)
    names = {"base_model.model.0.lora_A.weight": down, "base_model.model.0.lora_B.weight": up}
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, "r": 2} | config))
    return folder


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_product_sees_inputs_as_they_are(tmp_path: Path, first: bool) -> None:
    place = written(tmp_path / "a")
    model = nn.Sequential(nn.Linear(8, 4))
    rounding = inputs.Rounding(InputGrid(UniformInput(4)))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    if first:
        adapter.attach(model, place, "cpu")
    inputs.attach(model[0], rounding)
    if not first:
        adapter.attach(model, place, "cpu")
    (change,) = adapter.changes(place).values()
    assert change.scale == 2.0
    with torch.no_grad():
        wanted = nn.functional.linear(rounding.of(x), model[0].weight, model[0].bias) + x @ change.product().T
        torch.testing.assert_close(model(x), wanted)


def test_what_is_no_change_of_linears_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds no adapter"):
        adapter.changes(tmp_path)
    assert adapter.beside_linears(written(tmp_path / "a"))
    for odd, said in (({"use_dora": True}, "its use_dora is True"), ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING")):
        place = written(tmp_path / "a", **odd)
        assert not adapter.beside_linears(place)
        with pytest.raises(PlanError, match=said):
            adapter.attach(nn.Sequential(nn.Linear(8, 4)), place, "cpu")
    with pytest.raises(SourceError, match="adapter of another model: 0 is not there"):
        adapter.attach(nn.ModuleDict({"other": nn.Linear(8, 4)}), written(tmp_path / "b"), "cpu")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(PlanError, match="cannot be read"):
        adapter.changes(tmp_path / "b")
