"""Names are those of the model, whatever was wrapped around it when it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lilliput.errors import SourceError
from lilliput.source.shards import Shards
from lilliput.source.wrapped import Unwrapped

HEAD, DOWN = "lm_head.weight", "model.layers.0.mlp.down_proj.weight"


def reader(folder: Path, *names: str) -> Shards:
    save_file({x: torch.full((2, 3), float(i)) for i, x in enumerate(names)}, folder / "model.safetensors")
    return Shards(folder)


@pytest.mark.parametrize(
    ("head", "down"),
    [
        (f"_orig_mod.{HEAD}", f"_orig_mod.{DOWN}"),
        (f"module.{HEAD}", f"module.{DOWN}"),
        (f"module._orig_mod.{HEAD}", f"module._orig_mod.{DOWN}"),
        (HEAD, "model._orig_mod.layers.0._checkpoint_wrapped_module.mlp.down_proj.weight"),
        (
            f"_fsdp_wrapped_module.{HEAD}",
            "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.down_proj.weight",
        ),
        (HEAD, "model.layers.0.mlp.module.down_proj.weight"),
    ],
)
def test_segments_of_wrappers_are_left_out(tmp_path: Path, head: str, down: str) -> None:
    found = Unwrapped(reader(tmp_path, head, down))
    assert set(found.entries) == {HEAD, DOWN}
    assert torch.equal(found.read(DOWN, (1, 2)), torch.ones(1, 3))
    assert torch.equal(next(values for _, values in found.chunks(HEAD)), torch.zeros(2, 3))
    assert found.renamed[DOWN] == down


def test_nothing_is_renamed_without_need(tmp_path: Path) -> None:
    found = Unwrapped(reader(tmp_path, HEAD, "model.submodule.weight"))
    assert set(found.entries) == {HEAD, "model.submodule.weight"}
    assert not found.renamed


@pytest.mark.parametrize(
    ("prefix", "head", "down"),
    [("net.model.", f"net.{HEAD}", f"net.{DOWN}"), ("backbone.", HEAD, DOWN.replace("model.", "backbone.", 1))],
)
def test_a_prefix_becomes_the_base_models(tmp_path: Path, prefix: str, head: str, down: str) -> None:
    assert set(Unwrapped(reader(tmp_path, head, down), prefix, "model.").entries) == {HEAD, DOWN}


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"holds both .*{HEAD}.*one tensor"):
        Unwrapped(reader(tmp_path, HEAD, f"module.{HEAD}"))
