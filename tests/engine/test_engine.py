"""The engine's eye: folders that transformers computes alike pass, and each way of being silently wrong is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import compressed_tensors.compressors
import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput.export import engine, get
from lilliput.export.engine import CLOSE, EXACT, look
from lilliput.machine import memory
from lilliput.model.stored import open_model

CASES = [
    ("compressed-tensors", ("plain", "llama", 4, True)),
    pytest.param("compressed-tensors", ("plain", "llama", 3, False, 32, "float32", "float32"), marks=pytest.mark.later),
    ("compressed-tensors", ("biases, tied head", "qwen2", 4, True)),
    pytest.param(
        "compressed-tensors", ("experts", "qwen3_moe", 4, True, 32, "float32", "float32"), marks=pytest.mark.later
    ),
    ("lilliput", ("ragged", "llama", 4, False, 48)),
    ("lilliput", ("conv1d", "gpt2", 4, True)),
    ("lilliput", ("experts", "qwen3_moe", 4, False)),
]


def written(capabilities: ModuleType, place: Path, layout: str, *case: Any) -> Path:
    return Path(capabilities.write(capabilities.Case(*case), get(layout), place)[1])


def by_blocks(folder: Path) -> int:
    """Memory in which blocks can be compared and the whole model cannot be."""
    return memory.BASE + engine.least(open_model(str(folder)).anatomy().blocks)


@pytest.fixture
def folder(capabilities: ModuleType, tmp_path: Path) -> Path:
    return written(capabilities, tmp_path, "compressed-tensors", "plain", "llama", 4, True)


@pytest.mark.parametrize(("layout", "case"), CASES)
def test_what_the_engine_computes_alike_has_no_problems(
    capabilities: ModuleType, tmp_path: Path, layout: str, case: tuple[Any, ...]
) -> None:
    place = written(capabilities, tmp_path, layout, *case)
    seen = look(place)
    assert (seen.problems, seen.notes, seen.blocks) == ((), (), 2)
    assert seen.error is not None
    assert seen.logits is not None
    assert seen.error <= EXACT
    assert seen.logits <= EXACT
    little = look(place, memory=by_blocks(place))
    assert (little.problems, little.blocks, little.logits) == ((), 2, None)
    assert little.error == seen.error


@pytest.mark.later
def test_decoding_in_half_precision_is_a_note(capabilities: ModuleType, tmp_path: Path) -> None:
    seen = look(written(capabilities, tmp_path, "compressed-tensors", "plain", "llama", 4, False))
    assert seen.problems == ()
    assert seen.error is not None
    assert EXACT < seen.error < CLOSE["block"]
    assert "half precision" in seen.notes[0]


@pytest.mark.later
def test_one_scheme_taken_for_two_is_found(capabilities: ModuleType, tmp_path: Path) -> None:
    """transformers decodes zero points by one setting for all linears: without an error, and wrong."""
    place = written(capabilities, tmp_path, "compressed-tensors", "mixed bits", "llama", 4, False)
    for room in (None, by_blocks(place)):
        assert look(place, memory=room).problems, room


def test_an_engine_that_decodes_otherwise_is_found_block_by_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = compressed_tensors.compressors.decompress_module

    def doubled(module: torch.nn.Module) -> None:
        decode(module)
        if hasattr(module, "quantization_scheme"):
            module.weight.mul_(2)

    monkeypatch.setattr(compressed_tensors.compressors, "decompress_module", doubled)
    (problem,) = look(folder, memory=by_blocks(folder)).problems
    assert "something else for block" in problem
    assert "than the files say" in problem


def test_a_tensor_under_another_name_is_found(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    tensors[f"_orig_mod.{name}"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seen = engine._empty(*_config_and_state(folder), ())[1]
    assert f"no tensor for {name}" in seen[0]


def _config_and_state(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig

    from lilliput.source.shards import Shards

    return AutoConfig.from_pretrained(folder), engine._state(Shards(folder))


@pytest.mark.later
def test_a_model_that_the_engine_cannot_build_is_found(folder: Path) -> None:
    plain = json.loads((folder / "config.json").read_text())
    group = plain["quantization_config"]["config_groups"]["group_0"]
    group["weights"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(plain))
    config, state = _config_and_state(folder)
    assert engine._empty(config, state, ())[1]


def test_values_that_are_not_finite_are_found(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"].fill_(float("inf"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in look(folder).problems[0]


def test_what_was_not_compared_is_said(folder: Path) -> None:
    seen = look(folder, memory=memory.BASE)
    assert (seen.problems, seen.error, seen.logits) == ((), None, None)
    assert "only names and shapes were compared" in seen.notes[0]
