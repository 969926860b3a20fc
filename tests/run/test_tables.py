"""Compressed embeddings and heads: what is written is what the engine and our own reader compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from lilliput import api
from lilliput.errors import PlanError
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.run import tables
from lilliput.runtime.linear import ChunkedLinear, LookedUp

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32"}
RUN: dict[str, Any] = {**ROOM, "eval_windows": 0, "progress": Quiet()}


def recipe(method: str, target: str, include: str, block: str = "bits: 4, group_size: 32") -> str:
    return (
        f"steps:\n- {{method: rtn, target: {{{block}}}}}\n"
        f"- {{method: {method}, target: {{{target}}}, where: {{include: [{include}]}}}}\n"
    )


def read(folder: Path) -> dict[str, torch.Tensor]:
    model = open_model(str(folder))
    return {name: model.read(name).float() for name in model.skeleton.shapes}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("target", ["bits: 8, group_size: channel", "bits: 3, group_size: 32, symmetric: false"])
def test_engine_and_reader_agree(tiny: Tiny, tmp_path: Path, kind: str, target: str) -> None:
    """Tied and apart, with blocks of every kind: logits of the folder are those of its decoded tensors, exactly."""
    out = tmp_path / "out"
    found = api.compress(tiny(kind), out, recipe=recipe("gptq", target, "embed, lm_head"), **RUN)
    assert found.plan.exporter == "lilliput"
    assert (out / "model.safetensors").stat().st_size == found.plan.bytes
    assert found.engine is not None
    assert not found.engine.problems
    model, plain = api.load(out, dtype=torch.float32), api.load(tiny(kind), dtype=torch.float32)
    held = read(out)
    plain.config.tie_word_embeddings = False
    plain.load_state_dict(held, strict=False)
    if "lm_head.weight" not in held:
        plain.lm_head.weight = plain.get_input_embeddings().weight
    ids = torch.tensor([[5, 500, 7, 7, 0, 261, 262, 500]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert isinstance(model.get_input_embeddings(), LookedUp)
    assert isinstance(model.get_output_embeddings(), ChunkedLinear if kind in ("llama", "gpt2") else nn.Linear)
    assert [x["name"] for x in found.rows][-1] in {"model.embed_tokens", "transformer.wte", "lm_head"}


SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ODD: dict[str, Any] = {
    "scaled": tf.Gemma2Config(**SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16),
    "biased": tf.PhiConfig(**SMALL, intermediate_size=128),
    "projected": tf.OPTConfig(**SMALL, ffn_dim=128, max_position_embeddings=128, word_embed_proj_dim=32),
}


@pytest.mark.parametrize("kind", ODD)
def test_tables_of_unusual_models(tmp_path: Path, kind: str) -> None:
    """An embedding that the model scales, a head with a bias, a table narrower than the residual stream."""
    source = tmp_path / "source"
    tf.AutoModelForCausalLM.from_config(ODD[kind]).save_pretrained(source)
    blind = "options: {importance: false}"
    steps = (
        f"steps:\n- {{method: rtn, target: {{bits: 4, group_size: 32}}, {blind}}}\n"
        f"- {{method: rtn, target: {{bits: 8}}, {blind}, where: {{include: [embed, lm_head]}}}}\n"
    )
    found = api.compress(source, tmp_path / "out", recipe=steps, **RUN)
    assert found.plan.resolved.tables
    assert found.engine is not None
    assert (found.engine.problems, found.engine.error, found.engine.logits) == ((), 0.0, 0.0)


def test_a_tied_table_lies_in_memory_once(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.compress(tiny("llama"), out, recipe=recipe("rtn", "bits: 8", "embed"), **RUN)
    model = api.load(out)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.packed_0.data_ptr() == head.packed_0.data_ptr()
    assert not any("embed" in name or "lm_head" in name for name, _ in model.named_parameters())
    assert len(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)[0]) == 5


def test_rows_are_rounded_as_the_method_rounds_a_linear(tiny: Tiny, tmp_path: Path) -> None:
    """8 bits with a scale a row, against the printed formula: scales to float16, codes exactly."""
    out = tmp_path / "out"
    steps = recipe("rtn", "bits: 8, group_size: channel, scale_dtype: float32", "lm_head").replace(
        "method: rtn, target: {bits: 8", "method: rtn, options: {search: minmax, importance: false}, target: {bits: 8"
    )
    api.compress(tiny("llama"), out, recipe=steps, **RUN)
    weight = read(tiny("llama"))["model.embed_tokens.weight"].double()
    step = weight.abs().amax(1, keepdim=True) / 127
    expected = (weight / step).round().clamp(-128, 127) * step
    assert torch.allclose(read(out)["model.embed_tokens.weight"].double(), expected, rtol=1e-6, atol=1e-9)


def test_gptq_on_a_head_goes_by_what_the_head_reads(tiny: Tiny, tmp_path: Path) -> None:
    """Less error of the logits than rounding has, over the calibration text itself."""
    lost = {}
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        found = api.compress(tiny("qwen2"), out, recipe=recipe(method, "bits: 3, group_size: 32", "lm_head"), **RUN)
        lost[method] = next(x for x in found.rows if x["name"] == "lm_head")["error"]
        assert next(x for x in found.rows if x["name"] == "lm_head")["tokens"] == 4 * 32
    assert lost["gptq"] < lost["rtn"]


def test_a_head_alone_goes_into_the_engines_layout(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = api.compress(tiny("qwen2"), out, recipe=recipe("rtn", "bits: 4, group_size: 32", "lm_head"), **RUN)
    assert found.plan.exporter == "compressed-tensors"
    model, held = api.load(out, dtype=torch.float32), read(out)
    plain = api.load(tiny("qwen2"), dtype=torch.float32)
    plain.load_state_dict(held)
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)


def test_an_unfinished_run_goes_on_at_the_table(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = recipe("gptq", "bits: 4, group_size: 32", "embed, lm_head")
    whole, out = tmp_path / "whole", tmp_path / "out"
    api.compress(tiny("qwen2"), whole, recipe=steps, **RUN)
    real = tables._Table.slabs

    def broken(self: Any) -> Any:
        if self._table.name == "lm_head":
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(tables._Table, "slabs", broken)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("qwen2"), out, recipe=steps, **RUN)
    monkeypatch.undo()
    found = api.compress(tiny("qwen2"), out, recipe=steps, **RUN)
    assert found.skipped == 2
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_rare_tokens_count_little_in_an_embeddings_error(tiny: Tiny, tmp_path: Path) -> None:
    """The error that is reported is of the rows as the calibration text looks them up."""
    out = tmp_path / "out"
    found = api.compress(tiny("qwen2"), out, recipe=recipe("rtn", "bits: 2, group_size: 32", "embed"), **RUN)
    before, after = read(tiny("qwen2")), read(out)
    name = "model.embed_tokens.weight"
    model = open_model(str(tiny("qwen2")))
    from lilliput.data.load import load_tokens

    ids = load_tokens("docs", model.source.tokenizer(), samples=4, tokens=32, vocabulary=model.vocabulary).ids
    change, weight = (after[name] - before[name])[ids.reshape(-1)], before[name][ids.reshape(-1)]
    expected = float(change.double().norm() / weight.double().norm())
    row = next(x for x in found.rows if x["name"] == "model.embed_tokens")
    assert row["error"] == pytest.approx(expected, rel=1e-4)


TWICE = recipe("rtn", "bits: 8", "embed") + "- {method: rtn, target: {bits: 4}, where: {include: [embed]}}\n"


@pytest.mark.parametrize(("steps", "said"), [
    (recipe("svd-truncate", "ratio: 0.5", "embed"), "row by row"),
    (recipe("wanda", "sparsity: 0.5", "embed"), "row by row"),
    (recipe("rtn", "format: nvfp4", "embed"), "cannot be read one by one"),
    (TWICE, "quantizes this layer already"),
    ("export: compressed-tensors\n" + recipe("rtn", "bits: 8", "embed"), "no engine tested can hold a packed one"),
])  # fmt: skip
def test_what_a_table_cannot_have_is_refused_by_the_plan(tiny: Tiny, steps: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        api.plan(tiny("llama"), recipe=steps, **ROOM)


def test_tables_stay_unless_they_are_named(tiny: Tiny) -> None:
    plan = api.plan(tiny("llama"), recipe="rtn", **ROOM)
    assert not plan.resolved.tables
    assert any("stay in 16 bits or more" in x for x in plan.notes)
    named = api.plan(tiny("llama"), recipe=recipe("rtn", "bits: 8, group_size: channel", "lm_head"), **ROOM)
    assert json.loads(json.dumps(named.to_json()))["tables"] == {"model.embed_tokens": "int8 row sym"}
    assert named.model_bits_per_weight < plan.model_bits_per_weight
