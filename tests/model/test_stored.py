"""Every tensor of every architecture is found under its canonical name, whatever the files call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilliput.errors import SourceError
from lilliput.model import weights
from lilliput.model.rotated import RotatedModel
from lilliput.model.stored import Model, open_model

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
MOE = {"num_experts_per_tok": 2}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**BASE),
    "llama tied": lambda: tf.LlamaConfig(**BASE, tie_word_embeddings=True),
    "mixtral": lambda: tf.MixtralConfig(**BASE, **MOE, num_local_experts=3),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**BASE, **MOE, num_experts=4, moe_intermediate_size=16, head_dim=8),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**{**BASE, **MOE, **DEEPSEEK}),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "gemma3": lambda: tf.Gemma3TextConfig(**BASE, head_dim=8, sliding_window=16),
    "granitemoe": lambda: tf.GraniteMoeConfig(**BASE, **MOE, num_local_experts=3),  # experts in 3-D tensors
    "phimoe": lambda: tf.PhimoeConfig(**BASE, **MOE, num_local_experts=3),
    "gpt_oss": lambda: tf.GptOssConfig(**BASE, **MOE, num_local_experts=3, head_dim=8),
}


def save(config: Any, folder: Path) -> dict[str, Tensor]:
    """Write a random model; its state dict."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        nn.init.normal_(value)
    model.save_pretrained(folder)
    state: dict[str, Tensor] = model.state_dict()
    return state


def original(state: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of a canonical name in the class's own state dict, where experts are fused."""
    if name in state:
        return state[name]
    base, _, rest = name.partition(".experts.")
    expert, leaf, _ = rest.split(".")
    if leaf == "down_proj":
        return state[f"{base}.experts.down_proj"][int(expert)]
    return state[f"{base}.experts.gate_up_proj"][int(expert)].chunk(2, 0)[leaf == "up_proj"]


def check(model: Model, state: dict[str, Tensor]) -> None:
    assert set(model.refs) == set(model.skeleton.shapes)
    for name in model.refs:
        want, got = original(state, name), model.read(name)
        assert torch.equal(got, want), name
        assert got.is_contiguous()
        assert (model.shape(name), model.dtype(name)) == (tuple(want.shape), want.dtype)
        assert got.untyped_storage().nbytes() == got.nbytes, "a slice must not hold the whole tensor"


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    state = save(CONFIGS[kind](), tmp_path)
    model = open_model(str(tmp_path))
    check(model, state)
    assert model.carried == model.copies == ()
    stored = load_file(tmp_path / "model.safetensors")
    for name, ref in model.refs.items():
        if ref.index is None:
            assert torch.equal(stored[model.stored_name(name)], model.read(name))
    names = [model.stored_name(x) for x in model.refs]
    assert len(set(names)) == len(names)


def test_mixtral_keeps_its_own_names(tmp_path: Path) -> None:
    save(CONFIGS["mixtral"](), tmp_path)
    model = open_model(str(tmp_path))
    at = "model.layers.1.mlp.experts.2"
    file = "model.layers.1.block_sparse_moe.experts.2"
    assert model.stored_name(f"{at}.gate_proj.weight") == f"{file}.w1.weight"
    assert model.stored_name(f"{at}.up_proj.weight") == f"{file}.w3.weight"
    assert model.stored_name(f"{at}.down_proj.weight") == f"{file}.w2.weight"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "phimoe"])
def test_experts_stored_as_one_tensor(kind: str, tmp_path: Path) -> None:
    """As `save_pretrained(save_original_format=False)` writes them; what is written back one by one loads."""
    state = save(CONFIGS[kind](), tmp_path)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    model = open_model(str(tmp_path))
    check(model, state)
    assert any(x.rows for x in model.refs.values())
    assert model.fused == ()
    values = {model.stored_name(x): model.read(x) for x in model.refs}
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in state.items())


def test_experts_that_load_only_together_are_named(tmp_path: Path) -> None:
    save(CONFIGS["granitemoe"](), tmp_path)
    model = open_model(str(tmp_path))
    assert set(model.fused) == {x for x in model.refs if ".experts." in x}
    assert "loads experts only as one 3-D tensor" in model.notes[-1]


def test_blocks_go_into_the_skeleton_and_out(tmp_path: Path) -> None:
    state = save(CONFIGS["mixtral"](), tmp_path)
    model = open_model(str(tmp_path), dtype=torch.bfloat16)
    model.load_block(1)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert torch.equal(model.skeleton.tensor(name), original(state, name).bfloat16())
    assert model.skeleton.tensor(name.replace("layers.1", "layers.0")).is_meta
    model.unload_block(1)
    assert all(model.skeleton.tensor(x).is_meta for x in model.skeleton.names_of(1))
    model.load(model.skeleton.embeddings)
    assert not model.skeleton.tensor("model.embed_tokens.weight").is_meta
    model.unload(model.skeleton.embeddings)
    assert model.skeleton.tensor("model.embed_tokens.weight").is_meta


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    values = load_file(folder / "model.safetensors")
    save_file({new: v for k, v in values.items() if (new := change(k)) is not None}, folder / "model.safetensors")


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    state = save(CONFIGS["gpt2"](), tmp_path)
    rename(tmp_path, lambda x: x.removeprefix("transformer."))
    model = open_model(str(tmp_path))
    check(model, state)
    assert model.stored_name("transformer.h.1.attn.c_attn.weight") == "h.1.attn.c_attn.weight"
    assert model.stored_name("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "module._orig_mod.", "net."])
def test_names_of_wrappers_are_neither_read_nor_written(tmp_path: Path, before: str) -> None:
    """torch.compile, DDP, both, and a module of the user's own: transformers knows the tensors by none of these."""
    state = save(CONFIGS["llama"](), tmp_path)
    rename(tmp_path, lambda x: before + x)
    model = open_model(str(tmp_path))
    check(model, state)
    assert {model.stored_name(x) for x in model.refs} == set(state)
    assert model.carried == ()
    assert f"({before}" in model.notes[0]


def test_buffers_of_old_versions_are_carried(tmp_path: Path) -> None:
    state = save(CONFIGS["gpt2"](), tmp_path)
    values = load_file(tmp_path / "model.safetensors") | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    save_file(values, tmp_path / "model.safetensors")
    model = open_model(str(tmp_path))
    check(model, state)
    assert model.carried == ("transformer.h.0.attn.bias",)


def newer(name: str) -> str:
    """The names of the module tree, as transformers 5 has them in memory."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return f"model.{name}"


WRAPPERS: dict[str, Callable[[str], str]] = {"as saved": lambda x: x, "newer": newer}


@pytest.mark.parametrize("layout", WRAPPERS)
@pytest.mark.parametrize("tied", [True, False])
def test_multimodal(tmp_path: Path, layout: str, tied: bool) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.Gemma3Config(
        text_config={**BASE, "head_dim": 8, "tie_word_embeddings": tied},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    whole = tf.Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    rename(tmp_path, WRAPPERS[layout])
    model = open_model(str(tmp_path))
    assert model.tied == tied
    state = {k.replace("model.language_model.", "model."): v for k, v in whole.state_dict().items()}
    check(model, state)
    assert model.source.config.model_type == "gemma3"
    assert any("vision_tower" in x for x in model.carried)
    assert any("multi_modal_projector" in x for x in model.carried)
    files = load_file(tmp_path / "model.safetensors")
    assert {model.stored_name(x) for x in model.refs} | set(model.carried) == set(files)
    head = model.stored_name("lm_head.weight")
    assert head == WRAPPERS[layout]("language_model.lm_head.weight")
    assert tied or head in files


def store_head(folder: Path, change: float) -> None:
    values = load_file(folder / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"] + change
    save_file(values, folder / "model.safetensors")


def test_tied_and_stored_twice(tmp_path: Path) -> None:
    state = save(CONFIGS["llama tied"](), tmp_path)
    store_head(tmp_path, 0.0)
    model = open_model(str(tmp_path))
    check(model, state)
    assert model.tied
    assert model.copies == ("lm_head.weight",)
    assert model.carried == ()
    assert model.notes == ()
    assert model.stored_name("lm_head.weight") == "lm_head.weight"


def test_tied_by_the_config_and_stored_apart(tmp_path: Path) -> None:
    save(CONFIGS["llama tied"](), tmp_path)
    store_head(tmp_path, 1.0)
    model = open_model(str(tmp_path))
    assert not model.tied
    assert torch.equal(model.read("lm_head.weight"), model.read("model.embed_tokens.weight") + 1)
    assert "both are stored and differ" in model.notes[0]


def test_tied_and_only_the_head_is_stored(tmp_path: Path) -> None:
    state = save(CONFIGS["llama tied"](), tmp_path)
    rename(tmp_path, lambda x: "lm_head.weight" if x == "model.embed_tokens.weight" else x)
    model = open_model(str(tmp_path))
    check(model, state)
    assert model.carried == ()


def test_a_missing_tensor(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path)
    rename(tmp_path, lambda x: None if "layers.1.mlp.up_proj" in x else x)
    with pytest.raises(SourceError, match=r"lacks 1 of .*model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(str(tmp_path))


def test_a_missing_expert(tmp_path: Path) -> None:
    save(CONFIGS["mixtral"](), tmp_path)
    rename(tmp_path, lambda x: None if "layers.0.block_sparse_moe.experts.1.w3" in x else x)
    with pytest.raises(SourceError, match=r"lacks 1 of .*layers\.0\.mlp\.experts\.1\.up_proj\.weight"):
        open_model(str(tmp_path))


def test_another_shape_than_the_config_asks_for(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"intermediate_size": 47}))
    with pytest.raises(
        SourceError, match=r"gate_proj\.weight in .*model\.safetensors has shape \[48, 32\].*\[47, 32\]"
    ):
        open_model(str(tmp_path))


def test_files_of_another_model(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="lacks 21 of the 21 tensors"):
        open_model(str(tmp_path))


def test_sharded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"]())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(open_model(str(tmp_path)), model.state_dict())


def test_unknown_tensor(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path)
    with pytest.raises(SourceError, match=r"no tensor named model\.nix"):
        open_model(str(tmp_path)).read("model.nix")


def test_few_rows_are_read_alone_and_many_in_stretches(tiny: Callable[[str], Path], monkeypatch: Any) -> None:
    model = open_model(str(tiny("llama")))
    name = model.skeleton.embeddings[0]
    monkeypatch.setattr(weights, "TABLE_ROWS", 128)

    def spans(*rows: int) -> list[tuple[int, int]]:
        return list(model.spans(name, torch.tensor(rows)))

    assert spans(5) == [(5, 6)]
    assert spans(5, 7, 60, 127, 128, 500) == [(5, 8), (60, 61), (127, 128), (128, 129), (500, 501)]
    assert spans(*range(0, 128, 4), 300) == [(0, 128), (300, 301)]
    assert spans() == []


def test_rows_of_a_rotated_table_are_read_in_whole_stretches(tiny: Callable[[str], Path], monkeypatch: Any) -> None:
    model = RotatedModel(open_model(str(tiny("llama"))))
    monkeypatch.setattr(weights, "TABLE_ROWS", 128)
    assert list(model.spans(model.skeleton.embeddings[0], torch.tensor([5, 500]))) == [(0, 128), (384, 512)]
    whole = model.read(model.skeleton.head)
    assert torch.equal(model.read_rows(model.skeleton.head, 128, 256), whole[128:256])
