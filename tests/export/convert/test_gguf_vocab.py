"""The tokenizer in a GGUF file."""

from pathlib import Path

import gguf
import pytest
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from lilliput.errors import PlanError
from lilliput.export.convert import gguf_vocab
from lilliput.source import open_source


def _folder(folder: Path, tokenizer: Tokenizer, vocabulary: int, **special: str) -> Path:
    config = tf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def _added(folder: Path) -> dict[str, object]:
    writer = gguf.GGUFWriter(None, "llama")
    gguf_vocab.add(writer, open_source(str(folder)))
    return {key: x.value for key, x in writer.kv_data[0].items()}


def _pieces() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab"]
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b")]
    tokenizer = Tokenizer(
        models.BPE({x: i for i, x in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def test_pieces_have_scores_by_their_merges(tmp_path: Path) -> None:
    held = _added(_folder(tmp_path / "m", _pieces(), 272, unk_token="<unk>", bos_token="<s>", eos_token="</s>"))
    tokens, scores, types = (held[f"tokenizer.ggml.{x}"] for x in ("tokens", "scores", "token_type"))
    assert isinstance(tokens, list)
    assert isinstance(scores, list)
    assert isinstance(types, list)
    assert held["tokenizer.ggml.model"] == "llama"
    assert held["tokenizer.ggml.add_space_prefix"] is True
    assert len(tokens) == len(scores) == len(types) == 272
    assert sorted(("a", "ab", "▁ab", "▁a"), key=lambda x: scores[tokens.index(x)]) == ["a", "ab", "▁ab", "▁a"]
    kinds = {word: types[tokens.index(word)] for word in ("<unk>", "<s>", "<0x41>", "ab", "[PAD270]")}
    assert kinds == {"<unk>": 2, "<s>": 3, "<0x41>": 6, "ab": 1, "[PAD270]": 5}
    assert (held["tokenizer.ggml.bos_token_id"], held["tokenizer.ggml.unknown_token_id"]) == (1, 0)


RULES = {
    "gpt-2": {"type": "ByteLevel", "use_regex": True},
    "smollm": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
    "qwen2": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"}},
        {"type": "ByteLevel", "use_regex": False}]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"}},
        {"type": "ByteLevel", "use_regex": False}]},
}  # fmt: skip


@pytest.mark.parametrize("name", list(RULES))
def test_the_rule_that_splits_text_is_found_by_what_it_says(name: str) -> None:
    assert gguf_vocab._rule(RULES[name]) == name


def test_a_rule_without_a_name_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(PlanError, match="splits text by Whitespace"):
        _added(_folder(tmp_path / "a", tokenizer, 8))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(PlanError, match="of type WordLevel"):
        _added(_folder(tmp_path / "b", words, 8))
    byte = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    byte.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(PlanError, match="has 3 tokens and the model 2"):
        _added(_folder(tmp_path / "c", byte, 2))


def test_a_name_that_means_something_to_llama_cpp() -> None:
    """Phi-3's spaces after markers go by the model's name, which no other tokenizer can have."""
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=_pieces(), bos_token="<s>", eos_token="</s>")
    assert gguf_vocab.general_name("some-model", tokenizer) == "some-model"
    assert gguf_vocab.general_name("org/Phi-3-mini", tokenizer) == "org/Phi- 3-mini"
    assert gguf_vocab.general_name("phi3", tokenizer) == "phi 3"
    tokenizer.add_tokens([tf.AddedToken("<|user|>", rstrip=True), "<|endoftext|>", "<unk>"])
    assert gguf_vocab.general_name("org/Phi-3-mini", tokenizer) == "org/Phi-3-mini"
    assert gguf_vocab.general_name("some-model", tokenizer) == "some-model (phi-3)"
