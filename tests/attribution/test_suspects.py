import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lilliput
from lilliput.attribution import suspects

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where folders are kept that one test has made and others copy."""
    return tmp_path_factory.mktemp("sound")


@pytest.fixture
def compressed(sound: Path, llama, text) -> Callable[..., tuple[Path, Path]]:
    """The original and a folder made of it, which the caller may change."""

    def make(recipe: str, *settings: str) -> tuple[Path, Path]:
        base = llama()
        kept = sound / " ".join((recipe, *settings))
        if not kept.exists():
            lilliput.compress(
                base,
                kept,
                recipe=recipe,
                settings=settings,
                data=str(text),
                samples=4,
                tokens=64,
                eval_windows=0,
                dtype="float32",
            )
        return base, Path(shutil.copytree(kept, base.with_name(f"{recipe}-out")))

    return make


RECIPES = [
    ("gptq", ("gptq.bits=4", "gptq.group_size=32")),
    ("w4-asym", ("gptq.group_size=32",)),
    ("rtn", ("rtn.bits=3", "rtn.group_size=32")),
]


@pytest.mark.parametrize(("recipe", "settings"), RECIPES)
def test_nothing_is_suspected_of_a_sound_model(compressed, recipe, settings) -> None:
    base, out = compressed(recipe, *settings)
    assert suspects(out, base) == ()


@pytest.mark.parametrize(("recipe", "settings"), RECIPES)
@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_doubled_scale_is_caught_and_named(compressed, change, recipe, settings, linear) -> None:
    base, out = compressed(recipe, *settings)
    name = f"model.layers.3.{linear}.weight_scale"
    change(out, name, lambda scale: scale * 2)
    found = suspects(out, base)
    assert [x.tensor for x in found] == [name]
    assert found[0].factor == pytest.approx(2.0, rel=0.05)
    assert "times the original's" in found[0].reason


@pytest.mark.parametrize("damage", ["scale", "codes"])
def test_few_damaged_rows_are_found(compressed, change, damage) -> None:
    base, out = compressed("gptq", "gptq.bits=4", "gptq.group_size=32")
    name = "model.layers.2.mlp.up_proj.weight_packed"

    def break_rows(stored: torch.Tensor) -> torch.Tensor:
        stored = stored.clone()
        stored[[4, 7]] = 2 * stored[[4, 7]] if damage == "scale" else stored[[7, 4]]
        return stored

    change(out, name.replace("_packed", "_scale") if damage == "scale" else name, break_rows)
    found = suspects(out, base)
    assert [x.tensor for x in found] == [name]
    assert found[0].reason.startswith("2 rows of it" if damage == "scale" else "its relative error")


def test_codes_that_are_damaged_are_named(compressed, change) -> None:
    base, out = compressed("gptq", "gptq.bits=4", "gptq.group_size=32")
    name = "model.layers.2.mlp.gate_proj.weight_packed"
    change(out, name, lambda codes: codes.flip(0))
    found = suspects(out, base)
    assert [x.tensor for x in found] == [name]
    assert "error" in found[0].reason


def test_a_norm_that_is_damaged_is_named(compressed, change) -> None:
    base, out = compressed("gptq", "gptq.bits=4", "gptq.group_size=32")
    name = "model.layers.4.input_layernorm.weight"
    change(out, name, lambda gain: gain * 3)
    assert name in [x.tensor for x in suspects(out, base)]


@pytest.mark.parametrize(("recipe", "settings"), RECIPES)
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_one_damaged_entry_of_a_norm_is_found(compressed, change, recipe, settings, norm) -> None:
    base, out = compressed(recipe, *settings)
    name = f"model.layers.1.{norm}.weight"

    def break_entry(gain: torch.Tensor) -> torch.Tensor:
        gain = gain.clone()
        gain[5] *= 3
        return gain

    change(out, name, break_entry)
    (found,) = suspects(out, base)
    assert found.tensor == name
    assert found.reason.startswith("entry 5 of it, off by a factor of up to ")
