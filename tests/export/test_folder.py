"""Side files, config and index of a written folder, and the size of a safetensors file to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, Gemma3Config, LlamaConfig

from lilliput.errors import PlanError
from lilliput.export.card import Card, Figure
from lilliput.export.folder import model_config, safetensors_bytes, safetensors_header, write_index, write_side_files
from lilliput.export.provenance import DataRow, LinearRow, Provenance, TensorRow, read, versions

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.uint32, torch.uint64, torch.complex64,
]  # fmt: skip
PROVENANCE = Provenance(
    model="a/b",
    fingerprint="f",
    layout="compressed-tensors",
    recipe={"steps": [{"method": "rtn"}]},
    plan="p",
    seed=None,
    data=DataRow("docs", 2, 16, "d"),
    versions={"torch": "2"},
    notes=("n",),
    measured={"perplexity": {"value": 2.5, "low": 2.0, "high": 3.0}},
    linears=(LinearRow("m.q", "m.q", "int4 g32 sym", 4.5, 0.01, 0.2),),
    tensors=(TensorRow("m.q.weight_scale", "model.safetensors", "float16", (4, 2), "0" * 64),),
)
CARD = Card("b, 4 bits", "a/b", "compressed-tensors", "steps: []\n", (Figure("perplexity", "2.5", "2.4"),))


@pytest.mark.parametrize("count", [0, 1, 5, 60])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_header_and_size_are_those_of_the_written_file(
    tmp_path: Path, count: int, metadata: dict[str, str] | None
) -> None:
    rng = torch.Generator().manual_seed(count)
    tensors = {}
    for i in range(count):
        shape = torch.randint(0, 9, (int(torch.randint(0, 4, (), generator=rng)),), generator=rng).tolist()
        tensors[f"{'aé.'[i % 3]}{i * 37 % 11}.{i}"] = torch.zeros(shape, dtype=DTYPES[i * 5 % len(DTYPES)])
    save_file(tensors, tmp_path / "x", metadata=metadata)
    described = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert safetensors_bytes(described, metadata) == (tmp_path / "x").stat().st_size
    header, order = safetensors_header(described, metadata)
    assert (tmp_path / "x").read_bytes().startswith(header)
    with safe_open(tmp_path / "x", "pt") as file:
        assert order == file.offset_keys()


def test_writes_everything_and_copies_the_rest(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "config.json"):
        (source / name).write_text(f"source {name}")
    config = model_config(LlamaConfig(num_hidden_layers=1), quantization={"quant_method": "x"}, dtype=torch.bfloat16,
                          tied=False, architecture="LlamaForCausalLM")  # fmt: skip
    write_side_files(
        folder, source_side_files={x.name: x for x in source.iterdir()}, config=config, provenance=PROVENANCE, card=CARD
    )
    assert sorted(x.name for x in folder.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "lilliput.json", "tokenizer.json"
    ]  # fmt: skip
    assert (folder / "tokenizer.json").read_text() == "source tokenizer.json"
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization_config"] == {"quant_method": "x"}
    assert (written["dtype"], written["tie_word_embeddings"]) == ("bfloat16", False)
    assert written["architectures"] == ["LlamaForCausalLM"]
    again = AutoConfig.from_pretrained(folder)
    assert (again.num_hidden_layers, again.dtype, again.tie_word_embeddings) == (1, torch.bfloat16, False)
    assert read(folder) == PROVENANCE
    assert "# b, 4 bits" in (folder / "README.md").read_text()


def test_nothing_outside_the_folder_is_written(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside.json"
    folder.mkdir()
    outside.write_text("mine")
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(PlanError, match="is a link"):
        write_side_files(folder, source_side_files={}, config={}, provenance=PROVENANCE, card=CARD)
    assert outside.read_text() == "mine"


def test_a_wrapper_tells_its_language_model_too() -> None:
    config = Gemma3Config(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 1})
    config.quantization_config = {"quant_method": "old"}
    plain = model_config(config, quantization=None, dtype=torch.float32, tied=True)
    assert plain["text_config"]["tie_word_embeddings"] is True
    assert plain["text_config"]["dtype"] == "float32"
    assert "quantization_config" not in plain


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LOCAL = {"rope_theta": 1e6, "rope_local_base_freq": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
OLD: dict[str, dict[str, Any]] = {
    "scaled": {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128},
    },
    "a default that may change": {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": None},
    "older names": {"model_type": "qwen3", "rope_theta": 1e6, "rope_scaling": YARN},
    "part of a head": {"model_type": "gpt_neox", "rotary_emb_base": 20_000, "rotary_pct": 0.5},
    "by kind of layer": {"model_type": "gemma3_text", **LOCAL},
    "within a wrapper": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **LOCAL}},
    "flat wrapper": {"model_type": "qwen2_vl", "hidden_size": 64, "rope_theta": 3e6},
    "no rotation": {"model_type": "gpt2", "n_embd": 64, "activation_function": "relu"},
}


def read_back(folder: Path, plain: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(plain))
    config = AutoConfig.from_pretrained(folder)
    found: dict[str, Any] = config.to_dict()
    return found | {"theirs": config}


@pytest.mark.parametrize("kind", OLD)
def test_keys_of_older_engines_stay_beside_the_new_ones(tmp_path: Path, kind: str) -> None:
    """An engine that knows `rope_theta` alone would silently rotate by its default without it."""
    raw = {**OLD[kind], "torch_dtype": "float16", "transformers_version": "4.45.0"}
    before = read_back(tmp_path, raw)
    config = before["theirs"]
    plain = model_config(config, quantization=None, dtype=torch.bfloat16, tied=True, raw=raw)
    after = read_back(tmp_path, plain)
    inner, old = (plain["text_config"], raw["text_config"]) if "text_config" in raw else (plain, raw)
    kept = old.keys() - {"torch_dtype", "transformers_version"}
    assert {key: inner[key] for key in kept} == {key: old[key] for key in kept}
    assert plain["torch_dtype"] == plain["dtype"] == "bfloat16"
    for key in before.keys() - {"theirs", "dtype", "torch_dtype", "tie_word_embeddings", "text_config"}:
        assert after[key] == before[key], key
    assert after.get("text_config", after).get("rope_parameters") == (
        before.get("text_config", before).get("rope_parameters")
    )


def test_what_holds_of_the_source_files_alone_is_left_out() -> None:
    raw = {"auto_map": {"AutoConfig": "x.Y"}, "transformers_weights": "other.safetensors", "use_cache": False}
    raw |= {"text_config": {"compression_config": {}, "quantization_config": {}, "auto_map": {}, "x": 1}}
    plain = model_config(LlamaConfig(**raw), quantization=None, dtype=torch.bfloat16, tied=False, raw=raw)
    assert plain["text_config"] == {"x": 1, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert not {"auto_map", "transformers_weights"} & plain.keys()
    assert plain["use_cache"] is False


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({"tokenizer_class": "OwnTokenizer"}, True),
        ({"image_processor_type": "CLIPImageProcessor", "processor_class": "OwnProcessor"}, True),
        ({}, True),
    ],
)
def test_code_is_not_referred_to_where_transformers_has_the_class(
    tmp_path: Path, config: dict[str, str], kept: bool
) -> None:
    path, folder = tmp_path / "tokenizer_config.json", tmp_path / "out"
    folder.mkdir()
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "eos_token": "é"}))
    write_side_files(folder, source_side_files={path.name: path}, config={}, provenance=PROVENANCE, card=CARD)
    written = json.loads((folder / path.name).read_text())
    assert ("auto_map" in written) is kept
    assert written["eos_token"] == "é"
    assert config.items() <= written.items()


def test_templates_keep_their_folder(tmp_path: Path) -> None:
    path, folder = tmp_path / "tool_use.jinja", tmp_path / "out"
    folder.mkdir()
    path.write_text("TOOL")
    name = "additional_chat_templates/tool_use.jinja"
    write_side_files(folder, source_side_files={name: path}, config={}, provenance=PROVENANCE, card=CARD)
    assert (folder / name).read_text() == "TOOL"
    elsewhere = tmp_path / "linked"
    elsewhere.mkdir()
    (elsewhere / "additional_chat_templates").symlink_to(folder)
    with pytest.raises(PlanError, match="is a link"):
        write_side_files(elsewhere, source_side_files={name: path}, config={}, provenance=PROVENANCE, card=CARD)


def test_index_names_every_tensor(tmp_path: Path) -> None:
    write_index(tmp_path, {"b.safetensors": ["y", "x"], "a.safetensors": ["z"]}, 12)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 12}
    assert index["weight_map"] == {"x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors"}


def test_versions_name_what_shapes_the_result() -> None:
    assert versions()["torch"] == torch.__version__
    assert set(versions()) >= {"python", "lilliput", "transformers", "compressed-tensors", "safetensors"}
