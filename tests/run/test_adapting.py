"""An adapter beside a finished folder, end to end: the folder stays, the record knows, a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from lilliput import api
from lilliput.errors import PlanError
from lilliput.progress import Quiet

VALUES = ("steps=4", "tokens=16", "batch=2", "save=2", "rank=24", "data=docs", "lr=0.001")
FEW = [f"lora.{x}" for x in VALUES]


def run(model: Path, out: Path, recipe: str, **more: Any) -> Path:
    given: dict[str, Any] = {"samples": 4, "tokens": 16, "device": "cpu", "dtype": "float32", "eval_windows": 0}
    api.compress(model, out, recipe=recipe, progress=Quiet(), **(given | more))
    return out


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In an engine's layout."""
    out = tmp_path_factory.mktemp("adapting") / "w4"
    return run(tiny("llama"), out, "steps:\n- {method: rtn, target: {bits: 4, group_size: 32}}\n")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_recover_leaves_the_folder_and_regains_some_of_what_it_lost(
    folder: Path, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    out = run(folder, tmp_path / "out", "lora-recover", teacher=tiny("llama"), settings=FEW)
    old, new = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(x, new[n]) for n, x in old.items())
    assert api.verify(out).whole
    (row,) = json.loads((out / "lilliput.json").read_text())["training"]
    assert row["method"] == "lora"
    assert len(row["losses"]) == 4
    ids = torch.randint(1, 512, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(ids).logits
            return found

    auto = tf.AutoModelForCausalLM
    original = logits(auto.from_pretrained(tiny("llama"), dtype=torch.float32))
    base = auto.from_pretrained(out, dtype=torch.float32)
    alone = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, out / "adapter"))
    assert float((adapted - original).norm()) < 0.9 * float((alone - original).norm())

    from lilliput.training.whole import Whole

    real, calls = Whole.step, 0

    def step(self: Whole, samples: Any, number: int) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(self, samples, number)

    monkeypatch.setattr(Whole, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "again", "lora-recover", teacher=tiny("llama"), settings=FEW)
    run(folder, tmp_path / "again", "lora-recover", teacher=tiny("llama"), settings=FEW)
    assert calls == 6  # three steps, the killed one, and the two after the saved state
    for path in (out / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "adapter" / path.name).read_bytes()


def test_the_original_has_to_be_known_and_of_the_same_tokens(
    folder: Path, tiny: Callable[[str], Path], noisy: Callable[[int], Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="name it with --teacher"):
        run(folder, tmp_path / "out", "lora-recover", settings=FEW)
    with pytest.raises(PlanError, match="48 tokens, and the student 512"):
        run(folder, tmp_path / "out", "lora-recover", settings=FEW, teacher=noisy(0))
    with pytest.raises(PlanError, match="has lost of the original"):
        run(folder, tmp_path / "out", "lora-recover", settings=FEW, teacher=tiny("qwen2"))
