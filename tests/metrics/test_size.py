import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput import export
from lilliput.errors import SourceError
from lilliput.export.outcome import Outcome
from lilliput.export.provenance import LinearRow, Provenance
from lilliput.formats.integer import IntegerFormat
from lilliput.metrics.size import measure
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized

GRID = IntegerFormat(bits=4, symmetric=False, group_size=16, scale_dtype=torch.float32)


def quantize(path):
    """Rewrite a folder's block linears as packed 4-bit tensors; returns the names of the linears."""
    model = open_model(str(path))
    exporter = export.get("compressed-tensors")
    tensors = load_file(path / "model.safetensors")
    outcomes = []
    for name in [n for n in tensors if n.startswith("model.layers.") and tensors[n].dim() == 2]:
        weight = tensors.pop(name)
        linear = name.removesuffix(".weight")
        outcome = Outcome(linear, linear, *weight.shape, quantized(GRID), torch.float32)
        grid = GRID.fit(weight)
        layer = Layer(linear, weight).with_part(QuantizedPart(GRID, GRID.encode(weight, grid), grid))
        tensors |= exporter.pack(outcome, layer)
        outcomes.append(outcome)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = exporter.config(outcomes, model.source.config)
    (path / "config.json").write_text(json.dumps(config))
    return [x.name for x in outcomes]


def provenance(linears):
    rows = tuple(LinearRow(name=n, stored=n, format="int4", bits=4.0) for n in linears)
    return Provenance("m", "f", "compressed-tensors", {}, "p", None, None, {}, linears=rows)


def test_dense_model_by_hand(folder):
    path = folder("dense")
    found = measure(open_model(str(path)))
    assert found.bytes == (path / "model.safetensors").stat().st_size
    assert (found.bits_per_weight, found.model_bits_per_weight, found.compressed) == (32.0, 32.0, 0)


def test_packed_model_by_hand(folder):
    path = folder("packed")
    names = quantize(path)
    found = measure(open_model(str(path)))
    shapes = 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    weights = sum(a * b for a, b in shapes)
    # codes, float32 scales, packed zero points (8 rows to an int32), and the shape as two int64
    stored = sum(a * b // 2 + 4 * a * (b // 16) + 4 * (a // 8) * (b // 16) + 16 for a, b in shapes)
    assert found.compressed == len(names) == 14
    assert found.bits_per_weight == pytest.approx(8 * stored / weights)
    dense = 2 * 256 * 32 + 5 * 32
    assert found.model_bits_per_weight == pytest.approx(8 * (stored + 4 * dense) / (weights + dense))
    assert found.bytes == (path / "model.safetensors").stat().st_size


def test_the_record_says_which_linears_count(folder):
    path = folder("recorded")
    names = quantize(path)
    chosen = [n for n in names if n.endswith("down_proj")]
    record = provenance(chosen)
    (path / "lilliput.json").write_text(record.to_json())
    found = measure(open_model(str(path)))
    assert found.compressed == 2
    assert found.bits_per_weight == pytest.approx(8 * (768 + 384 + 48 + 16) / 1536)
    # Linears that a step pruned are stored dense, and count all the same.
    dense = folder("pruned")
    (dense / "lilliput.json").write_text(record.to_json())
    pruned = measure(open_model(str(dense)))
    assert (pruned.compressed, pruned.bits_per_weight) == (2, 32.0)
    (path / "lilliput.json").write_text(replace(record, linears=()).to_json())
    assert measure(open_model(str(path))).compressed == 14
    (path / "lilliput.json").write_text("{")
    with pytest.raises(SourceError, match=r"lilliput\.json is damaged"):
        measure(open_model(str(path)))
