"""Files of all architectures and both kinds of tokenizers in llama.cpp itself, where there is one.

`python scripts/engine_env.py llamacpp DIR` makes one; LILLIPUT_LLAMACPP_PYTHON=DIR/bin/python names it.
"""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from lilliput import api
from lilliput.data import docs
from lilliput.errors import LilliputError
from lilliput.export.convert import gguf_check, llamacpp
from lilliput.progress import Quiet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(llamacpp.python() is None, reason=f"no llama.cpp: set {llamacpp.VARIABLE}"),
    pytest.mark.filterwarnings("ignore"),
]
_SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 256,
    "num_hidden_layers": 3, "intermediate_size": 256, "num_key_value_heads": 2,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_WINDOWS: dict[str, Any] = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama3": lambda: tf.LlamaConfig(**_SIZES, attention_bias=True, rope_parameters=_LLAMA3),
    "mistral": lambda: tf.MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, head_dim=128),
    "gemma2": lambda: tf.Gemma2Config(**_SIZES, **_WINDOWS),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_SIZES, **_WINDOWS, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": lambda: tf.Phi3Config(**{**_SIZES, "vocab_size": 32064}, sliding_window=None),
    "gpt2": lambda: tf.GPT2Config(vocab_size=512, n_embd=256, n_layer=3, n_head=4, n_positions=256),
}


def pieces(prefixed: bool) -> tf.PreTrainedTokenizerFast:
    """A tokenizer as those that are made of SentencePiece models: bytes for what it has no piece for, every way to put
    a piece together among its merges; with or without a space before the text."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=240, show_progress=False, max_token_length=8)
    raw.train_from_iterator(islice(docs.pieces("docs:reference"), 20), trainer)
    learned = sorted(raw.get_vocab(), key=raw.get_vocab().__getitem__)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learned][:510]
    rank = {word: i for i, word in enumerate(words)}
    cuts = [(word[:i], word[i:]) for word in words[259:] for i in range(1, len(word))]
    merges = sorted((x for x in cuts if set(x) <= set(words[259:])), key=lambda x: (rank[x[0] + x[1]], rank[x[0]]))
    tokenizer = Tokenizer(models.BPE(rank, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefixed else [spaces])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _model(folder: Path, name: str, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).float()
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(4.0) if x.dim() > 1 else x.add_(torch.randint(-8, 8, x.shape) / 64)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _looked(model: Path, out: Path) -> Any:
    """What llama.cpp makes of the file, which `convert` writes only where it makes the same of it."""
    seen = gguf_check.look(api.convert(model, out).out, model)
    assert not seen.problems
    return seen


@pytest.mark.parametrize("kind", ["bytes", "pieces", "bare"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_with_every_kind_of_tokenizer(
    name: str, kind: str, tokenizer: tf.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In float32, where nothing may differ but the order of sums, and GELU, which llama.cpp looks up in a table."""
    words = tokenizer if kind == "bytes" else pieces(kind == "pieces")
    assert _looked(_model(tmp_path / "m", name, words), tmp_path / "m.gguf").logits < (
        1e-3 if name[:3] in ("gem", "gpt") else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tokenizer: tf.PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = _model(tmp_path / "m", "llama", tokenizer, dtype)
    assert _looked(model, tmp_path / "m.gguf").logits < gguf_check.CLOSE["F16" if dtype == torch.float16 else "BF16"]


@pytest.mark.parametrize("kind", [
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0",
    "tq2_0", "mxfp4",
])  # fmt: skip
def test_every_type(kind: str, tokenizer: tf.PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Blocks of each type mean in llama.cpp what they mean here, to the 8 bits that it rounds inputs to."""
    model = _model(tmp_path / "m", "llama", tokenizer)
    recipe = f"steps:\n  - {{method: rtn, target: {{format: {kind}}}, options: {{importance: false, steps: 6}}}}\n"
    done = api.compress(
        model, tmp_path / "m.gguf", recipe=recipe, to="gguf", samples=2, tokens=32, device="cpu", dtype="float32",
        eval_windows=0, progress=Quiet(),
    )  # fmt: skip
    assert done.converted is not None
    assert kind.upper() in done.converted.types
    assert "llama.cpp" in done.to_json()["measured"]["engine"]


def test_a_wrong_tensor_is_seen(
    tokenizer: tf.PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query and key rows that nobody has put into llama.cpp's order."""
    from lilliput.export.convert import gguf_model

    model = _model(tmp_path / "m", "llama", tokenizer)
    monkeypatch.setattr(gguf_model, "row_order", lambda config, name, rows: None)
    with pytest.raises(LilliputError, match="other logits than the weights"):
        api.convert(model, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_tokens_that_differ_are_seen(tmp_path: Path) -> None:
    """A space before the first word alone: llama.cpp puts one after every marker too."""
    from tokenizers import pre_tokenizers

    tokenizer = pieces(True)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    with pytest.raises(LilliputError, match="strings as other tokens"):
        api.convert(_model(tmp_path / "m", "llama", tokenizer), tmp_path / "m.gguf")
