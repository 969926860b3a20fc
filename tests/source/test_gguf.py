"""GGUF files: the values that transformers' own loader gives, tensor by tensor."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from lilliput.errors import SourceError
from lilliput.source import open_source
from lilliput.source.gguf_header import read_header

HIDDEN, INNER, HEADS, KV, VOCAB, EXPERTS = 64, 96, 4, 2, 40, 3
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16]


def write(path: Path, arch: str = "llama", **changes: np.ndarray) -> Path:
    """A model of two blocks in which every type that the package can write occurs."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    if arch == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)
        writer.add_key_length(HIDDEN // HEADS)
    if arch == "gemma2":
        writer.add_key_length(HIDDEN // HEADS)
        writer.add_value_length(HIDDEN // HEADS)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if arch == "llama":
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{i}.attn_v.weight": (HIDDEN // 2, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }
        if arch == "qwen3moe":
            for name in ("gate", "up", "down"):
                del shapes[f"blk.{i}.ffn_{name}.weight"]
            shapes |= {
                f"blk.{i}.attn_q_norm.weight": (HIDDEN // HEADS,),
                f"blk.{i}.attn_k_norm.weight": (HIDDEN // HEADS,),
                f"blk.{i}.ffn_gate_inp.weight": (EXPERTS, HIDDEN),
                f"blk.{i}.ffn_gate_exps.weight": (EXPERTS, 32, HIDDEN),
                f"blk.{i}.ffn_up_exps.weight": (EXPERTS, 32, HIDDEN),
                f"blk.{i}.ffn_down_exps.weight": (EXPERTS, HIDDEN, 32),
            }
        if arch == "gemma2":
            shapes |= {f"blk.{i}.post_{x}_norm.weight": (HIDDEN,) for x in ("attention", "ffw")}
    for n, (name, shape) in enumerate(shapes.items()):
        value = changes.get(name, rng.standard_normal(shape, dtype=np.float32))
        kind = KINDS[n % len(KINDS)] if len(shape) > 1 else Kind.F32
        data = value if kind in (Kind.F32,) else gguf.quants.quantize(value, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3moe"])
def test_as_transformers_reads_it(tmp_path: Path, arch: str) -> None:
    file = write(tmp_path / "tiny.gguf", arch)
    source = open_source(str(file))
    assert source.text_config.hidden_size == HIDDEN
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=file.name, dtype=torch.float32, config=source.config
    ).state_dict()
    if arch != "llama":
        del theirs["lm_head.weight"]  # tied
    for name in [x for x in theirs if ".experts." in x]:
        base, _, leaf = name.rpartition(".")
        for e, value in enumerate(theirs.pop(name)):
            halves = zip(("gate", "up"), value.chunk(2), strict=True)
            named = halves if leaf == "gate_up_proj" else [("down", value)]
            theirs |= {f"{base}.{e}.{part}_proj.weight": x for part, x in named}
    assert set(source.stored) == set(theirs)
    kinds = set()
    for name, stored in source.stored.items():
        got = source.read(name)
        kinds.add(got.dtype)
        assert torch.equal(got.float(), theirs[name]), name
        assert (tuple(got.shape), got.dtype) == (stored.shape, stored.dtype)
        assert got.is_contiguous()
        assert torch.equal(source.read(name, (1, 3)), got[1:3]), name
    assert kinds == {torch.float32, torch.float16, torch.bfloat16}
    assert sum(x.nbytes for x in source.stored.values()) <= file.stat().st_size
    source.scan()
    assert len(source.fingerprint()) == 64
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf")
    assert open_source(str(tmp_path)).stored
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"2 GGUF files\. Name one"):
        open_source(str(tmp_path))


def test_nan_is_named(tmp_path: Path) -> None:
    norm = np.ones(HIDDEN, dtype=np.float32)
    norm[3] = np.nan
    file = write(tmp_path / "tiny.gguf", **{"blk.1.ffn_norm.weight": norm})
    with pytest.raises(SourceError, match=r"model\.layers\.1\.post_attention_layernorm\.weight.*NaN"):
        open_source(str(file)).scan()


@pytest.mark.parametrize("left", [3, 20, 300, -1000, -4])
def test_truncated(tmp_path: Path, left: int) -> None:
    file = write(tmp_path / "tiny.gguf")
    os.truncate(file, left if left > 0 else file.stat().st_size + left)
    with pytest.raises(SourceError, match=r"tiny\.gguf.*download it again"):
        open_source(str(file))


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"PK\x03\x04 not a gguf file at all", "letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0), "impossible length"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "impossible length"),
    ],
)
def test_not_gguf(tmp_path: Path, raw: bytes, word: str) -> None:
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(SourceError, match=word):
        open_source(str(tmp_path / "x.gguf"))


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    file = write(tmp_path / "x.gguf", "plamo")
    assert read_header(file).architecture == "plamo"
    with pytest.raises(SourceError, match=r"plamo.*safetensors folder instead"):
        open_source(str(file))


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x-00001-of-00002.gguf")
    with pytest.raises(SourceError, match="llama-gguf-split --merge"):
        open_source(str(file))


def test_header_agrees_with_the_package(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf")
    ours = read_header(file).tensors
    theirs = gguf.GGUFReader(file).tensors
    assert [x.name for x in theirs] == list(ours)
    for x in theirs:
        mine = ours[x.name]
        assert (mine.offset, mine.nbytes, mine.kind) == (x.data_offset, x.n_bytes, x.tensor_type)
        assert mine.shape == tuple(reversed(x.shape.tolist()))
