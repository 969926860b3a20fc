"""Quantized checkpoints come out as the weights that their codes stand for, against slow versions of the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.formats.bits import pack_words
from lilliput.source import Source, open_source

ROWS, WIDTH = 12, 80
G = torch.Generator().manual_seed(0)


def folder(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], dtype: str = "bfloat16") -> Source:
    plain = {"model.embed_tokens.weight": torch.zeros(8, WIDTH)}
    save_file({k: v.contiguous() for k, v in {**tensors, **plain}.items()}, path / "model.safetensors")
    config = {"model_type": "llama", "dtype": dtype, "hidden_size": WIDTH, "num_attention_heads": 2}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    source = open_source(str(path))
    assert not hasattr(source.config, "quantization_config")
    return source


def scheme(targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": {"type": "int", "symmetric": True, **weights}}


def compressed(*groups: dict[str, Any], form: str = "pack-quantized") -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {f"group_{i}": x for i, x in enumerate(groups)},
    }


def codes(bits: int, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, width), generator=G, dtype=torch.int8)


def packed(base: str, code: Tensor, scale: Tensor, bits: int, zero: Tensor | None = None) -> dict[str, Tensor]:
    out = {
        f"{base}.weight_packed": pack_words(code, bits),
        f"{base}.weight_scale": scale,
        f"{base}.weight_shape": torch.tensor(code.shape),
    }
    if zero is not None:
        out[f"{base}.weight_zero_point"] = pack_words(zero.T, bits).T.contiguous()
    return out


def slow(code: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    out = torch.empty(code.shape)
    for i in range(code.shape[0]):
        for j in range(code.shape[1]):
            z = 0.0 if zero is None else float(zero[i, j // group])
            out[i, j] = (float(code[i, j]) - z) * scale[i, j // group].float()
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "dtype"), [(16, "float32"), (32, "float16"), (WIDTH, "bfloat16")])
def test_packed_integers_are_exact(
    tmp_path: Path, bits: int, symmetric: bool, group: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lilliput.source.packed.CHUNK", 5 * WIDTH)  # several pieces, the last one shorter
    code, scale = codes(bits), torch.rand(ROWS, -(-WIDTH // group), generator=G).half()
    zero = None if symmetric else codes(bits, ROWS, scale.shape[1])
    how = {"strategy": "channel"} if group == WIDTH else {"strategy": "group", "group_size": group}
    config = compressed(scheme(["Linear"], num_bits=bits, **{**how, "symmetric": symmetric}))
    tensors = packed("model.layers.0.x", code, scale, bits, zero)
    source = folder(tmp_path, tensors, config | {"dequantize": True}, dtype)
    name = "model.layers.0.x.weight"
    want = slow(code, scale, zero, group).to(getattr(torch, dtype))
    got = source.read(name)
    assert got.dtype == want.dtype == source.stored[name].dtype
    assert torch.equal(got, want)
    assert torch.equal(source.read(name, (3, 9)), want[3:9])
    assert source.stored[name].nbytes == sum(x.nbytes for x in tensors.values())
    assert set(source.stored) == {name, "model.embed_tokens.weight"}
    assert source.file_of(name).name == "model.safetensors"
    source.scan()


def test_mixed_schemes_by_name_and_pattern(tmp_path: Path) -> None:
    config = compressed(
        scheme(["Linear"], num_bits=4, strategy="group", group_size=16),
        scheme(["re:.*\\.b$"], num_bits=8, strategy="channel"),
        scheme(["m.c"], num_bits=3, strategy="group", group_size=8),
    )
    tensors, want = {}, {}
    for base, bits, group in (("m.a", 4, 16), ("m.b", 8, WIDTH), ("m.c", 3, 8)):
        code, scale = codes(bits), torch.rand(ROWS, WIDTH // group, generator=G)
        tensors |= packed(base, code, scale, bits)
        want[f"{base}.weight"] = slow(code, scale, None, group)
    source = folder(tmp_path, tensors, config, "float32")
    for name, value in want.items():
        assert torch.equal(source.read(name), value), name


def test_activation_order(tmp_path: Path) -> None:
    code, scale = codes(4), torch.rand(ROWS, 5, generator=G)
    order = torch.randperm(WIDTH, generator=G).int() // 16
    tensors = packed("m.a", code, scale, 4) | {"m.a.weight_g_idx": order}
    source = folder(
        tmp_path, tensors, compressed(scheme(["Linear"], num_bits=4, strategy="group", group_size=16)), "float32"
    )
    assert torch.equal(source.read("m.a.weight"), code.float() * scale[:, order.long()])


@pytest.mark.parametrize("shape", [(1,), (ROWS, 1)])
def test_integers_stored_one_by_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    code, scale, zero = codes(8), torch.rand(shape, generator=G), torch.full(shape, 3, dtype=torch.int8)
    how = {"strategy": "tensor" if shape == (1,) else "channel", "symmetric": False}
    tensors = {
        "m.a.weight": code,
        "m.a.weight_scale": scale,
        "m.a.weight_zero_point": zero,
        "m.a.input_scale": torch.ones(1),
    }
    source = folder(
        tmp_path, tensors, compressed(scheme(["Linear"], num_bits=8, **how), form="int-quantized"), "float32"
    )
    assert torch.equal(source.read("m.a.weight"), (code.float() - 3) * scale.reshape(-1, 1))
    assert set(source.stored) == {"m.a.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_four_bit_floats_by_the_library(tmp_path: Path, form: str) -> None:
    weights = {"num_bits": 4, "type": "float", "group_size": 16 if form[0] == "n" else 32}
    weights |= {"strategy": "tensor_group" if form[0] == "n" else "group", "symmetric": True}
    if form[0] == "m":
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    plain = {"targets": ["Linear"], "weights": weights, "format": form}
    code = torch.randint(0, 256, (ROWS, 32), generator=G, dtype=torch.uint8)
    if form[0] == "n":
        scale = torch.rand(ROWS, 4, generator=G).to(torch.float8_e4m3fn)
        state = {"weight_packed": code, "weight_scale": scale, "weight_global_scale": torch.tensor([7.0])}
    else:
        state = {"weight_packed": code, "weight_scale": torch.randint(120, 130, (ROWS, 2), generator=G).to(torch.uint8)}
    want = BaseCompressor.get_value_from_registry(form).decompress(
        dict(state), QuantizationScheme.model_validate(plain)
    )
    source = folder(tmp_path, {f"m.a.{k}": v for k, v in state.items()}, compressed(plain, form=form), "float32")
    got = source.read("m.a.weight")
    assert got.shape == (ROWS, 64) == source.stored["m.a.weight"].shape
    assert torch.equal(got, want["weight"].float())
    assert got.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"m.a.weight_scale": None}, "weight_scale is missing"),
        ({"m.a.weight_shape": None}, "weight_shape is missing"),
        ({"m.a.weight_shape": torch.tensor([ROWS, WIDTH - 8])}, "does not hold"),
        ({"m.a.weight_scale": torch.ones(ROWS, 3)}, "does not fit"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], word: str) -> None:
    tensors: dict[str, Tensor | None] = {**packed("m.a", codes(4), torch.rand(ROWS, 5), 4), **change}
    kept = {k: v for k, v in tensors.items() if v is not None}
    with pytest.raises(SourceError, match=word):
        folder(tmp_path, kept, compressed(scheme(["Linear"], num_bits=4, strategy="group", group_size=16)))


def test_no_scheme_and_unreadable_formats(tmp_path: Path) -> None:
    tensors = packed("m.a", codes(4), torch.rand(ROWS, 5), 4)
    with pytest.raises(SourceError, match=r"no group .* names m\.a"):
        folder(tmp_path, tensors, compressed(scheme(["m.b"], num_bits=4, strategy="group", group_size=16)))
    config = compressed(scheme(["Linear"], num_bits=4, strategy="group", group_size=16), form="marlin-24")
    with pytest.raises(SourceError, match="'marlin-24'"):
        folder(tmp_path, tensors, config)
    sparse = {"sparsity_config": {"format": "sparse-24-bitmask"}}
    with pytest.raises(SourceError, match="sparse-24-bitmask"):
        folder(tmp_path, tensors, compressed(scheme(["Linear"], num_bits=4, strategy="channel")) | sparse)


@pytest.mark.parametrize("kind", ["block", "tensor", "row", "experts"])
def test_fp8(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=G).to(torch.float8_e4m3fn)
    config: dict[str, Any] = {"quant_method": "fp8"}
    if kind == "block":  # the last blocks of rows and of columns are cut
        config["weight_block_size"] = [8, 32]
        scale = torch.rand(2, 3, generator=G)
        want = torch.stack(
            [torch.stack([weight[i, j].float() * scale[i // 8, j // 32] for j in range(WIDTH)]) for i in range(ROWS)]
        )
        tensors = {"m.a.weight": weight, "m.a.weight_scale_inv": scale}
    elif kind == "experts":
        weight = torch.stack([weight, weight.view(torch.uint8).flip(0).view(torch.float8_e4m3fn)])
        config["weight_block_size"] = [8, 32]
        scale = torch.rand(2, 2, 3, generator=G)
        want = weight.float() * scale.repeat_interleave(8, 1)[:, :ROWS].repeat_interleave(32, 2)[:, :, :WIDTH]
        tensors = {"m.a.weight": weight, "m.a.weight_scale_inv": scale}
    else:
        scale = torch.tensor(0.37) if kind == "tensor" else torch.rand(ROWS, 1, generator=G)
        want = weight.float() * scale
        tensors = {"m.a.weight": weight, "m.a.weight_scale": scale, "m.a.activation_scale": torch.ones(1)}
    source = folder(tmp_path, tensors, config)
    assert torch.equal(source.read("m.a.weight"), want.bfloat16())
    assert torch.equal(source.read("m.a.weight", (1, 2)), want.bfloat16()[1:2])
    assert set(source.stored) == {"m.a.weight", "model.embed_tokens.weight"}
    source.scan()


def test_fp8_without_scales(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"m\.a\.weight_scale_inv"):
        folder(tmp_path, {"m.a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {"quant_method": "fp8"})


def test_fp8_nan_is_found(tmp_path: Path) -> None:
    weight = torch.full((4, 4), float("nan")).to(torch.float8_e4m3fn)
    source = folder(tmp_path, {"m.a.weight": weight, "m.a.weight_scale": torch.ones(1)}, {"quant_method": "fp8"})
    with pytest.raises(SourceError, match=r"m\.a\.weight"):
        source.scan()


def test_mxfp4(tmp_path: Path) -> None:
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks = torch.randint(0, 256, (3, 6, 2, 16), generator=G, dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 6, 2), generator=G).to(torch.uint8)
    want = torch.empty(3, 64, 6)
    for e in range(3):
        for o in range(6):
            for g in range(2):
                for b in range(16):
                    byte, exponent = int(blocks[e, o, g, b]), int(scales[e, o, g]) - 127
                    want[e, g * 32 + 2 * b, o] = values[byte & 15] * 2.0**exponent
                    want[e, g * 32 + 2 * b + 1, o] = values[byte >> 4] * 2.0**exponent
    name = "model.layers.0.mlp.experts.gate_up_proj"
    source = folder(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    assert torch.equal(source.read(name), want.bfloat16())
    assert torch.equal(source.read(name, (1, 2)), want.bfloat16()[1:2])


def gptq(
    base: str, bits: int, group: int, form: str = "gptq", *, ordered: bool = False, index: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """A random linear in GPTQ's layout, and its values [32, 64]."""
    width, rows = 64, 32
    code = torch.randint(0, 2**bits, (width, rows), generator=G)
    zero = torch.randint(1, 2**bits, (width // group, rows), generator=G)
    scale = torch.rand(width // group, rows, generator=G).half()
    of = torch.arange(width) // group
    if ordered:
        of = of[torch.randperm(width, generator=G)]

    def words(x: Tensor) -> Tensor:  # along the first axis
        per = 32 // bits
        x = x.reshape(-1, per, x.shape[1])
        out = sum(x[:, i] << (bits * i) for i in range(per))
        return torch.as_tensor(out).to(torch.int64).bitwise_and(0xFFFFFFFF).to(torch.uint32).view(torch.int32)

    tensors = {
        f"{base}.qweight": words(code),
        f"{base}.qzeros": words((zero - int(form == "gptq")).T).T.contiguous(),
        f"{base}.scales": scale,
    }
    if index:
        tensors[f"{base}.g_idx"] = of.int()
    return tensors, ((code - zero[of]).float() * scale[of].float()).T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, ordered: bool, form: str) -> None:
    tensors, want = gptq("m.a", bits, 16, form, ordered=ordered)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": form}
    source = folder(tmp_path, tensors, config, "float32")
    assert torch.equal(source.read("m.a.weight"), want)
    assert torch.equal(source.read("m.a.weight", (4, 6)), want[4:6])


@pytest.mark.parametrize("index", [True, False])
def test_gptq_with_rules_for_single_linears(tmp_path: Path, index: bool) -> None:
    """The first rule that a name begins with decides; a rule may change one number and leave the other."""
    rules = {
        "-:m\\.dense": {},
        "+:m\\.8": {"bits": 8, "group_size": 32},
        ".*\\.1": {"group_size": 16},
        "m.*": {"bits": 2},
        "m\\.2": {"bits": 8},
        "2": {"bits": 8},
    }
    grids = {"m.8.x": (8, 32), "m.8.1": (8, 32), "m.0.1": (4, 16), "m.2": (2, 64), "x.m.2": (4, 64)}
    tensors: dict[str, Tensor] = {"m.dense.weight": torch.ones(3, WIDTH)}
    want = {"m.dense.weight": torch.ones(3, WIDTH)}
    for base, (bits, group) in grids.items():
        some, want[f"{base}.weight"] = gptq(base, bits, group, index=index)
        tensors |= some
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": rules}
    source = folder(tmp_path, tensors, config, "float32")
    for name, values in want.items():
        assert torch.equal(source.read(name), values), name


@pytest.mark.parametrize(
    ("bits", "group", "rules", "message"),
    [
        (4, 32, {}, r"m\.a\.qzeros has shape \[4, 4\], but 4 bits in groups of 32.* need \[2, 4\]"),
        (8, 16, {}, r"m\.a\.qzeros has shape \[4, 4\], but 8 bits"),
        (4, 16, {"-:m": {}}, r"'-:m' in .* leaves m\.a out"),
        (4, 16, {"+:m(": {"bits": 8}}, r"'\+:m\(' in its quantization_config's dynamic: "),
        (4, 16, {"m": {"bits": 3}}, r"GPTQ at 3 bits \(m\.a\)"),
    ],
)
def test_gptq_whose_config_is_of_another_file(
    tmp_path: Path, bits: int, group: int, rules: dict[str, Any], message: str
) -> None:
    tensors, _ = gptq("m.a", 4, 16, index=False)
    with pytest.raises(SourceError, match=message):
        folder(tmp_path, tensors, {"quant_method": "gptq", "bits": bits, "group_size": group, "dynamic": rules})


def test_gptq_that_cannot_be_read(tmp_path: Path) -> None:
    tensors = {"m.a.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    with pytest.raises(SourceError, match="3 bits"):
        folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 3})
    with pytest.raises(SourceError, match="marlin"):
        folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"})
    with pytest.raises(SourceError, match="qzeros is missing"):
        folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4})
