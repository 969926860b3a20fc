"""verify finds what can happen to a folder after it was written, and nothing where nothing happened."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput.errors import SourceError
from lilliput.export import get
from lilliput.export.card import Card
from lilliput.export.folder import write_index, write_side_files
from lilliput.export.provenance import NAME, Provenance, TensorRow, sha256
from lilliput.export.verify import verify

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LINEAR = "model.layers.1.mlp.up_proj"


def written(capabilities: ModuleType, place: Path, layout: str) -> Path:
    """A folder in two shards as `compress` writes it."""
    case = capabilities.Case("plain", "llama", 4, layout == "compressed-tensors", 32)
    _, folder, _ = capabilities.write(case, get(layout), place)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {SHARDS[0]: names[: len(names) // 2], SHARDS[1]: names[len(names) // 2 :]}
    for file, held in shards.items():
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
    write_index(folder, shards, sum(t.nbytes for t in tensors.values()))
    rows = tuple(
        TensorRow(n, file, str(tensors[n].dtype).removeprefix("torch."), tuple(tensors[n].shape), sha256(tensors[n]))
        for file, held in shards.items()
        for n in held
    )
    write_side_files(
        folder,
        source_side_files={},
        config=json.loads((folder / "config.json").read_text()),
        provenance=Provenance("m", "f", layout, {}, "p", None, None, {}, tensors=rows),
        card=Card("t", "m", layout, ""),
    )
    return Path(folder)


@pytest.fixture(scope="module")
def template(capabilities: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(capabilities, tmp_path_factory.mktemp("verify"), "compressed-tensors")


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "model"))


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return Path(folder / index["weight_map"][name])


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite the shard that holds a tensor, with the tensor edited or, for None, left out."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    edited = edit(tensors.pop(name))
    save_file(tensors | ({} if edited is None else {name: edited}), path, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["compressed-tensors", "lilliput"])
def test_a_written_folder_is_whole(capabilities: ModuleType, tmp_path: Path, layout: str) -> None:
    found = verify(written(capabilities, tmp_path, layout))
    assert found.problems == ()
    assert found.whole
    assert found.notes == ()
    what = [row.what for row in found.rows]
    assert what == ["no pickles", "config.json", "weight files", "tensors", "finite", "hashes", "engine"]
    assert json.loads(json.dumps(found.to_json()))["whole"] is True


def flip_a_byte(folder: Path) -> None:
    path = folder / SHARDS[1]
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


def truncate(folder: Path) -> None:
    path = folder / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-8])


def nan_scale(folder: Path) -> None:
    change(folder, f"{LINEAR}.weight_scale", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))


def same_bytes_other_dtype(folder: Path) -> None:
    """A header that tells of another dtype over unchanged bytes."""
    path = shard_of(folder, f"{LINEAR}.weight_scale")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].replace(b'{"dtype":"F16"', b'{"dtype":"I16"')
    path.write_bytes(raw[:8] + header + raw[8 + length :])


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (flip_a_byte, "hash differs"),
    (truncate, "truncated or damaged"),
    (nan_scale, rf"{LINEAR}.weight_scale in .* holds 2 values that are NaN"),
    (same_bytes_other_dtype, "is int16"),
    (lambda f: (f / SHARDS[0]).unlink(), "lacks 1 of 2 shards"),
    (lambda f: change(f, f"{LINEAR}.weight_packed", lambda t: t.T.contiguous()), r"is int32 \[8, 128\]"),
    (lambda f: change(f, f"{LINEAR}.weight_scale", lambda t: None), "lacks tensor"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "config.json").write_text("{"), "cannot read config.json"),
    (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "is a pickle"),
    (lambda f: (f / NAME).write_text("{"), "damaged"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_found(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    found = verify(folder)
    assert not found.whole
    assert any(re.search(message, problem) for problem in found.problems), found.problems


def without_provenance(folder: Path, damage: Callable[[], object]) -> tuple[str, ...]:
    (folder / NAME).unlink()
    damage()
    found = verify(folder)
    assert any("lilliput.json is missing" in note for note in found.notes)
    return found.problems


def test_a_folder_without_provenance_is_checked_with_a_note(folder: Path) -> None:
    assert without_provenance(folder, lambda: None) == ()


def test_a_wrong_shape_is_found_without_provenance(folder: Path) -> None:
    name = f"{LINEAR}.weight_packed"
    problems = without_provenance(folder, lambda: change(folder, name, lambda t: t[:-1].contiguous()))
    assert any("up_proj" in problem or "transformers" in problem for problem in problems), problems


def test_a_config_for_another_model_is_found(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    problems = verify(folder).problems
    assert any("layers.2" in problem for problem in problems), problems


def test_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder"):
        verify(tmp_path / "nowhere")
