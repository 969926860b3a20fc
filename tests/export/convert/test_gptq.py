"""GPTQ's layout: the same weights, unpacked as its engines unpack them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.errors import PlanError
from lilliput.progress import Quiet
from lilliput.source import open_source

Tiny = Callable[[str], Path]
Made = Callable[..., Path]
Written = Callable[..., Path]
ASYM = "bits: 4, group_size: 32, symmetric: false"


def numbers(words: Tensor, bits: int) -> Tensor:
    """Rows of 32-bit words as rows of numbers, one bit after the other."""
    stream = ((words.long()[..., None] >> torch.arange(32)) & 1).reshape(len(words), -1)
    return (stream.view(len(words), -1, bits) << torch.arange(bits)).sum(-1)


def weight(held: Mapping[str, Tensor], base: str, bits: int, less: int) -> Tensor:
    """[out, in], float32, by the layout's description; `less`: what stored zero points lack."""
    words, zeros, scales, order = (held[f"{base}.{x}"] for x in ("qweight", "qzeros", "scales", "g_idx"))
    codes, zero = numbers(words.T, bits), numbers(zeros, bits) + less
    return (codes - zero[order.long()].T).float() * scales.float()[order.long()].T


def config(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return entry


def same(ours: Path, theirs: Path, bits: Callable[[str], int]) -> int:
    """Compares every tensor. Returns how many were packed."""
    source, held = open_source(str(ours)), load_file(theirs / "model.safetensors")
    less = 1 if config(theirs)["checkpoint_format"] == "gptq" else 0
    packed = 0
    for name in source.stored:
        base = name.removesuffix(".weight")
        if f"{base}.qweight" in held:
            packed += 1
            assert torch.equal(source.read(name).float(), weight(held, base, bits(base), less)), name
        else:
            assert torch.equal(source.read(name), held[name]), name
    assert len(held) == len(source.stored) + 3 * packed
    return packed


def rule(entry: Mapping[str, Any], name: str) -> tuple[int, int, bool] | None:
    """Bits, group size and symmetry that engines find for a module; None: it is not quantized."""
    for pattern, own in entry.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else (own["bits"], own["group_size"], own["sym"])
    return entry["bits"], entry["group_size"], entry["sym"]


@pytest.mark.parametrize(("name", "target"), [
    ("llama", ASYM), ("qwen2", ASYM), ("qwen2", "bits: 4, group_size: 32"), ("qwen2", "bits: 3, group_size: 64"),
    ("qwen2", "bits: 2, group_size: channel, symmetric: false"), ("qwen2", "bits: 8, group_size: tensor"),
])  # fmt: skip
def test_values_are_those_of_the_folder(made: Made, tmp_path: Path, name: str, target: str) -> None:
    folder = made(name, target)
    done = api.convert(folder, tmp_path / "out", to="gptq")
    bits = int(target[6])
    assert same(folder, done.out, lambda _: bits) == (28 if name == "llama" else 14)
    entry = config(done.out)
    group = re.search(r"group_size: (\d+)", target)
    assert (entry["bits"], entry["group_size"]) == (bits, -1 if group is None else int(group[1]))
    assert (entry["sym"], entry["desc_act"], entry["lm_head"]) == ("false" not in target, False, False)
    assert "dynamic" not in entry
    assert json.loads((done.out / "config.json").read_text())["dtype"] == "float16"
    runs = "false" not in target and bits in (4, 8)
    assert [note[:11] for note in done.notes] == ([] if runs else ["vLLM (0.32)"])
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out"]


def test_our_own_reader_agrees(made: Made, tmp_path: Path) -> None:
    folder = made("qwen2", ASYM)
    for form in ("gptq", "gptq_v2"):
        done = api.convert(folder, tmp_path / form, to="gptq", checkpoint_format=form)
        assert config(done.out)["checkpoint_format"] == form
        ours, theirs = open_source(str(folder)), open_source(str(done.out))
        for name in ours.stored:
            assert torch.equal(ours.read(name).half(), theirs.read(name).half()), name


def test_a_zero_point_of_0_has_no_place_in_the_first_format(tiny: Tiny, written: Written, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.abs_()
    model.save_pretrained(tmp_path / "model")
    folder = written(tmp_path / "model", tmp_path / "folder", ASYM)
    says = r"'model.layers.1.mlp.up_proj' has zero points of 0.*--checkpoint-format gptq_v2"
    with pytest.raises(PlanError, match=says):
        api.convert(folder, tmp_path / "first", to="gptq", checkpoint_format="gptq")
    done = api.convert(folder, tmp_path / "out", to="gptq")
    assert config(done.out)["checkpoint_format"] == "gptq_v2"
    assert "written as gptq_v2" in done.notes[0]
    assert same(folder, done.out, lambda _: 4) == 14


def test_grids_side_by_side_and_dense_linears(made: Made, tmp_path: Path) -> None:
    folder = made(
        "qwen2",
        "bits: 8, group_size: 64}, where: {include: ['*down_proj']",
        "bits: 3, group_size: 32, symmetric: false}, where: {include: ['*q_proj', '*k_proj', '*v_proj', '*up_proj']",
        "bits: 4, group_size: channel}, where: {include: [lm_head]",
    )
    done = api.convert(folder, tmp_path / "out", to="gptq")
    bits = {"down_proj": 8, "lm_head": 4}
    assert same(folder, done.out, lambda base: bits.get(base.rsplit(".")[-1], 3)) == 11
    entry = config(done.out)
    assert entry["lm_head"] is True
    for block in ("model.layers.0", "model.layers.1"):
        assert rule(entry, f"{block}.mlp.down_proj") == (8, 64, True)
        for name in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.up_proj"):
            assert rule(entry, f"{block}.{name}") == (3, 32, False), name
        assert rule(entry, f"{block}.self_attn.o_proj") is None
        assert rule(entry, f"{block}.mlp.gate_proj") is None
    assert rule(entry, "lm_head") == (4, -1, True)


def test_codes_of_5_bits_take_8(made: Made, tmp_path: Path) -> None:
    folder = made("qwen2", "bits: 5, group_size: 32, symmetric: false")
    done = api.convert(folder, tmp_path / "out", to="gptq")
    assert same(folder, done.out, lambda _: 8) == 14
    assert done.notes[1:] == ("14 linears have 5 bits and take 8: the layout has no 5",)


@pytest.mark.later
def test_a_folder_of_compressed_tensors(made: Made, ordered: Path, tmp_path: Path) -> None:
    """Also one whose codes cross words, and one whose inputs share scales in another order than they lie."""
    folder = made("qwen2", "bits: 3, group_size: 32, symmetric: false", layout="compressed-tensors")
    done = api.convert(folder, tmp_path / "a", to="gptq")
    assert same(folder, done.out, lambda _: 3) == 14
    done = api.convert(ordered, tmp_path / "b", to="gptq")
    assert same(ordered, done.out, lambda _: 4) == 14
    assert config(done.out)["desc_act"] is True
    order = load_file(done.out / "model.safetensors")["model.layers.0.mlp.up_proj.g_idx"]
    assert order.tolist() != sorted(order.tolist())


def test_scales_of_bfloat16(tiny: Tiny, made: Made, written: Written, tmp_path: Path) -> None:
    """They go into float16 where that holds them, which most codes of engines want."""
    target = "bits: 4, group_size: 32, scale_dtype: bfloat16"
    folder = made("qwen2", target)
    assert same(folder, api.convert(folder, tmp_path / "a", to="gptq").out, lambda _: 4) == 14
    assert load_file(tmp_path / "a" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-6)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "model")
    folder = written(tmp_path / "model", tmp_path / "other", target)
    assert same(folder, api.convert(folder, tmp_path / "b", to="gptq").out, lambda _: 4) == 14
    assert load_file(tmp_path / "b" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"].dtype == torch.bfloat16
    with pytest.raises(PlanError, match=r"up_proj' has scales that awq does not hold: no float16"):
        api.convert(folder, tmp_path / "c", to="awq")


def test_what_is_refused(made: Made, tmp_path: Path) -> None:
    folder = made("qwen2", ASYM)
    with pytest.raises(PlanError, match=r"no checkpoint format 'gptq_v3'\. Did you mean 'gptq_v2'"):
        api.convert(folder, tmp_path / "out", to="gptq", checkpoint_format="gptq_v3")
    with pytest.raises(PlanError, match="--like says nothing to the container gptq"):
        api.convert(folder, tmp_path / "out", to="gptq", like=folder)
    assert not list(tmp_path.iterdir())


def test_compressed_and_converted_in_one_go(tiny: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 2, "tokens": 32, "eval_windows": 0, "progress": Quiet()}
    recipe = "steps:\n  - {method: rtn, target: {bits: 4, group_size: 32}}\n"
    done = api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, to="gptq", **options)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert done.folder_bytes == sum(x.stat().st_size for x in done.out.iterdir())
    assert config(done.out)["quant_method"] == "gptq"
    with pytest.raises(PlanError, match=r"cannot be written as gptq: .* is nf4 g64, and gptq holds integers"):
        api.compress(tiny("qwen2"), tmp_path / "other", recipe="nf4", to="gptq", **options)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
