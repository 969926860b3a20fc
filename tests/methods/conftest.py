"""A small random Llama, tied, whose folder, bound model and whole model the tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.model.stored import Model, open_model

HIDDEN, LAYERS, VOCAB = 24, 3, 48


@dataclass(frozen=True)
class Toy:
    model: Model
    whole: Any
    ids: Tensor  # [4, 12]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    whole = tf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for value in whole.parameters():
            value.add_(torch.randn(value.shape) * 0.15)
        # Channels that stand out, differently in each block.
        for n, layer in enumerate(whole.model.layers):
            layer.input_layernorm.weight[n] += 20.0 * n
    folder = tmp_path_factory.mktemp("toy")
    whole.save_pretrained(folder)
    return Toy(open_model(str(folder)), whole, torch.randint(0, VOCAB, (4, 12)))
