"""AWQ's layout: the same weights, unpacked as its engines unpack them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lilliput import api
from lilliput.errors import PlanError
from lilliput.source import open_source

Made = Callable[..., Path]
REVERSE = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each of eight outputs


def nibbles(words: Tensor) -> Tensor:
    """[rows, out / 8] words as [rows, out] codes."""
    each = [(words.long() >> (4 * place)) & 15 for place in REVERSE]
    return torch.stack(each, -1).reshape(len(words), -1)


def weight(held: Mapping[str, Tensor], base: str) -> Tensor:
    """[out, in], float32."""
    codes, zeros, scales = nibbles(held[f"{base}.qweight"]), nibbles(held[f"{base}.qzeros"]), held[f"{base}.scales"]
    size = len(codes) // len(scales)
    group = torch.arange(len(codes)) // size
    return ((codes - zeros[group]).float() * scales.float()[group]).T


def config(folder: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return plain


def same(ours: Path, theirs: Path) -> int:
    """Compares every tensor. Returns how many were packed."""
    source, held = open_source(str(ours)), load_file(theirs / "model.safetensors")
    packed = 0
    for name in source.stored:
        base = name.removesuffix(".weight")
        if f"{base}.qweight" in held:
            packed += 1
            assert torch.equal(source.read(name).float(), weight(held, base)), name
        else:
            assert torch.equal(source.read(name), held[name]), name
    assert len(held) == len(source.stored) + 2 * packed
    return packed


@pytest.mark.parametrize(("name", "target", "group"), [
    ("llama", "bits: 4, group_size: 32, symmetric: false", 32),
    ("qwen2", "bits: 4, group_size: 32", 32),
    ("qwen2", "bits: 4, group_size: channel, symmetric: false", -1),
])  # fmt: skip
def test_values_are_those_of_the_folder(made: Made, tmp_path: Path, name: str, target: str, group: int) -> None:
    folder = made(name, target)
    done = api.convert(folder, tmp_path / "out", to="awq")
    assert same(folder, done.out) == (28 if name == "llama" else 14)
    plain = config(done.out)
    assert plain["dtype"] == "float16"
    assert plain["quantization_config"] == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert done.notes == ()


def test_narrow_codes_and_dense_linears(made: Made, tmp_path: Path) -> None:
    folder = made("qwen2", "bits: 3, group_size: 64, symmetric: false}, where: {exclude: ['*down_proj']")
    done = api.convert(folder, tmp_path / "out", to="awq")
    assert same(folder, done.out) == 12
    assert done.notes == ("12 linears have fewer than 4 bits and take 4: the layout has no others",)
    dense = config(done.out)["quantization_config"]["modules_to_not_convert"]
    assert dense == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_a_folder_of_compressed_tensors(made: Made, ordered: Path, tmp_path: Path) -> None:
    folder = made("qwen2", "bits: 4, group_size: 32, symmetric: false", layout="compressed-tensors")
    assert same(folder, api.convert(folder, tmp_path / "out", to="awq").out) == 14
    with pytest.raises(PlanError, match=r"mlp.up_proj' has groups .* no place for their order. Nearest: gptq"):
        api.convert(ordered, tmp_path / "other", to="awq")


@pytest.mark.parametrize(("steps", "says"), [
    (["bits: 8, group_size: 32"], "has 8 bits, and awq has 4 at most. Nearest: gptq"),
    (["bits: 4, group_size: 32}, where: {include: ['*up_proj']",
      "bits: 4, group_size: 64}, where: {exclude: ['*up_proj']"],
     r"_proj' is int4 g(64|32) sym and '.*_proj' int4 g(32|64) sym, and all linears have one size"),
    (["bits: 4, group_size: 32", "bits: 4, group_size: 32}, where: {include: [lm_head]"],
     "'lm_head' is the head, which awq has no codes for. Nearest: exclude 'lm_head'"),
])  # fmt: skip
def test_what_has_no_room_is_named_with_what_has(made: Made, tmp_path: Path, steps: list[str], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        api.convert(made("qwen2", *steps), tmp_path / "out", to="awq")
    assert not list(tmp_path.iterdir())
