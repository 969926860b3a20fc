"""A small folder of 4-bit codes, adapters trained for it, and what stock peft makes of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import lilliput
from lilliput import api
from lilliput.progress import Quiet

RTN = "{method: rtn, target: {bits: 4, group_size: 32}}"
FEW = "steps: 3, tokens: 16, batch: 2, lr: 0.01, objective: cross-entropy, data: docs"
Tiny = Callable[[str], Path]


def compressed(model: Path, out: Path, *steps: str, export: str = "lilliput", **more: Any) -> Path:
    """The folder `out` of a recipe."""
    recipe = "steps:\n" + "\n".join(f"  - {x}" for x in steps) + f"\nexport: {export}"
    given = {"samples": 4, "tokens": 16, "device": "cpu", "dtype": "float32", "eval_windows": 0} | more
    api.compress(model, out, recipe=recipe, progress=Quiet(), **given)
    return out


@dataclass(frozen=True)
class Seen:
    """Logits of one text: of the folder alone, and with its adapter as stock peft loads it."""

    base: Tensor
    adapted: Tensor
    model: Any


def ids(rows: int = 2, tokens: int = 12) -> Tensor:
    """A text."""
    return torch.randint(1, 512, (rows, tokens), generator=torch.Generator().manual_seed(0))


def look(folder: Path, adapter: str = "adapter", **more: Any) -> Seen:
    """What stock transformers and peft make of a folder and its adapter."""
    import peft

    lilliput.load  # noqa: B018  the native layout is known from here on
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        base = model(ids()).logits
        adapted = peft.PeftModel.from_pretrained(model, folder / adapter)
        return Seen(base, adapted(ids(), **more).logits, adapted)


@pytest.fixture(scope="session")
def coded(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model in 4 bits, by name. Read it only."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = compressed(tiny(name), tmp_path_factory.mktemp("coded") / name, RTN)
        return made[name]

    return make


@pytest.fixture
def trained(coded: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Trains a method's adapter for a coded folder: the new folder."""

    def make(method: str, name: str = "llama", out: str = "out", options: str = "", step: str = "", **more: Any) -> Path:
        chosen = f"{{{FEW}{', ' if options else ''}{options}}}"
        text = f"{{method: {method}, {step}{', ' if step else ''}options: {chosen}}}"
        return compressed(coded(name), tmp_path / out, text, **more)

    return make


@pytest.fixture
def seen() -> Callable[..., Seen]:
    return look
