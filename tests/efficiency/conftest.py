import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from lilliput.efficiency.devices import Device
from lilliput.model.stored import Model, open_model

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma": lambda: tf.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: tf.MistralConfig(**SIZES, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random two-block model by its kind, written once. Read it only."""
    root = tmp_path_factory.mktemp("efficiency")

    def make(kind: str) -> Path:
        path = root / kind
        if not path.exists():
            torch.manual_seed(0)
            tf.AutoModelForCausalLM.from_config(CONFIGS[kind]()).float().save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def packed(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The llama folder with its linears at 4 bits, as an exporter writes them."""

    from safetensors.torch import load_file, save_file

    from lilliput import export
    from lilliput.export.outcome import Outcome
    from lilliput.formats.integer import IntegerFormat
    from lilliput.parts.layer import Layer
    from lilliput.parts.quantized import QuantizedPart
    from lilliput.parts.scheme import quantized

    grid = IntegerFormat(bits=4, symmetric=True, group_size=16, scale_dtype=torch.float32)
    root = tmp_path_factory.mktemp("packed")

    def make(layout: str) -> Path:
        path = root / layout
        if path.exists():
            return path
        shutil.copytree(folder("llama"), path)
        exporter = export.get(layout)
        tensors = load_file(path / "model.safetensors")
        outcomes = []
        for name in [n for n in tensors if n.startswith("model.layers.") and tensors[n].dim() == 2]:
            weight, linear = tensors.pop(name), name.removesuffix(".weight")
            outcome = Outcome(linear, linear, weight.shape[0], weight.shape[1], quantized(grid), torch.float32)
            scales = grid.fit(weight)
            layer = Layer(linear, weight).with_part(QuantizedPart(grid, grid.encode(weight, scales), scales))
            tensors |= exporter.pack(outcome, layer)
            outcomes.append(outcome)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = exporter.config(outcomes, open_model(str(folder("llama"))).source.config)
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], Model]:
    """A folder, opened once: finding its anatomy takes a while. Do not change the model."""
    return cache(lambda path: open_model(str(path)))


@pytest.fixture
def device() -> Device:
    """Round numbers: 1000 FLOP/s in 16 bits, 2000 in int8, 10 bytes/s."""
    return Device("toy", "a toy", {"fp32": 500.0, "bf16": 1000.0, "int8": 2000.0}, 10.0, 1e6)
