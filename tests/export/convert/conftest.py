"""Finished folders to convert, each made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput import api
from lilliput.progress import Quiet

Tiny = Callable[[str], Path]
Written = Callable[..., Path]
Made = Callable[..., Path]
OPTIONS = "options: {search: minmax, importance: false}"  # which need no text


@pytest.fixture(scope="session")
def written() -> Written:
    """A function: compresses a folder by steps, each the target of `rtn` perhaps with more after it, or YAML."""

    def write(folder: Path, out: Path, *steps: str, layout: str = "lilliput") -> Path:
        whole = [x if x.startswith("{method") else "{method: rtn, target: {" + x + "}, " + OPTIONS + "}" for x in steps]
        recipe = f"export: {layout}\nsteps:\n" + "".join(f"  - {step}\n" for step in whole)
        options: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0}
        api.compress(folder, out, recipe=recipe, progress=Quiet(), **options)
        return out

    return write


@pytest.fixture(scope="session")
def made(tiny: Tiny, written: Written, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A function: as `written`, of a tiny model by its name, each folder once. Read it only."""
    known: dict[tuple[str, ...], Path] = {}

    def make(name: str, *steps: str, layout: str = "lilliput") -> Path:
        key = (name, layout, *steps)
        if key not in known:
            known[key] = written(tiny(name), tmp_path_factory.mktemp("made") / "out", *steps, layout=layout)
        return known[key]

    return make


@pytest.fixture(scope="session")
def ordered(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compressed-tensors (qwen2) that has the inputs of one linear in groups by an order of their own."""
    folder = tmp_path_factory.mktemp("ordered") / "out"
    shutil.copytree(made("qwen2", "bits: 4, group_size: 32", layout="compressed-tensors"), folder)
    held = load_file(folder / "model.safetensors")
    order = torch.arange(64, dtype=torch.int32) // 32
    held["model.layers.0.mlp.up_proj.weight_g_idx"] = order[torch.randperm(64)]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
