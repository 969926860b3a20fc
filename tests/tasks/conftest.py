import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput.tasks.likelihood import Loaded
from lilliput.tasks.run import loaded


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, one a line."""

    def write(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def llama(tiny: Callable[[str], Path]) -> Iterator[Loaded]:
    with loaded(tiny("llama")) as model:
        yield model


@pytest.fixture(scope="session")
def noisy(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama with noise on its weights: another model, the same tokenizer."""
    folder = tmp_path_factory.mktemp("noisy")
    for file in tiny("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder
