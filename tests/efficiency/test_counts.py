import json

import pytest
import torch

import lilliput
from lilliput.efficiency.counts import count, flops, prefill_flops
from lilliput.efficiency.shapes import shapes_of
from lilliput.efficiency.zeros import count_zeros
from lilliput.errors import PlanError
from lilliput.model.stored import open_model

LINEARS = 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32 + 3 * 32 * 48)  # of both blocks
HEAD = 256 * 32


def test_operations_equal_a_hand_count_on_two_layers(folder, opened):
    shapes = shapes_of(opened(folder("llama")))
    found = flops(shapes, 10)
    assert found.decode == 2 * (LINEARS + HEAD) + 2 * (4 * 4 * 8 * 10)
    assert found.prefill == 2 * (LINEARS + HEAD) + 2 * (4 * 4 * 8 * 11 / 2)
    # A prefill as it is run and timed: logits at the last token only.
    assert prefill_flops(shapes, 3, 10) == 3 * (2 * (10 * LINEARS + HEAD) + 2 * 4 * 4 * 8 * 55)
    with pytest.raises(PlanError, match="context of 0"):
        flops(shapes, 0)


def test_sizes_by_hand(folder):
    path = folder("llama")
    found = count(open_model(str(path)), context=10)
    loaded = lilliput.load(path)
    assert found.parameters == sum(p.numel() for p in loaded.parameters()) == LINEARS + 2 * HEAD + 5 * 32
    assert found.ram_bytes == 4 * found.parameters
    assert found.bytes == (path / "model.safetensors").stat().st_size
    assert found.kv_bytes_per_token == 2 * 2 * (2 * 8) * 4
    assert {x.kind: (x.tensors, x.bytes) for x in found.by_kind} == {
        "embedding": (1, 4 * HEAD),
        "head": (1, 4 * HEAD),
        "mlp": (6, 4 * 2 * 3 * 32 * 48),
        "attention": (8, 4 * (LINEARS - 2 * 3 * 32 * 48)),
        "norms and biases": (5, 4 * 5 * 32),
    }
    assert (found.base_bytes, found.compression_ratio, found.macs_saved) == (None, None, None)


def test_a_packed_folder_against_its_base(folder, packed, opened):
    base = opened(folder("llama"))
    found = {x: count(opened(packed(x)), base) for x in ("compressed-tensors", "lilliput")}
    for one in found.values():
        assert one.base_ram_bytes == 4 * one.parameters
        assert one.flops_per_token == one.base_flops_per_token
        assert one.compression_ratio == one.base_bytes / one.bytes > 1.5
    # transformers decodes the first at load; the second stays packed: 4 bits and a float32 scale for 16 weights
    assert found["compressed-tensors"].ram_bytes == found["compressed-tensors"].base_ram_bytes
    dense = found["lilliput"].parameters - LINEARS
    assert found["lilliput"].ram_bytes == 4 * dense + LINEARS * 6 // 8
    kernels = count(opened(packed("compressed-tensors")), runtime="kernels")
    assert kernels.ram_bytes == 4 * dense + LINEARS * 6 // 8 + 14 * 16  # and the shape of each linear


def test_saved_operations_are_those_of_zero_weights(folder):
    model = open_model(str(folder("llama")))
    shapes = shapes_of(model)
    read = model.read_rows

    def pruned(name, start, stop):
        part = read(name, start, stop)
        return part * torch.tensor([1.0, 0.0]).repeat(part.shape[1] // 2) if "down_proj" in name else part

    model.read_rows = pruned
    found = count(model, zeros=count_zeros(model, shapes))
    assert found.macs_saved == 2 * 32 * 48 // 2
    assert found.macs_saved_share == found.macs_saved / (LINEARS + HEAD)


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "gpt2", "mixtral"])
def test_the_report_is_plain_data_for_every_kind_of_model(folder, kind, opened):
    model = opened(folder(kind))
    found = count(model, model)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    keys = {"parameters", "bytes", "base_bytes", "ram_bytes", "base_ram_bytes", "bits_per_weight", "macs_saved"}
    keys |= {"model_bits_per_weight", "compression_ratio", "flops_per_token", "base_flops_per_token", "by_kind"}
    assert keys <= plain.keys()
    assert plain["flops_per_token"]["decode"] > plain["flops_per_token"]["prefill"] > 0
    assert plain["parameters"] == sum(p.numel() for p in lilliput.load(folder(kind)).parameters())
    stored = sum(x.nbytes for x in model.source.stored.values())
    assert sum(x["bytes"] for x in plain["by_kind"]) == stored
