from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lilliput.data import docs

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(docs.pieces("docs:reference"), 20), trainer)
    return tokenizer


@pytest.fixture
def tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A trained byte-level BPE of 600 tokens with a chat template; texts longer than 64 tokens would make it warn."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()), eos_token="<|im_end|>", model_max_length=64
    )
    made.chat_template = TEMPLATE
    return made
