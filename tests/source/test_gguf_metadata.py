"""The metadata of GGUF files: what gguf's own reader says, and the tokenizer that transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lilliput.errors import SourceError
from lilliput.source import open_source
from lilliput.source.gguf_metadata import Metadata, lean

WORDS = ["a", "b", "c", "\u0120", "ab", "\u0120a", "abc", "<|end|>"]
MERGES = ["a b", "\u0120 a", "ab c"]


def write(path: Path) -> Path:
    """A model without blocks, with metadata of every kind and a byte-pair tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("smallest")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(0)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 1) + [3])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(len(WORDS) - 1)
    writer.add_bool("some.flag", True)
    writer.add_float64("some.wide", 0.1)
    writer.add_int64("some.negative", -(1 << 40))
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_tensor("token_embd.weight", np.zeros((len(WORDS), 32), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_fields_are_those_of_gguf(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    theirs = {k: v for k, v in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    ours = Metadata(path)
    assert list(ours.fields) == list(theirs)
    for key, field in theirs.items():
        mine = ours.fields[key]
        assert mine.types == [int(x) for x in field.types]
        assert [bytes(mine.parts[i]) for i in mine.data] == [bytes(field.parts[i]) for i in field.data], key
    assert [x.name for x in ours.tensors] == [x.name for x in GGUFReader(path).tensors]


def test_transformers_makes_the_same_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    with lean():
        ours = load_gguf_checkpoint(str(path))
        assert gguf.GGUFReader is Metadata
    assert gguf.GGUFReader is GGUFReader
    theirs = load_gguf_checkpoint(str(path))
    assert {k: v for k, v in ours.items() if k != "ignore"} == {k: v for k, v in theirs.items() if k != "ignore"}


def test_gguf_s_reader_comes_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), lean():
        raise ValueError("inside")
    assert gguf.GGUFReader is GGUFReader


def test_the_tokenizer_is_written_out_once(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "tiny.gguf")))
    ids = source.tokenizer()("abc ab")["input_ids"]
    assert ids == [6, 3, 4]
    files = source.side_files()
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert source.side_files() == files
    folder = files["tokenizer.json"].parent
    assert AutoTokenizer.from_pretrained(folder)("abc ab")["input_ids"] == ids
    del source
    assert not folder.exists()


def test_without_a_tokenizer_there_is_an_error_each_time(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(0)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_vocab_size(8)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(str(tmp_path / "bare.gguf"))
    for _ in range(2):
        with pytest.raises(SourceError, match="no tokenizer"):
            source.side_files()
