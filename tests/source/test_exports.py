"""What the exporters write comes back as the very weights that were meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig

from lilliput import export
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import IntegerFormat
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=32,
        dtype="bfloat16",
    ),
    "mixtral": MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=32,
        dtype="float32",
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=32, n_positions=16, dtype="float32"),
}
CASES = [
    ("compressed-tensors", "llama", 4, True, 32),
    ("compressed-tensors", "llama", 3, False, 32),
    ("compressed-tensors", "llama", 8, False, -1),
    ("compressed-tensors", "llama", 5, True, 0),
    ("compressed-tensors", "mixtral", 4, True, 32),
    ("lilliput", "llama", 3, False, 40),  # groups that do not divide the width
    ("lilliput", "mixtral", 4, False, 32),
    ("lilliput", "gpt2", 4, True, 32),  # stored transposed
]


@pytest.mark.parametrize(("name", "kind", "bits", "symmetric", "group"), CASES)
def test_exact(tmp_path: Path, name: str, kind: str, bits: int, symmetric: bool, group: int) -> None:
    torch.manual_seed(0)
    config = CONFIGS[kind]
    dtype = torch.bfloat16 if kind == "llama" else torch.float32
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path)
    model = open_model(str(tmp_path))
    scales = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    form = IntegerFormat(bits, symmetric, group, scale_dtype=scales)
    exporter = export.get(name)
    values, want, outcomes = load_file(tmp_path / "model.safetensors"), {}, []
    wanted = ("proj.weight", "c_fc.weight") if kind != "gpt2" else ("c_fc.weight", "c_proj.weight", "c_attn.weight")
    for canonical in [x for x in model.refs if x.endswith(wanted)]:
        weight = model.read(canonical).float()
        weight = weight.T.contiguous() if kind == "gpt2" else weight
        stored = model.stored_name(canonical)
        outcome = Outcome(
            canonical.removesuffix(".weight"),
            stored.removesuffix(".weight"),
            *weight.shape,
            scheme=quantized(form),
            dtype=dtype,
            transposed=kind == "gpt2",
            expert=".experts." in canonical,
        )
        outcomes.append(outcome)
        grid = form.fit(weight)
        codes = form.encode(weight, grid)
        part = QuantizedPart(codes=codes, grid=grid, format=form)
        del values[stored]
        values |= exporter.pack(outcome, Layer(outcome.name, weight, (part,)))
        decoded = form.decode(codes, grid).to(dtype)
        want[canonical] = decoded.T if kind == "gpt2" else decoded
    assert exporter.refuse(outcomes, config) is None
    save_file(values, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = exporter.config(outcomes, config)
    (tmp_path / "config.json").write_text(json.dumps(raw))

    again = open_model(str(tmp_path))
    assert len(want) >= 3
    for canonical in model.refs:
        got = again.read(canonical)
        assert got.dtype == model.dtype(canonical)
        assert torch.equal(got, want.get(canonical, got)), canonical
        assert again.stored_name(canonical) == model.stored_name(canonical)
    assert again.carried == ()
    packed = sum(x.nbytes for x in again.source.stored.values())
    assert packed == sum(x.nbytes for x in values.values())
    assert name in again.notes[0]
    again.source.scan()
