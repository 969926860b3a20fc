"""The engine's loader, tried before any work: which layout a model gets, and what is said where one does not load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from compressed_tensors.compressors.pack_quantized import helpers

from lilliput import api
from lilliput.anatomy.wrapper import opener
from lilliput.errors import PlanError
from lilliput.model.stored import open_model
from lilliput.plan.plan import Plan
from lilliput.progress import Quiet

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "falcon": lambda: tf.FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "llama4": lambda: tf.Llama4TextConfig(
        **SIZES, num_local_experts=4, head_dim=16, intermediate_size_mlp=64, interleave_moe_layer_step=2
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    ),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4),
    "narrow": lambda: tf.MixtralConfig(**{**SIZES, "hidden_size": 40, "head_dim": 20}, num_local_experts=4),
    "llava": lambda: tf.LlavaConfig(
        text_config=tf.LlamaConfig(**SIZES),
        vision_config=tf.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=14,
        ),
        image_token_index=63,
    ),
}  # fmt: skip
BLIND = ("rtn.importance=false", "rtn.search=minmax")  # these models have no tokenizer
ROOM: dict[str, Any] = {"samples": 2, "tokens": 16, "device": "cpu", "dtype": "float32"}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: tf.PreTrainedTokenizerFast) -> Make:
    root = tmp_path_factory.mktemp("rehearsal")

    def make(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            config = CONFIGS[name]()
            opener(config).from_config(config).float().save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        return root / name

    return make


def plan(model: Path, recipe: str = "rtn", *settings: str) -> Plan:
    return api.plan(model, recipe=recipe, settings=(*BLIND, *settings), **ROOM)


def with_export(model: Path, layout: str, tmp_path: Path, exclude: str = "[lm_head, router]") -> Plan:
    recipe = tmp_path / "recipe.yaml"
    step = f"{{method: rtn, target: {{bits: 4}}, where: {{exclude: {exclude}}}}}"
    recipe.write_text(f"export: {layout}\nsteps: [{step}]\n")
    return api.plan(model, recipe=recipe, settings=BLIND, **ROOM)


def test_a_plain_model_gets_the_engines_own_layout(folder: Make) -> None:
    made = plan(folder("llama"))
    assert made.exporter == "compressed-tensors"
    assert made.quantization_config is not None
    assert "dequantize" not in made.quantization_config


@pytest.mark.later
def test_where_the_model_reads_weights_of_packed_linears_they_are_decoded_while_loading(
    folder: Make, tmp_path: Path
) -> None:
    """Falcon's initialization reads `module.weight` of every linear, which a packed one lacks."""
    done = api.compress(
        folder("falcon"), tmp_path / "out", recipe="rtn", settings=BLIND, eval_windows=0,
        progress=Quiet(), **ROOM,
    )  # fmt: skip
    written = json.loads((done.out / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert written["dequantize"] is True
    assert any("decodes the linears in the dtype of the scales" in note for note in done.plan.notes)
    ids = torch.arange(12).unsqueeze(0)
    loaded, info = tf.AutoModelForCausalLM.from_pretrained(done.out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    own = open_model(done.out)
    own.load(own.skeleton.shapes)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, own.skeleton.model(input_ids=ids).logits, rtol=0, atol=1e-3
        )


def test_mixed_schemes_are_not_decoded_while_loading(folder: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    blind = "options: {importance: false, search: minmax}"
    recipe.write_text(
        "steps:\n"
        f"  - {{method: rtn, target: {{bits: 4}}, where: {{include: ['*h_to_4h*']}}, {blind}}}\n"
        f"  - {{method: rtn, target: {{bits: 8}}, where: {{exclude: ['*h_to_4h*', lm_head]}}, {blind}}}\n"
    )
    assert api.plan(folder("falcon"), recipe=recipe, **ROOM).exporter == "lilliput"


def test_experts_that_a_loader_looks_for_one_by_one_take_the_native_layout(folder: Make, tmp_path: Path) -> None:
    assert plan(folder("llama4")).exporter == "lilliput"
    with pytest.raises(PlanError, match=r"finds no '.*experts.*' for Llama4ForCausalLM.*Nearest: export 'lilliput'"):
        with_export(folder("llama4"), "compressed-tensors", tmp_path)


@pytest.mark.later
def test_a_router_is_packed_in_the_native_layout_alone(folder: Make, tmp_path: Path) -> None:
    assert plan(folder("qwen3_moe")).exporter == "compressed-tensors"
    made = plan(folder("qwen3_moe"), "rtn", "rtn.exclude=[]")
    assert made.exporter == "lilliput"
    assert "model.layers.0.mlp.gate.weight_scale" in {x.name for x in made.tensors}
    with pytest.raises(PlanError, match=r"'model.layers.0.mlp.gate' decides which experts.*exclude 'router'"):
        with_export(folder("qwen3_moe"), "compressed-tensors", tmp_path, "[]")


def test_groups_that_an_allocation_may_set_apart_decide_the_layout(folder: Make, tmp_path: Path) -> None:
    """Engines read all experts by one scheme; the plan does not know yet what finequant will decide."""
    assert plan(folder("mixtral"), "finequant").exporter == "lilliput"
    assert plan(folder("llama"), "finequant").exporter == "compressed-tensors"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "export: compressed-tensors\nsteps:\n  - {method: finequant}\n"
        "  - {method: rtn, target: {bits: 4, group_size: 32}, options: {importance: false, search: minmax}}\n"
    )
    with pytest.raises(PlanError, match=r"as step 1 \(finequant\) may decide, .*engines read all experts with one"):
        api.plan(folder("mixtral"), recipe=recipe, **ROOM)


def test_wrappers_that_no_causal_class_opens_are_planned(folder: Make) -> None:
    made = plan(folder("llava"))
    assert made.exporter == "compressed-tensors"
    assert made.quantization_config is not None
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in made.quantization_config["ignore"]


def test_a_rehearsal_says_nothing_to_the_user(folder: Make, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    plan(folder("llama4"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.later
def test_rows_that_end_within_a_word_are_no_finding(folder: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """Without values a loader that decodes takes 40 codes of 3 bits, in 4 words, for 42; and says so at length."""
    capfd.readouterr()
    made = plan(folder("narrow"), "rtn", "rtn.bits=3", "rtn.group_size=channel")
    assert made.exporter == "compressed-tensors"
    assert "WARNING" not in capfd.readouterr().err


def test_a_library_that_packs_otherwise_is_known_before_any_work(folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(codes: torch.Tensor, bits: int) -> torch.Tensor:
        return codes.new_zeros(len(codes), -(-codes.shape[1] // (32 // bits)), dtype=torch.int32)

    monkeypatch.setattr(helpers, "pack_to_int32", older)
    assert plan(folder("llama"), "rtn", "rtn.bits=4").exporter == "compressed-tensors"
    assert plan(folder("llama"), "rtn", "rtn.bits=3").exporter == "lilliput"
