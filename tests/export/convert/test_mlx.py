"""MLX's affine groups: the same weights, unpacked as MLX unpacks them, and by MLX itself where it is installed."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from lilliput import api
from lilliput.errors import PlanError
from lilliput.export.convert.mlx import CONVERTER, rope_entries
from lilliput.source import open_source

Made = Callable[..., Path]
ASYM = "bits: 4, group_size: 32, symmetric: false"
MIXED = (
    "bits: 8, group_size: 64}, where: {include: ['*down_proj']",
    "bits: 3, group_size: 32, symmetric: false}, where: {include: ['*_proj'], exclude: ['*down_proj']",
    "bits: 6, group_size: 32}, where: {include: [embed]",
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def values(held: Mapping[str, Tensor], base: str, group: int, bits: int) -> Tensor:
    """[out, in], float32."""
    words, scales, biases = (held[f"{base}.{x}"] for x in ("weight", "scales", "biases"))
    stream = torch.from_numpy(
        np.unpackbits(words.contiguous().view(torch.uint8).numpy(), axis=1, bitorder="little")
    ).long()
    codes = (stream.view(len(words), -1, bits) << torch.arange(bits)).sum(-1)
    scale, bias = (x.float().repeat_interleave(group, 1) for x in (scales, biases))
    return scale * codes + bias


def config(folder: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert plain["quantization"] == plain["quantization_config"]
    entry: dict[str, Any] = plain["quantization"]
    return entry


def same(ours: Path, theirs: Path) -> int:
    """Compares every tensor. Returns how many were packed."""
    source, held, entry = open_source(str(ours)), load_file(theirs / "model.safetensors"), config(theirs)
    packed = 0
    for name in source.stored:
        base = name.removesuffix(".weight")
        if f"{base}.scales" in held:
            packed += 1
            own = entry.get(base, entry)
            assert torch.equal(source.read(name).float(), values(held, base, own["group_size"], own["bits"])), name
        else:
            assert torch.equal(source.read(name), held[name]), name
    assert len(held) == len(source.stored) + 2 * packed
    return packed


@pytest.mark.parametrize(("name", "target", "group", "bits"), [
    ("llama", "bits: 4, group_size: 32", 32, 4),
    ("qwen2", ASYM, 32, 4),
    ("qwen2", "bits: 5, group_size: 64", 64, 5),
    ("qwen2", "bits: 2, group_size: channel", 64, 2),
])  # fmt: skip
def test_values_are_those_of_the_folder(
    made: Made, tmp_path: Path, name: str, target: str, group: int, bits: int
) -> None:
    folder = made(name, target)
    done = api.convert(folder, tmp_path / "out", to="mlx")
    assert same(folder, done.out) == (28 if name == "llama" else 14)
    entry = config(done.out)
    assert (entry["group_size"], entry["bits"], entry["mode"]) == (group, bits, "affine")
    with safe_open(done.out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
        scales = file.get_tensor("model.layers.0.mlp.up_proj.scales").dtype
    assert scales == (torch.float32 if "false" in target else torch.float16)
    if "false" in target:
        assert "14 linears have zero points whose products with the scales take float32" in done.notes[0]


def test_grids_side_by_side_and_tables(made: Made, tmp_path: Path) -> None:
    folder = made("llama", *MIXED)
    done = api.convert(folder, tmp_path / "out", to="mlx")
    assert same(folder, done.out) == 29
    entry = config(done.out)
    assert (entry["group_size"], entry["bits"]) == (32, 3)
    assert entry["model.layers.3.mlp.down_proj"] == {"group_size": 64, "bits": 8}
    assert entry["model.embed_tokens"] == {"group_size": 32, "bits": 6}
    assert len(entry) == 3 + 5


def test_codes_of_7_bits_take_8(made: Made, tmp_path: Path) -> None:
    folder = made("qwen2", "bits: 7, group_size: 32")
    done = api.convert(folder, tmp_path / "out", to="mlx")
    assert same(folder, done.out) == 14
    assert "14 linears have 7 bits and take 8: the layout has no 7" in done.notes


@pytest.mark.parametrize(("target", "says"), [
    ("bits: 4, group_size: 16", r"_proj' has groups of 16 inputs, and mlx has groups of 32, 64, 128. Nearest: one of"),
    ("bits: 4, group_size: 32, scale_dtype: float32", r"has float32 scales.*Nearest: scale_dtype float16"),
    ("format: affine, bits: 4, group_size: 32", r"is affine4 g32, and mlx holds integers with whole zero"),
])  # fmt: skip
def test_what_has_no_room_is_named_with_what_has(made: Made, tmp_path: Path, target: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        api.convert(made("qwen2", target), tmp_path / "out", to="mlx")
    assert not list(tmp_path.iterdir())


def test_models_that_mlx_lm_computes_otherwise_are_refused() -> None:
    assert "models of type 'gpt_neox' are not written so; these are: llama" in str(
        CONVERTER.refuse([], GPTNeoXConfig())
    )
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    reason = CONVERTER.refuse([], LlamaConfig(rope_parameters=rope, max_position_embeddings=64))
    assert "rotary embedding is of type 'yarn'" in str(reason)


def test_rotary_embeddings_are_told_as_mlx_lm_asks(made: Made, tmp_path: Path) -> None:
    done = api.convert(made("qwen2", ASYM), tmp_path / "out", to="mlx")
    plain = json.loads((done.out / "config.json").read_text())
    assert plain["rope_theta"] == plain["rope_parameters"]["rope_theta"] == 10000.0
    assert rope_entries(LlamaConfig(rope_parameters=LLAMA3)) == {"rope_theta": 5e5, "rope_scaling": LLAMA3}


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
@pytest.mark.parametrize(("name", "steps"), [
    ("llama", MIXED), ("qwen2", (ASYM,)), ("qwen2", ("bits: 5, group_size: 64",)),
])  # fmt: skip
def test_mlx_computes_the_same(made: Made, tmp_path: Path, name: str, steps: tuple[str, ...]) -> None:
    import mlx.core as mx  # type: ignore[import-not-found, unused-ignore]
    from mlx_lm import load  # type: ignore[import-not-found, unused-ignore]

    folder = made(name, *steps)
    model, _ = load(str(api.convert(folder, tmp_path / "out", to="mlx").out))
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(np.array(model(mx.array(ids.numpy())).astype(mx.float32)))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    half = 1e-2 if steps == MIXED else 1e-4  # a coded embedding comes out in the type of its scales
    assert float((ours - theirs).abs().max()) < half * float(ours.abs().max())
