import json
import shutil

import pytest
import torch

from lilliput.efficiency.serving import dense, native, servings, sparse, w8a8, weight_only
from lilliput.errors import PlanError
from lilliput.model.stored import open_model
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.linear import LinearSpec
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.scheme import Scheme

Q = "model.layers.0.self_attn.q_proj.weight"


def test_how_each_engine_holds_a_packed_folder(packed, opened):
    bits = {"compressed-tensors": 6 + 8 * 16 / 1024, "lilliput": 6.0}  # the first stores the shape as two int64
    for layout, expected in bits.items():
        model = opened(packed(layout))
        kernels = servings(model, [Q, "lm_head.weight"], torch.bfloat16, "kernels")
        loaded = servings(model, [Q, "lm_head.weight"], torch.float32, "transformers")
        assert kernels["lm_head.weight"] == dense(torch.bfloat16)
        assert kernels[Q].bits == pytest.approx(expected)
        assert kernels[Q].arithmetic == "bf16"
        if layout == "lilliput":  # no engine has a kernel for it: read packed, write and read dense
            assert (kernels[Q].decoded, loaded[Q].decoded) == (4.0, 8.0)
        else:
            assert (kernels[Q].decoded, loaded[Q].decoded, loaded[Q].bits) == (0.0, 0.0, 32.0)
            assert loaded[Q].packed == pytest.approx(expected)
    with pytest.raises(PlanError, match="unknown runtime 'vllm'"):
        servings(model, [Q], torch.float32, "vllm")


def test_a_scheme_with_8_bit_inputs_multiplies_in_8_bits(packed, tmp_path):
    path = tmp_path / "w8a8"
    shutil.copytree(packed("compressed-tensors"), path)
    config = json.loads((path / "config.json").read_text())
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs
    (path / "config.json").write_text(json.dumps(config))
    found = servings(open_model(str(path)), [Q], torch.bfloat16, "kernels")[Q]
    assert (found.arithmetic, found.inputs, found.bits) == ("int8", 1.0, pytest.approx(6.125))
    inputs["type"] = "float"
    (path / "config.json").write_text(json.dumps(config))
    assert servings(open_model(str(path)), [Q], torch.bfloat16, "kernels")[Q].arithmetic == "fp8"


def test_what_if_formats_by_hand():
    assert weight_only(4, 128, torch.bfloat16, zero_bits=4).bits == 4 + 20 / 128
    halved = sparse(2, 4, torch.bfloat16)
    assert (halved.bits, halved.keep) == (2 * (16 + 2) / 4, 0.5)
    assert w8a8("fp8").arithmetic == "fp8"
    for wrong in (lambda: sparse(4, 4, torch.float32), lambda: weight_only(0, 1, torch.float32)):
        with pytest.raises(PlanError):
            wrong()
    with pytest.raises(PlanError, match=r"torch\.int8 is not"):
        dense(torch.int8)


def test_kept_weights_serve_few_tokens_without_decoding():
    bits, kept = 9.0, BitmaskSpec(32 * 48 // 2, torch.bfloat16)
    spec = LinearSpec("x", "x", 32, 48, Scheme((kept,)))
    found = native(spec, bits, torch.bfloat16, thin=False, few=False, apart=True)
    few, many = found.at(1), found.at(1000)
    assert (few.keep, few.decoded, few.bits, few.arithmetic) == (0.5, 0.0, 9.0, "fp32")
    assert (many.keep, many.decoded, many.bits, many.arithmetic) == (1.0, 4.0, 9.0, "bf16")
    assert native(spec, bits, torch.bfloat16, thin=False, few=False, apart=False).at(1).decoded == 4.0
    filled = LinearSpec("x", "x", 32, 48, Scheme((kept, LowRankSpec(6))))
    both = native(filled, bits, torch.bfloat16, thin=False, few=False, apart=True)
    assert both.at(1).keep == 0.5 + 6 * (32 + 48) / (32 * 48)
