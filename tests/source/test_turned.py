"""Linears between run-time rotations are read as what the library computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput.algebra.hadamard import transform
from lilliput.errors import SourceError
from lilliput.source import Source, open_source, turned

WIDTH, ROWS = 64, 32
LINEAR = "model.layers.0.down_proj"


def at(location: str, inverse: bool = False, targets: str = "re:.*down_proj$", **more: Any) -> dict[str, Any]:
    return {"targets": [targets], "location": location, "inverse": inverse, **more}


def group(*apply: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "hadamard", "apply": list(apply), **more}


def folder(path: Path, tensors: dict[str, Tensor], groups: dict[str, Any]) -> Source:
    plain = {"model.embed_tokens.weight": torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(5))}
    save_file({k: v.contiguous() for k, v in {**plain, **tensors}.items()}, path / "model.safetensors")
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
        "transform_config": {"config_groups": groups},
    }
    config = {"model_type": "llama", "dtype": "float32", "hidden_size": WIDTH, "num_attention_heads": 2}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return open_source(str(path))


def engine(weight: Tensor, bias: Tensor, groups: dict[str, Any]) -> tuple[nn.Module, nn.Linear]:
    """A model of one linear as the library runs it: `weight` taken as it lies in a file, only hooks added."""
    online = {
        name: {**x, "apply": [a for a in x["apply"] if not a["location"].startswith("weight")]}
        for name, x in groups.items()
    }
    model, linear = nn.Module(), nn.Linear(WIDTH, ROWS)
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.ModuleDict({"down_proj": linear})])
    linear.load_state_dict({"weight": weight, "bias": bias})
    apply_transform_config(model, TransformConfig.model_validate({"config_groups": online}))
    return model, linear


GROUPS: dict[str, dict[str, Any]] = {
    "inputs": {"R4": group(at("input"), at("weight_input", True))},
    "inputs, inverse": {"R4": group(at("input", True), at("weight_input"))},
    "blocks of inputs": {"R4": group(at("input"), at("weight_input", True), head_dim=16)},
    "outputs": {"U": group(at("output", True), at("weight_output"))},
    "both": {"V": group(at("input"), at("weight_input", True)), "U": group(at("weight_output"), at("output", True))},
    "two on one side": {"A": group(at("input"), head_dim=16), "B": group(at("input", True)), "C": group(at("output"))},
    "by class": {"R4": group(at("input", targets="Linear", ignore=["re:.*lm_head$"]))},
    "in the files alone": {"R1": group(at("weight_input"), at("weight_output"))},
    "another linear": {"R4": group(at("input", targets="re:.*o_proj$"))},
    "queries and keys": {"R3": group(at("q_attn"), at("k_cache"), head_dim=16)},
}


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("kind", GROUPS)
def test_as_the_library_computes(tmp_path: Path, kind: str, quantized: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randint(-99, 99, (ROWS, WIDTH), generator=g), torch.randn(ROWS, generator=g)
    scale = torch.rand(ROWS, 1, generator=g) + 0.5
    held = weight * scale
    tensors = {f"{LINEAR}.bias": bias, f"{LINEAR}.weight": held}
    if quantized:
        tensors |= {f"{LINEAR}.weight": weight.to(torch.int8), f"{LINEAR}.weight_scale": scale}
    source = folder(tmp_path, tensors, GROUPS[kind])
    x = torch.randn(7, WIDTH, generator=g)
    groups = {name: x for name, x in GROUPS[kind].items() if name != "R3"}  # hooks of an attention
    with torch.no_grad():
        want = engine(held, bias, groups)[0].get_submodule(LINEAR)(x)
    got = source.read(f"{LINEAR}.weight")
    torch.testing.assert_close(x @ got.T + source.read(f"{LINEAR}.bias"), want, rtol=1e-4, atol=1e-2)
    assert torch.equal(source.read(f"{LINEAR}.weight", (3, 9)), got[3:9])
    idle = kind in ("in the files alone", "another linear", "queries and keys")
    assert torch.equal(got, held) is idle
    assert any("rotations" in note for note in source.notes) is not idle
    embedding = source.read("model.embed_tokens.weight")
    assert torch.equal(embedding, torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(5)))


def test_no_matrix_and_no_copy_of_the_whole_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worked on at a time is small, whatever is turned, and adds up to the same."""
    weight = torch.randn(ROWS, WIDTH)
    groups = {"V": group(at("input")), "U": group(at("output"), head_dim=8)}
    source = folder(tmp_path, {f"{LINEAR}.weight": weight}, groups)
    want, sizes = source.read(f"{LINEAR}.weight"), []

    def spied(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return transform(x)

    monkeypatch.setattr(turned, "transform", spied)
    monkeypatch.setattr(turned, "CHUNK", 8 * WIDTH)
    assert torch.equal(source.read(f"{LINEAR}.weight"), want)
    assert sizes == [8 * WIDTH] * 2 * (ROWS // 8)
    sizes.clear()
    assert torch.equal(source.read(f"{LINEAR}.weight", (9, 15)), want[9:15])
    assert sizes == [8 * WIDTH] * 2


def test_matrices_in_the_files_are_of_no_use_any_more(tmp_path: Path) -> None:
    tensors = {
        f"{LINEAR}.weight": torch.randn(ROWS, WIDTH),
        f"{LINEAR}.R4_input.weight": torch.eye(WIDTH),
        "model.layers.0.self_attn.R3_q_attn.weight": torch.eye(16),
    }
    groups = {"R4": group(at("input")), "R3": group(at("q_attn"), at("k_cache"), head_dim=16)}
    assert set(folder(tmp_path, tensors, groups).stored) == {f"{LINEAR}.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"R4": group(at("input")) | {"type": "random-hadamard"}}, r"'R4' .*of type 'random-hadamard'"),
        ({"R4": group(at("input"), randomize=True)}, r"'R4' .*randomized"),
        ({"R3": group(at("q_attn"), head_dim=16)}, r"'R3' .*turns q_attn alone"),
        ({"R3": group(at("q_attn"), at("k_cache", True), head_dim=16)}, r"'R3' .*turns q_attn alone"),
        ({"R4": group(at("input"), head_dim=24)}, r"'R4' .*no Hadamard matrix of 24 for model\.layers\.0\.down_proj"),
        ({"R4": group(at("input"), head_dim=128)}, r"'R4' .*no Hadamard matrix of 128"),
        ({"R4": {"type": "hadamard", "apply": 3}}, r"cannot read its transform_config"),
    ],
)
def test_what_cannot_be_undone_is_refused_by_name(tmp_path: Path, groups: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        folder(tmp_path, {f"{LINEAR}.weight": torch.randn(ROWS, WIDTH)}, groups)
