from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """A random Llama of six blocks with larger weights than at initialisation, so that its predictions are sharp."""

    def make(name: str = "base") -> Path:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4.0)
        model.save_pretrained(tmp_path / name)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(4000)))
    return path


@pytest.fixture
def change() -> Callable[..., None]:
    def one(folder: Path, tensor: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Rewrite one tensor of a folder, and take every checksum away."""
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            if tensor in tensors:
                tensors[tensor] = edit(tensors[tensor])
                save_file(tensors, path, metadata)
                (folder / "lilliput.json").unlink()
                return
        raise AssertionError(f"no {tensor}")

    return one
