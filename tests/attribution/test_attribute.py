from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lilliput
from lilliput.attribution import attribute
from lilliput.errors import DataError
from lilliput.model.stored import open_model


def planted(base: Path, name: str, strength: float) -> Path:
    out = base.with_name("noisy")
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in key:
                here = strength if key == f"{name}.weight" else 0.002
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * here)
    model.save_pretrained(out)
    for file in base.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj", "model.layers.4.self_attn.o_proj"])
def test_planted_damage_gets_the_share(llama, text, name) -> None:
    base = llama()
    found = attribute(planted(base, name, 0.5), base, data=text, windows=2, tokens=64)
    block = int(name.split(".")[2])
    assert found.total_kl > 0.002
    assert found.blocks[block]["share"] >= 0.9
    assert max(row["share"] for row in found.blocks if row["block"] != block) < 0.1
    worst = max(found.linears, key=lambda row: row["share"])
    assert worst["name"] == name
    assert worst["exact"]
    assert worst["share"] >= 0.9
    assert worst["weight_error"] == pytest.approx(0.5, rel=0.05)
    assert worst["snr_db"] == pytest.approx(6.0, abs=0.5)
    assert found.to_json()["suspects"][0]["linear"] == name


def test_a_model_against_itself_lost_nothing(llama, text) -> None:
    base = llama()
    found = attribute(base, base, data=text, windows=2, tokens=64)
    assert found.total_kl == 0.0
    assert all(row["share"] == 0.0 and row["output_error"] == 0.0 for row in found.blocks)
    assert found.suspects == ()


def test_restoring_is_what_it_says(llama, text) -> None:
    """The KL that is left for a restored block equals that of a model saved with the block put back."""
    base = llama()
    noisy = planted(base, "model.layers.1.mlp.up_proj", 0.3)
    found = attribute(noisy, base, data=text, windows=2, tokens=64)
    model, original = (AutoModelForCausalLM.from_pretrained(x) for x in (noisy, base))
    model.model.layers[1].load_state_dict(original.model.layers[1].state_dict())
    restored = noisy.with_name("restored")
    model.save_pretrained(restored)
    for file in base.glob("tokenizer*"):
        (restored / file.name).write_bytes(file.read_bytes())
    left = lilliput.evaluate(restored, base, data=str(text), windows=2, tokens=64).kl
    whole = lilliput.evaluate(noisy, base, data=str(text), windows=2, tokens=64).kl
    assert left is not None
    assert whole is not None
    assert found.total_kl == pytest.approx(whole.value, rel=1e-6)
    assert found.blocks[1]["share"] == pytest.approx(1 - left.value / whole.value, abs=1e-6)


@pytest.mark.slow
def test_folds_are_no_errors(llama, text) -> None:
    """AWQ moves scales between tensors: aligned, its weights are about as far off as without it."""
    base = llama()
    errors = {}
    for recipe, settings in (("w4-asym", ()), ("gptq", ("gptq.bits=4", "gptq.symmetric=false"))):
        out = base.with_name(recipe)
        lilliput.compress(
            base,
            out,
            recipe=recipe,
            settings=("gptq.group_size=32", *settings),
            data=str(text),
            samples=4,
            tokens=64,
            eval_windows=0,
            dtype="float32",
        )
        found = attribute(out, base, data=text, windows=2, tokens=64)
        errors[recipe] = max(row["weight_error"] for row in found.linears)
        # Restoring a linear of a folded block takes the folded weight: it gives back something, never a catastrophe.
        exact = [row["share"] for row in found.linears if row["exact"]]
        assert exact
        assert min(exact) > -0.5
    assert errors["w4-asym"] < 1.5 * errors["gptq"]


def test_zeros_and_values_are_told_apart(llama, text) -> None:
    base = llama()
    out = base.with_name("sparse")
    recipe = {"steps": [{"method": "wanda", "target": {"pattern": "2:4"}}]}
    lilliput.compress(
        base,
        out,
        recipe=lilliput.Recipe.model_validate({"name": "s", **recipe}),
        data=str(text),
        samples=4,
        tokens=64,
        eval_windows=0,
        dtype="float32",
    )
    found = attribute(out, base, data=text, windows=2, tokens=64)
    assert [row["name"] for row in found.techniques] == ["zeros (pruning)", "values (quantization)"]
    assert found.techniques[0]["share"] == pytest.approx(1.0, abs=0.02)


def test_turned_coordinates_are_said(llama, text) -> None:
    base = llama()
    out = base.with_name("turned")
    lilliput.compress(
        base, out, recipe="hadamard", data=str(text), samples=4, tokens=64, eval_windows=0, dtype="float32"
    )
    found = attribute(out, base, data=text, windows=2, tokens=64)
    assert "turned" in found.notes[0]
    assert found.suspects == ()
    # Rotated and nothing else: block by block it is the original.
    assert 0 <= found.total_kl < 1e-6
    assert max(row["weight_error"] for row in found.linears) < 1e-5
    assert max(row["output_error"] for row in found.blocks) < 1e-4


def rotated(base: Path, text: Path) -> Path:
    out = base.with_name("rotated")
    steps = [{"method": "hadamard"}, {"method": "rtn", "target": {"bits": 4, "group_size": 32}}]
    recipe = lilliput.Recipe.model_validate({"name": "rotated", "steps": steps})
    lilliput.compress(base, out, recipe=recipe, data=str(text), samples=4, tokens=64, eval_windows=0, dtype="float32")
    return out


def test_a_rotated_model_gets_shares(llama, text, change) -> None:
    """Of the very divergence that an evaluation measures, with the weight errors of rounding to 4 bits."""
    base = llama()
    out = rotated(base, text)
    name = "model.layers.3.mlp.gate_proj"
    change(out, f"{name}.weight_scale", lambda scale: scale * 1.5)
    found = attribute(out, base, data=text, windows=2, tokens=64)
    whole = lilliput.evaluate(out, base, data=str(text), windows=2, tokens=64).kl
    assert whole is not None
    assert found.total_kl == pytest.approx(whole.value, rel=1e-4)
    errors = {row["name"]: row["weight_error"] for row in found.linears}
    assert errors.pop(name) == pytest.approx(0.5, rel=0.15)
    assert 0.03 < min(errors.values()) < max(errors.values()) < 0.15
    shares = [row["share"] for row in found.blocks]
    assert max(shares) == shares[3] > 0.3
    assert [x.linear for x in found.suspects] == [name]


def test_a_head_that_a_rotation_untied_is_no_other_model(tiny, text) -> None:
    base = tiny("llama")
    assert open_model(str(base)).tied
    out = text.with_name("tied")
    recipe = lilliput.Recipe.model_validate({"name": "h", "steps": [{"method": "hadamard"}, {"method": "rtn"}]})
    lilliput.compress(base, out, recipe=recipe, data=str(text), samples=4, tokens=64, eval_windows=0, dtype="float32")
    found = attribute(out, base, data=text, windows=2, tokens=64)
    whole = lilliput.evaluate(out, base, data=str(text), windows=2, tokens=64).kl
    assert whole is not None
    assert found.total_kl == pytest.approx(whole.value, rel=1e-4)
    assert len(found.blocks) == 4


def test_without_a_rotation_to_be_found_no_shares_are_given(llama, text, change) -> None:
    base = llama()
    out = rotated(base, text)
    change(out, "model.embed_tokens.weight", lambda table: table.flip(0))
    found = attribute(out, base, data=text, windows=2, tokens=64)
    assert "shares are not given" in found.notes[0]
    assert found.blocks == ()


def test_models_of_other_tensors_are_refused(llama, tiny, text) -> None:
    with pytest.raises(DataError, match="different tensors"):
        attribute(tiny("gpt2"), llama(), data=text)


def test_a_model_with_fewer_channels_is_refused(llama, text, tmp_path) -> None:
    base, out = llama(), tmp_path / "thin"
    room = {"data": str(text), "samples": 2, "tokens": 64, "eval_windows": 0, "dtype": "float32"}
    lilliput.compress(base, out, recipe="group-magnitude", **room)
    with pytest.raises(DataError, match="other sizes"):
        attribute(out, base, data=text)
