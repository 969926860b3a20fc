"""Folders that converters write."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput import api
from lilliput.cli.convert import CONTAINERS
from lilliput.errors import PlanError
from lilliput.export import convert
from lilliput.export.convert import folder as writing
from lilliput.export.convert.folder import Item
from lilliput.export.provenance import sha256
from lilliput.source import open_source

Made = Callable[..., Path]


def test_a_file_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(12.0).view(4, 3), "a": torch.arange(5, dtype=torch.int32), "c": torch.tensor(2.0)}
    layout = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    b = tensors["b"]
    items = [
        Item({x: layout[x] for x in "ba"}, lambda: zip("bab", (b[:3], tensors["a"], b[3:]), strict=True)),
        Item({"c": layout["c"]}, lambda: [("c", tensors["c"])]),
    ]
    rows = writing.write_weights(tmp_path / "ours.safetensors", items, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert {x.name: x.sha256 for x in rows} == {name: sha256(x) for name, x in tensors.items()}


@pytest.mark.parametrize("piece", [torch.zeros(3, 3), torch.zeros(4, 3).half(), torch.zeros(4, 2)])
def test_tensors_that_are_not_as_laid_out_are_no_file(tmp_path: Path, piece: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="b "):
        writing.write_weights(
            tmp_path / "a", [Item({"b": (torch.float32, (4, 3))}, lambda: [("b", piece)])], {"format": "pt"}
        )


def test_several_files_and_their_index(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made("qwen2", "bits: 4, group_size: 32")
    monkeypatch.setattr(writing, "SHARD", 60_000)
    done = api.convert(source, tmp_path / "out", to="gptq")
    files = sorted(x.name for x in done.out.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert (done.out / file).stat().st_size < 60_000 or len(load_file(done.out / file)) == 1  # an embedding
    ours, theirs = open_source(str(source)), open_source(str(done.out))
    assert set(ours.stored) == set(theirs.stored)
    monkeypatch.undo()
    whole = api.convert(source, tmp_path / "whole", to="gptq")
    held = load_file(whole.out / "model.safetensors")
    for file in files:
        for name, x in load_file(done.out / file).items():
            assert torch.equal(held.pop(name), x)
    assert not held


def test_record_card_and_side_files(made: Made, tmp_path: Path) -> None:
    source = made("qwen2", "bits: 4, group_size: 32")
    done = api.convert(source, tmp_path / "out", to="awq")
    record, before = (json.loads((x / "lilliput.json").read_text()) for x in (done.out, source))
    held = load_file(done.out / "model.safetensors")
    assert {x["name"]: x["sha256"] for x in record["tensors"]} == {name: sha256(x) for name, x in held.items()}
    assert record["layout"] == "awq"
    for key in ("model", "fingerprint", "recipe", "linears"):
        assert record[key] == before[key], key
    card = (done.out / "README.md").read_text()
    assert "from vllm import LLM" in card
    assert "- awq" in card
    assert (done.out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    again = api.convert(source, tmp_path / "again", to="awq")
    for path in done.out.iterdir():
        assert path.read_bytes() == (again.out / path.name).read_bytes(), path.name


def test_a_folder_without_a_record_has_one_then(made: Made, tmp_path: Path) -> None:
    source = made("qwen2", "bits: 4, group_size: 32")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((source / name).read_bytes())
    done = api.convert(bare, tmp_path / "out", to="awq")
    record = json.loads((done.out / "lilliput.json").read_text())
    assert record["model"] == "bare"
    assert {x["format"] for x in record["linears"]} == {"int4 g32 sym"}


def test_converters_are_found_by_listing() -> None:
    assert sorted(convert.discover()) == ["adapter", "awq", "compressed-tensors", "gguf", "gptq", "mlx"]
    assert all(name in CONTAINERS for name in convert.discover())  # what --help says
    with pytest.raises(PlanError, match=r"nothing is converted to 'gtpq'\. Did you mean 'gptq'"):
        convert.get("gtpq")


def test_every_converter_refuses_what_is_there(made: Made, tmp_path: Path) -> None:
    source = made("qwen2", "bits: 4, group_size: 32")
    (tmp_path / "out").write_text("mine")
    for name in convert.discover():
        with pytest.raises(PlanError, match="exists already"):
            api.convert(source, tmp_path / "out", to=name)
    assert (tmp_path / "out").read_text() == "mine"
