"""transformers opens native folders after the import, exactly, and stops without it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lilliput.errors import SourceError
from lilliput.export.native import Native
from lilliput.parts.linear import parse_config, read_linear
from lilliput.runtime.linear import CompressedLinear


@pytest.mark.parametrize(
    "arguments",
    [
        ("plain", "llama", 4, False, 48),
        ("plain", "llama", 2, True, 0),
        ("plain", "llama", 3, False, -1),
        ("plain", "llama", 8, False, 32, "bfloat16", "float16"),
        ("mixed bits", "llama", 5, False, 32),
        ("biases, tied head", "qwen2", 4, False, 48),
        ("conv1d", "gpt2", 4, False, 48),
        ("experts", "qwen3_moe", 4, False, 48),
        ("dense experts", "qwen3_moe", 6, False, 32),
        ("mixed experts", "qwen3_moe", 3, False, 32),
    ],
)
def test_logits_are_those_of_our_own_decode(capabilities: ModuleType, arguments: tuple[object, ...]) -> None:
    case = capabilities.Case(*arguments)
    found = capabilities.measure(case, Native())
    # batched experts multiply in another order than separate ones
    assert found in (("exact", "tolerance") if case.model == "qwen3_moe" else ("exact",))


def folder_of(capabilities: ModuleType, place: Path, *arguments: object) -> Path:
    _, packed, _ = capabilities.write(capabilities.Case(*arguments), Native(), place)
    return Path(packed)


def test_linears_stay_packed_and_follow_the_model(capabilities: ModuleType, tmp_path: Path) -> None:
    folder = folder_of(capabilities, tmp_path, "plain", "llama", 4, False, 48)
    model = AutoModelForCausalLM.from_pretrained(folder)
    packed = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert len(packed) == 14
    assert all(isinstance(m, nn.Linear) and not m._parameters.get("weight") for m in packed)
    held = sum(b.numel() * b.itemsize for m in packed for b in m.buffers())
    weights = sum(m.spec.out_features * m.spec.in_features for m in packed)
    assert held < 0.75 * weights  # 4 bits, and 20 of every 48 for the short groups of this narrow model
    before = model.model.layers[0].mlp.up_proj.weight
    half = model.to(torch.bfloat16).model.layers[0].mlp.up_proj.weight
    assert half.dtype == torch.bfloat16
    assert torch.equal(before.to(torch.bfloat16), half)
    assert model.generate(torch.arange(4).unsqueeze(0), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_the_reader_gives_the_dense_tensors(capabilities: ModuleType, tmp_path: Path) -> None:
    dense, packed, _ = capabilities.write(capabilities.Case("conv1d", "gpt2", 4, False, 48), Native(), tmp_path)
    tensors, expected = load_file(packed / "model.safetensors"), load_file(dense / "model.safetensors")
    specs = parse_config(json.loads((packed / "config.json").read_text())["quantization_config"])
    assert len(specs) == 8
    for stored, spec in specs.items():
        assert torch.equal(read_linear(tensors, spec), expected[f"{stored}.weight"])


def test_without_the_import_transformers_stops(
    capabilities: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(capabilities, tmp_path, "plain", "llama", 8, True, -1)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "lilliput")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lilliput")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_of_another_model_is_refused(capabilities: ModuleType, tmp_path: Path) -> None:
    folder = folder_of(capabilities, tmp_path, "plain", "llama", 4, True, 32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(SourceError, match="does not fit LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(SourceError, match="has none"):
        AutoModelForCausalLM.from_pretrained(folder)
