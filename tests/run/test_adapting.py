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
from typer.testing import CliRunner

from lilliput import api
from lilliput.cli.main import app
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

    out = run(folder, tmp_path / "out", "lora-recover", teacher=tiny("llama"), settings=[*FEW, "lora.start=loftq"])
    old, new = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(x, new[n]) for n, x in old.items())
    plan = api.plan(folder, recipe="lora-recover", settings=FEW, teacher=tiny("llama"), samples=4, tokens=16)
    files = sum(x.stat().st_size for x in out.rglob("*") if x.is_file())
    assert 0.95 * plan.folder_bytes < files <= plan.folder_bytes
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

    def step(self: Whole, samples: Any, now: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(self, samples, now)

    monkeypatch.setattr(Whole, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "again", "lora-recover", teacher=tiny("llama"), settings=[*FEW, "lora.start=loftq"])
    run(folder, tmp_path / "again", "lora-recover", teacher=tiny("llama"), settings=[*FEW, "lora.start=loftq"])
    assert calls == 6  # three steps, the killed one, and the two after the saved state
    for path in (out / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "adapter" / path.name).read_bytes()

    weights = tmp_path / "again" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert api.verify(tmp_path / "again").problems == (
        "adapter/adapter_model.safetensors is not what was written: its hash differs",
    )
    weights.write_bytes(whole[:-8])
    assert any("truncated or damaged" in x for x in api.verify(tmp_path / "again").problems)
    weights.unlink()
    assert any("adapter_model.safetensors is missing" in x for x in api.verify(tmp_path / "again").problems)


def test_figures_are_those_with_the_adapter(folder: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def compressed(recipe: str, out: Path, few: list[str]) -> Any:
        return api.compress(
            folder,
            out,
            recipe=recipe,
            settings=few,
            teacher=tiny("llama"),
            samples=4,
            tokens=16,
            device="cpu",
            dtype="float32",
            eval_data="docs",
            eval_windows=2,
            progress=Quiet(),
        ).evaluation

    found = compressed("lora-recover", tmp_path / "out", [*FEW, "lora.start=loftq"])
    measured = {"data": "docs", "windows": 2}
    alone = api.evaluate(tmp_path / "out", tiny("llama"), **measured)
    beside = api.evaluate(tmp_path / "out", tiny("llama"), adapter=tmp_path / "out" / "adapter", **measured)
    assert any("with the adapter" in x for x in found.notes)
    assert found.texts[0].kl.value == beside.texts[0].kl.value
    assert beside.texts[0].kl.value < 0.9 * alone.texts[0].kl.value
    line = [str(tmp_path / "out"), "--against", str(tiny("llama")), "--adapter", str(tmp_path / "out" / "adapter")]
    done = CliRunner().invoke(app, ["eval", *line, "--data", "docs", "--windows", "2", "--json"])
    assert json.loads(done.stdout)["quality"]["data"][0]["kl"]["value"] == beside.texts[0].kl.value
    assert CliRunner().invoke(app, ["eval", *line, "--windows", "2", "--speed"]).exit_code == 2
    prompt = "steps:\n- {method: prompt-tuning, options: {data: docs, tokens: 16, steps: 1, length: 4}}\n"
    bare = compressed(prompt, tmp_path / "prompt", [])
    assert bare.texts[0].kl.value == alone.texts[0].kl.value
    assert any("without its adapter" in x for x in bare.notes)


def test_the_original_has_to_be_known_and_of_the_same_tokens(
    folder: Path, tiny: Callable[[str], Path], noisy: Callable[[int], Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="name the original with --teacher"):
        run(folder, tmp_path / "out", "lora-recover", settings=FEW)
    with pytest.raises(PlanError, match="48 tokens, and the student 512"):
        run(folder, tmp_path / "out", "lora-recover", settings=FEW, teacher=noisy(0))
    with pytest.raises(PlanError, match="had in the original"):
        run(folder, tmp_path / "out", "lora-recover", settings=[*FEW, "lora.start=loftq"], teacher=tiny("qwen2"))


LOFTQ = "{method: lora, target: {rank: 2}, options: {start: loftq, data: docs, steps: 1, tokens: 16}}"
RTN = "{method: rtn, target: {bits: 4, group_size: 32}}"


@pytest.mark.parametrize("before", ["{method: awq}", "{method: hadamard}", "{method: flap}"])
def test_what_was_folded_or_edited_has_no_original_to_begin_at(
    tiny: Callable[[str], Path], tmp_path: Path, before: str
) -> None:
    with pytest.raises(PlanError, match=r"has left others in their place: set its option `start` to zero"):
        api.plan(tiny("llama"), recipe=f"steps:\n- {before}\n- {RTN}\n- {LOFTQ}\n", samples=2, tokens=16)


def test_nor_has_a_folder_whose_recipe_did(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folded = run(tiny("llama"), tmp_path / "folded", f"steps:\n- {{method: awq}}\n- {RTN}\n")
    with pytest.raises(PlanError, match=r"awq in .* has left others in their place"):
        api.plan(folded, recipe=f"steps:\n- {LOFTQ}\n", teacher=tiny("llama"), samples=2, tokens=16)


def test_a_container_does_not_lose_an_adapter(folder: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = run(folder, tmp_path / "out", "lora-recover", teacher=tiny("llama"), settings=FEW)
    with pytest.raises(PlanError, match=r"has an adapter in adapter/.*lilliput merge"):
        api.convert(out, tmp_path / "plain", to="compressed-tensors")
    plan = api.plan(out, recipe="lora-recover", teacher=tiny("llama"), settings=FEW, samples=2, tokens=16)
    assert any("is not taken along" in x for x in plan.notes)


def test_positions_in_front_of_the_text_are_counted(tiny: Callable[[str], Path]) -> None:
    recipe = "steps:\n- {method: prompt-tuning, options: {data: docs, tokens: 250, length: 16}}\n"
    with pytest.raises(
        PlanError, match=r"250 tokens after 16 positions .* 256: set its option `tokens` to at most 240"
    ):
        api.plan(tiny("gpt2"), recipe=recipe, samples=2, tokens=16)
