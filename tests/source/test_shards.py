"""Reading safetensors files: exact, unmapped, and plain about what is wrong with a file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lilliput.errors import SourceError
from lilliput.source.shards import INDEX, Shards


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=g),
        "b.weight": torch.randn(3, 4, 5, generator=g).bfloat16(),
        "c": torch.randn(6, generator=g).half(),
        "codes": torch.randint(-8, 8, (4, 4), generator=g, dtype=torch.int8),
        "eighth": torch.randn(4, 4, generator=g).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
    }


def write(folder: Path) -> dict[str, torch.Tensor]:
    values = tensors()
    save_file(values, folder / "model.safetensors")
    return values


def shard(folder: Path) -> dict[str, torch.Tensor]:
    values = tensors()
    names = list(values)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in files.items():
        save_file({x: values[x] for x in held}, folder / file)
    weight_map = {x: file for file, held in files.items() for x in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return values


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bytes, so that every dtype compares."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("make", [write, shard])
def test_every_dtype_comes_back(tmp_path: Path, make: type) -> None:
    values = make(tmp_path)
    reader = Shards(tmp_path)
    assert set(reader.entries) == set(values)
    for name, value in values.items():
        got = reader.read(name)
        assert same(got, value), name
        assert got.is_contiguous()
        assert reader.entries[name].nbytes == value.nbytes
        pieces = list(reader.chunks(name))
        assert b"".join(raw.tobytes() for raw, _ in pieces) == value.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_rows(tmp_path: Path) -> None:
    values = write(tmp_path)
    reader = Shards(tmp_path)
    assert same(reader.read("a.weight", (2, 5)), values["a.weight"][2:5])
    assert same(reader.read("b.weight", (1, 2)), values["b.weight"][1:2])
    assert reader.read("a.weight", (3, 3)).shape == (0, 5)


def test_chunks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.source.reader.CHUNK", 40)
    values = write(tmp_path)
    pieces = [x for _, x in Shards(tmp_path).chunks("a.weight")]
    assert [len(x) for x in pieces] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(pieces), values["a.weight"])


def test_nothing_stays_mapped_or_open(tmp_path: Path) -> None:
    write(tmp_path)
    reader = Shards(tmp_path)
    for name in reader.entries:
        reader.read(name)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not any(str(tmp_path) in os.path.realpath(x) for x in Path("/proc/self/fd").iterdir())


def test_symlinks_out_of_the_folder(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    values = write(blobs)
    (folder / "model.safetensors").symlink_to(blobs / "model.safetensors")
    assert same(Shards(folder).read("a.weight"), values["a.weight"])


def header(entries: object, data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2]}
BROKEN = {
    "data cut": lambda raw: raw[:-3],
    "header cut": lambda raw: raw[:30],
    "length cut": lambda raw: raw[:5],
    "empty": lambda raw: b"",
    "too long": lambda raw: raw + b"xx",
    "a web page": lambda raw: b"<html>not found, and long enough</html>",
    "git lfs pointer": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "overlap": lambda raw: header(
        {"x": {**F32, "data_offsets": [0, 8]}, "y": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12
    ),
    "out of range": lambda raw: header({"x": {**F32, "data_offsets": [0, 8]}}, b"\0" * 4),
    "hole": lambda raw: header({"x": {**F32, "data_offsets": [8, 16]}}, b"\0" * 16),
    "size against shape": lambda raw: header({"x": {**F32, "data_offsets": [0, 12]}}, b"\0" * 12),
    "enormous header": lambda raw: struct.pack("<Q", 1 << 60) + raw[8:],
    "not json": lambda raw: struct.pack("<Q", 20) + b"x" * 40,
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("make", [write, shard])
def test_a_broken_file_is_named(tmp_path: Path, kind: str, make: type) -> None:
    make(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(BROKEN[kind](file.read_bytes()))
    with pytest.raises(SourceError, match=f"{file.name}.*download it again"):
        Shards(tmp_path)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    write(tmp_path)
    reader = Shards(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(SourceError, match=r"model\.safetensors ends .* early"):
        reader.read("a.weight")


def test_missing_shard(tmp_path: Path) -> None:
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of 2 shards: model-00002-of-00002\.safetensors"):
        Shards(tmp_path)


def test_missing_index(tmp_path: Path) -> None:
    shard(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(SourceError, match=INDEX):
        Shards(tmp_path)


def test_index_promises_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    shard(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"00001-of-00002\.safetensors lacks tensor ghost"):
        Shards(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    shard(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(SourceError, match="not an index"):
        Shards(tmp_path)


def test_index_may_not_leave_the_folder(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "../secret.safetensors"}}))
    with pytest.raises(SourceError, match="outside its folder"):
        Shards(folder)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin.*save_pretrained\('NEW'"):
        Shards(tmp_path)


def test_no_weights_and_too_many(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="contains no weights"):
        Shards(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    assert set(Shards(tmp_path).entries) == {"x"}
    save_file({"x": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(SourceError, match="neither"):
        Shards(tmp_path)


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """As transformers chooses: the shards may be those of an earlier save."""
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    old = "model-00001-of-00001.safetensors"
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / old)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": old}}))
    assert torch.equal(Shards(tmp_path).read("a.weight"), torch.ones(2, 2))
    (tmp_path / old).unlink()
    assert torch.equal(Shards(tmp_path).read("a.weight"), torch.ones(2, 2))


def test_what_the_config_names_goes_before_all(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "own.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "other.safetensors"}}))
    for named in ("other.safetensors", "own.safetensors.index.json"):
        reader = Shards(tmp_path, named)
        assert torch.equal(reader.read("a.weight"), torch.zeros(2, 2))
        assert reader.chosen.name == named


@pytest.mark.parametrize("named", ["missing.safetensors", "pytorch_model.bin", "../model.safetensors"])
def test_a_named_file_that_cannot_be_read(tmp_path: Path, named: str) -> None:
    write(tmp_path)
    with pytest.raises(SourceError, match=rf"config\.json names '{named}' as transformers_weights"):
        Shards(tmp_path, named)
