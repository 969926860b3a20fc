"""Side files, config and index of a written folder, and the size of a safetensors file to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Gemma3Config, LlamaConfig

from lilliput.errors import PlanError
from lilliput.export.folder import model_config, safetensors_bytes, write_index, write_side_files
from lilliput.report.card import Card, Figure
from lilliput.report.provenance import DataRow, LinearRow, Provenance, TensorRow, read, versions

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
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
def test_size_is_that_of_the_written_file(tmp_path: Path, count: int, metadata: dict[str, str] | None) -> None:
    rng = torch.Generator().manual_seed(count)
    tensors = {}
    for i in range(count):
        shape = torch.randint(0, 9, (int(torch.randint(0, 4, (), generator=rng)),), generator=rng).tolist()
        tensors[f"{'aé.'[i % 3]}{i * 37 % 11}.{i}"] = torch.zeros(shape, dtype=DTYPES[i * 5 % len(DTYPES)])
    save_file(tensors, tmp_path / "x", metadata=metadata)
    described = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    assert safetensors_bytes(described, metadata) == (tmp_path / "x").stat().st_size


def test_writes_everything_and_copies_the_rest(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "config.json"):
        (source / name).write_text(f"source {name}")
    config = model_config(LlamaConfig(num_hidden_layers=1), quantization={"quant_method": "x"}, dtype=torch.bfloat16,
                          tied=False, architecture="LlamaForCausalLM")  # fmt: skip
    write_side_files(
        folder, source_side_files=sorted(source.iterdir()), config=config, provenance=PROVENANCE, card=CARD
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
        write_side_files(folder, source_side_files=[], config={}, provenance=PROVENANCE, card=CARD)
    assert outside.read_text() == "mine"


def test_a_wrapper_tells_its_language_model_too() -> None:
    config = Gemma3Config(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 1})
    config.quantization_config = {"quant_method": "old"}
    plain = model_config(config, quantization=None, dtype=torch.float32, tied=True)
    assert plain["text_config"]["tie_word_embeddings"] is True
    assert plain["text_config"]["dtype"] == "float32"
    assert "quantization_config" not in plain


def test_index_names_every_tensor(tmp_path: Path) -> None:
    write_index(tmp_path, {"b.safetensors": ["y", "x"], "a.safetensors": ["z"]}, 12)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 12}
    assert index["weight_map"] == {"x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors"}


def test_versions_name_what_shapes_the_result() -> None:
    assert versions()["torch"] == torch.__version__
    assert set(versions()) >= {"python", "lilliput", "transformers", "compressed-tensors", "safetensors"}
