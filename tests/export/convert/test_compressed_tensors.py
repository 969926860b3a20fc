"""compressed-tensors from a native folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.errors import PlanError, SourceError
from lilliput.export.convert import compressed_tensors
from lilliput.export.engine import Look
from lilliput.source import open_source

Made = Callable[..., Path]
ASYM = "bits: 4, group_size: 32, symmetric: false"


def entry(folder: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return plain


def same(ours: Path, theirs: Path) -> None:
    """The same tensors by our own reader, and a folder that transformers opens to the same logits."""
    first, second = open_source(str(ours)), open_source(str(theirs))
    assert set(first.stored) == set(second.stored)
    for name in first.stored:
        assert torch.equal(first.read(name), second.read(name)), name
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32)(ids).logits for x in (ours, theirs))
    assert float((one - two).abs().max()) < 1e-3 * float(one.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "steps"), [
    ("llama", ("bits: 4, group_size: 32",)),
    ("qwen2", (ASYM,)),
    pytest.param("qwen2", ("bits: 8, group_size: tensor}, where: {include: ['*down_proj']",
                           "bits: 3, group_size: channel}, where: {exclude: ['*down_proj']"), marks=pytest.mark.later),
])  # fmt: skip
def test_values_are_those_of_the_folder(made: Made, tmp_path: Path, name: str, steps: tuple[str, ...]) -> None:
    folder = made(name, *steps)
    done = api.convert(folder, tmp_path / "out", to="compressed-tensors")
    same(folder, done.out)
    assert entry(done.out)["quant_method"] == "compressed-tensors"
    assert done.bytes == sum(x.stat().st_size for x in done.out.iterdir())
    assert sum(done.types.values()) < done.bytes
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out"]


@pytest.mark.filterwarnings("ignore")
def test_it_is_what_compress_writes(made: Made, tmp_path: Path) -> None:
    """Byte for byte, and as whole."""
    done = api.convert(made("qwen2", "bits: 4, group_size: 32"), tmp_path / "out", to="compressed-tensors")
    other = made("qwen2", "bits: 4, group_size: 32", layout="compressed-tensors")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (done.out / name).read_bytes() == (other / name).read_bytes(), name
    assert api.verify(done.out).whole
    provenance = json.loads((done.out / "lilliput.json").read_text())
    assert provenance["layout"] == "compressed-tensors"
    assert provenance["recipe"] == json.loads((other / "lilliput.json").read_text())["recipe"] | {"export": "lilliput"}


@pytest.mark.filterwarnings("ignore")
def test_a_form_that_the_engine_takes_is_found_or_none(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def look(folder: Path, answers: tuple[Look, ...]) -> Look:
        asked.append(entry(folder).get("dequantize", False))
        return answers[len(asked) - 1]

    bad = Look("engine", ("a block differs",))
    folder = made("qwen2", "bits: 4, group_size: 32")
    monkeypatch.setattr(compressed_tensors, "look", lambda x: look(x, (bad, Look("engine"))))
    done = api.convert(folder, tmp_path / "out", to="compressed-tensors")
    assert asked == [False, True]
    assert entry(done.out)["dequantize"] is True
    asked.clear()
    monkeypatch.setattr(compressed_tensors, "look", lambda x: look(x, (bad, bad)))
    with pytest.raises(PlanError, match="a block differs"):
        api.convert(folder, tmp_path / "other", to="compressed-tensors")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("steps", "says"), [
    (("format: nf4",), "becomes nf4 g64|none of its linears is quantized to integers"),
    (("bits: 4, group_size: 48",), "groups of 48 do not divide the .* inputs"),
    (("bits: 4, group_size: 32", "bits: 4, group_size: 32}, where: {include: [embed]"), "is an embedding"),
])  # fmt: skip
def test_what_it_cannot_hold_is_named(made: Made, tmp_path: Path, steps: tuple[str, ...], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        api.convert(made("qwen2", *steps), tmp_path / "out", to="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_bad_folders_and_outputs(made: Made, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    there = made("qwen2", "bits: 4, group_size: 32", layout="compressed-tensors")
    with pytest.raises(PlanError, match="is a folder of compressed-tensors already"):
        api.convert(there, tmp_path / "out", to="compressed-tensors")
    with pytest.raises(PlanError, match="none of its linears is quantized"):
        api.convert(tiny("qwen2"), tmp_path / "out", to="compressed-tensors")
    with pytest.raises(PlanError, match="exists already"):
        api.convert(made("qwen2", "bits: 4, group_size: 32"), there, to="compressed-tensors")
    with pytest.raises(PlanError, match="does not exist"):
        api.convert(made("qwen2", "bits: 4, group_size: 32"), tmp_path / "a" / "b", to="compressed-tensors")
    with pytest.raises(SourceError, match="no file or folder"):
        api.convert(tmp_path / "none", tmp_path / "out", to="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_what_a_killed_call_has_left_is_taken_away(made: Made, tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "model.safetensors").write_text("half")
    api.convert(made("qwen2", "bits: 4, group_size: 32"), tmp_path / "out", to="compressed-tensors")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out"]
    shutil.rmtree(tmp_path / "out")
