"""Configs that transformers takes and makes no model of get one message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from lilliput.anatomy.build import build
from lilliput.errors import SourceError

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("pad", [64, 70, -65])
def test_a_pad_token_beyond_the_vocabulary(pad: int) -> None:
    with pytest.raises(SourceError, match=rf"pad_token_id is {pad} .* vocabulary of 64, .*set it to null"):
        build(tf.LlamaConfig(**SMALL, pad_token_id=pad), torch.float32, "cpu")


@pytest.mark.parametrize("pad", [None, 0, 63, -1, -64])
def test_a_pad_token_that_transformers_takes(pad: int | None) -> None:
    assert len(build(tf.LlamaConfig(**SMALL, pad_token_id=pad), torch.float32, "cpu").blocks) == 1


def test_a_pad_token_that_the_model_does_not_use() -> None:
    config = tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, pad_token_id=64)
    assert len(build(config, torch.float32, "cpu").blocks) == 1


@pytest.mark.parametrize("wrong", [{"head_dim": "wide"}, {"hidden_act": "nix"}, {"intermediate_size": -1}])
def test_numbers_that_do_not_go_together(wrong: dict[str, Any]) -> None:
    config = tf.LlamaConfig(**SMALL)
    for key, value in wrong.items():
        object.__setattr__(config, key, value)
    with pytest.raises(SourceError, match="cannot build this config"):
        build(config, torch.float32, "cpu")
