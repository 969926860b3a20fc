from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 256


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer(first: str = "") -> PreTrainedTokenizerFast:
    """One token a byte; `first` moves one character to the front, which makes another vocabulary of the same size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda x: (x != first, x))
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def llama(**other: object) -> LlamaConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(settings | other))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random model with its tokenizer; `change` may alter the model before it is saved."""

    def make(
        name: str,
        config: PretrainedConfig | None = None,
        *,
        seed: int = 0,
        first: str = "",
        change: Callable[[PreTrainedModel], None] | None = None,
    ) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config or llama()).float()
        with torch.no_grad():
            for parameter in model.parameters():
                # Larger than at initialisation, so that the predictions are far from uniform.
                if parameter.dim() == 2:
                    parameter.mul_(8.0)
            if change is not None:
                change(model)
        path = tmp_path / name
        model.save_pretrained(path)
        byte_tokenizer(first).save_pretrained(path)
        return path

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and nobody minds. " * 40, encoding="utf-8")
    return path
