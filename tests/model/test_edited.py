"""A model without some of its parts: equal to the whole one with those parts masked, in a config of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from lilliput.errors import PlanError
from lilliput.model.edit import experts_of, router_of
from lilliput.model.edited import Edit, EditedModel, heads_of
from lilliput.model.stored import Model, open_model

Tiny = Callable[[str], Path]
KINDS = ["llama", "qwen2", "mixtral", "wide"]
ENDS = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "w2")


def opened(folder: Path) -> tuple[Model, Any]:
    return open_model(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


def sliced(model: EditedModel) -> Any:
    """What transformers makes of the edited config and tensors."""
    skeleton = model.skeleton
    skeleton.load({name: model.read(name) for name in skeleton.shapes})
    return skeleton.model


def silence(whole: Any, model: Model, edit: Edit) -> None:
    """Zero the columns that read what leaves."""
    anatomy = model.anatomy()
    for (number, mlp), kept in edit.channels.items():
        block = anatomy.blocks[number]
        for name in block.groups.channels[mlp].readers:
            mask = torch.zeros(block.groups.channels[mlp].width)
            mask[list(kept)] = 1.0
            _scale_columns(whole, model, f"{anatomy.block_names[number]}.{name}", block.linear(name), mask)
    for number, kept in edit.heads.items():
        block = anatomy.blocks[number]
        for n, group in enumerate(heads_of(block)):
            for name, axis, (a, b) in group.members:
                if axis == "columns" and n not in kept:
                    mask = torch.ones(block.linear(name).in_features)
                    mask[a:b] = 0.0
                    _scale_columns(whole, model, f"{anatomy.block_names[number]}.{name}", block.linear(name), mask)


def _scale_columns(whole: Any, model: Model, name: str, linear: Any, mask: torch.Tensor) -> None:
    with torch.no_grad():
        if linear.expert is not None:
            experts = whole.get_submodule(name.rpartition(".experts.")[0] + ".experts")
            experts.down_proj[linear.expert] *= mask
        else:
            weight = whole.get_submodule(name).weight
            weight.mul_(mask[:, None] if linear.transposed else mask)


def every_other(model: Model) -> Edit:
    blocks = model.anatomy().blocks
    channels = {
        (n, m): tuple(range(1, x.width, 2)) for n, b in enumerate(blocks) for m, x in enumerate(b.groups.channels)
    }
    return Edit(tuple(range(len(blocks))), channels)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "neox"])
def test_a_sliced_model_equals_the_masked_one_without_hidden_channels(tiny: Tiny, kind: str) -> None:
    model, whole = opened(tiny(kind))
    before = logits(whole)
    edit = every_other(model)
    silence(whole, model, edit)
    masked = logits(whole)
    assert float((masked - before).abs().max()) > 1e-2
    torch.testing.assert_close(logits(sliced(EditedModel(model, edit))), masked, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliced_model_equals_the_masked_one_without_heads(tiny: Tiny, kind: str) -> None:
    model, whole = opened(tiny(kind))
    blocks = model.anatomy().blocks
    heads = {n: tuple(range(1, len(heads_of(b)), 2)) for n, b in enumerate(blocks)}
    edit = Edit(tuple(range(len(blocks))), heads=heads)
    silence(whole, model, edit)
    torch.testing.assert_close(logits(sliced(EditedModel(model, edit))), logits(whole), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox", "wide"])
def test_a_model_without_a_block_equals_the_whole_one_with_that_block_deleted(tiny: Tiny, kind: str) -> None:
    model, whole = opened(tiny(kind))
    count = len(model.skeleton.block_names)
    edited = EditedModel(model, Edit(tuple(n for n in range(count) if n != 1)))
    layers = whole.get_submodule(model.skeleton.block_names[0].rpartition(".")[0])
    del layers[1]
    torch.testing.assert_close(logits(sliced(edited)), logits(whole), rtol=1e-5, atol=2e-5)
    assert len(edited.skeleton.block_names) == count - 1
    if count > 2:
        last = edited.skeleton.block_names[-1]
        names = {edited.stored_name(x) for x in edited.skeleton.names_of(count - 2)}
        assert all(name.startswith(f"{last}.") for name in names)
        assert edited.config.num_hidden_layers == count - 1


def test_edits_of_edits_compose(tiny: Tiny) -> None:
    model, _ = opened(tiny("llama"))
    first = EditedModel(model, Edit((0, 2, 3)))
    inner = EditedModel(first, Edit((0, 1, 2), {(n, 0): tuple(range(0, 128, 2)) for n in range(3)}))
    direct = EditedModel(model, Edit((0, 2, 3), {(n, 0): tuple(range(0, 128, 2)) for n in range(4)}))
    for name in inner.skeleton.shapes:
        assert torch.equal(inner.read(name), direct.read(name))
    assert inner.base_name("model.layers.1.mlp.down_proj.weight") == "model.layers.1.mlp.down_proj.weight"
    assert first.base_name("model.layers.1.mlp.down_proj.weight") == "model.layers.2.mlp.down_proj.weight"


def test_rows_are_read_as_the_whole_tensor_is(tiny: Tiny) -> None:
    model, _ = opened(tiny("llama"))
    edited = EditedModel(model, every_other(model))
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
    ):
        assert torch.equal(edited.read_rows(name, 3, 9), edited.read(name)[3:9])


def test_sizes_that_no_config_has_are_refused(tiny: Tiny) -> None:
    model, _ = opened(tiny("gpt2"))
    heads = dict.fromkeys(range(2), (0,))
    with pytest.raises(PlanError, match="no config of GPT2LMHeadModel has the sizes"):
        EditedModel(model, Edit((0, 1), heads=heads))
    model, _ = opened(tiny("llama"))
    with pytest.raises(PlanError, match="different blocks"):
        EditedModel(model, Edit((0, 1, 2, 3), {(n, 0): tuple(range(10 + n)) for n in range(4)}))


def uneven(model: Model, heads: bool) -> Edit:
    """Blocks of different widths."""
    blocks = model.anatomy().blocks
    channels = {(n, 0): tuple(range(n % 2, b.groups.channels[0].width, 2 + n)) for n, b in enumerate(blocks)}
    kept = {n: tuple(range(n % 2, len(heads_of(b)))) for n, b in enumerate(blocks)}
    return Edit(tuple(range(len(blocks))), channels, kept if heads else {}, spread=True)


@pytest.mark.parametrize(("kind", "heads"), [("llama", True), ("qwen2", True), ("gpt2", False), ("wide", False)])
def test_blocks_of_different_widths_equal_the_masked_ones(tiny: Tiny, kind: str, heads: bool) -> None:
    model, whole = opened(tiny(kind))
    edit = uneven(model, heads)
    silence(whole, model, edit)
    edited = EditedModel(model, edit)
    torch.testing.assert_close(logits(sliced(edited)), logits(whole), rtol=1e-5, atol=2e-5)
    widths = [b.groups.channels[0].width for b in edited.anatomy().blocks]
    assert widths == [len(x) for x in edit.channels.values()]
    if heads:
        assert [len(heads_of(b)) for b in edited.anatomy().blocks] == [len(x) for x in edit.heads.values()]


def test_blocks_of_different_widths_may_leave_afterwards(tiny: Tiny) -> None:
    model, whole = opened(tiny("llama"))
    edit = uneven(model, heads=True)
    silence(whole, model, edit)
    count = len(edit.blocks)
    edited = EditedModel(EditedModel(model, edit), Edit(tuple(range(1, count))))
    del whole.model.layers[0]
    torch.testing.assert_close(logits(sliced(edited)), logits(whole), rtol=1e-5, atol=2e-5)


def without(whole: Any, model: Model, kept: dict[int, tuple[int, ...]]) -> None:
    """Give the router's logits of the experts that leave the value of minus infinity, and clamp its choice."""
    for number, experts in kept.items():
        block = model.anatomy().blocks[number]
        name = f"{model.skeleton.block_names[number]}.{router_of(block)}"
        router = whole.get_submodule(name)
        router.top_k = min(router.top_k, len(experts))
        gone = torch.tensor([n for n in range(len(experts_of(block))) if n not in experts])
        router.register_forward_hook(_masked(router, gone))


def _masked(router: Any, gone: torch.Tensor) -> Any:
    def hook(_: Any, inputs: Any, __: Any) -> Any:
        scores = inputs[0].reshape(-1, router.hidden_dim) @ router.weight.T
        scores[:, gone] = -torch.inf
        best, index = scores.softmax(-1).topk(router.top_k)
        return scores, best / best.sum(-1, keepdim=True), index

    return hook


def experts_left(model: Model, kept: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {n: kept for n, block in enumerate(model.anatomy().blocks) if experts_of(block)}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kept", [(0, 2, 3), (1, 3), (2,)])
def test_a_model_without_experts_equals_the_whole_one_whose_router_gives_them_nothing(
    tiny: Tiny, kind: str, kept: tuple[int, ...]
) -> None:
    model, whole = opened(tiny(kind))
    experts = experts_left(model, kept)
    assert sorted(experts) == {"mixtral": [0, 1], "qwen3_moe": [0, 2]}[kind]
    before = logits(whole)
    edited = EditedModel(model, Edit(tuple(range(len(model.skeleton.block_names))), experts=experts))
    without(whole, model, experts)
    masked = logits(whole)
    assert float((masked - before).abs().max()) > 1e-2
    torch.testing.assert_close(logits(sliced(edited)), masked, rtol=1e-5, atol=2e-5)
    assert edited.config.num_experts_per_tok == min(len(kept), model.config.num_experts_per_tok)
    assert len(experts_of(edited.anatomy().blocks[0])) == len(kept)
    names = [edited.stored_name(x) for x in edited.skeleton.shapes]
    assert len(set(names)) == len(names)
    old = f"experts.{kept[-1]}."
    for name in edited.skeleton.shapes:
        if f"experts.{len(kept) - 1}." in name:
            assert old in edited.base_name(name)
            assert f"experts.{len(kept) - 1}." in edited.stored_name(name)


def test_experts_of_blocks_that_move_have_the_names_of_their_places(tiny: Tiny) -> None:
    model, _ = opened(tiny("qwen3_moe"))
    edited = EditedModel(EditedModel(model, Edit((0, 2))), Edit((0, 1), experts={0: (1, 6), 1: (3, 7)}))
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    assert edited.stored_name(name) == name
    assert torch.equal(edited.read(name), model.read("model.layers.2.mlp.experts.7.up_proj.weight"))
    gate = edited.read("model.layers.1.mlp.gate.weight")
    assert torch.equal(gate, model.read("model.layers.2.mlp.gate.weight")[[3, 7]])


def test_experts_that_are_one_are_averages_by_their_shares(tiny: Tiny) -> None:
    model, _ = opened(tiny("mixtral"))
    groups = (((0, 0.75), (2, 0.25)), ((3, 1.0), (1, 0.0)))
    edited = EditedModel(model, Edit((0, 1), experts={0: (0, 3), 1: (0, 3)}, merged={0: groups}))
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        first, third = (model.read(f"model.layers.0.mlp.experts.{n}.{leaf}.weight") for n in (0, 2))
        expected = 0.75 * first.double() + 0.25 * third.double()
        name = f"model.layers.0.mlp.experts.0.{leaf}.weight"
        torch.testing.assert_close(edited.read(name).double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(edited.read_rows(name, 3, 7), edited.read(name)[3:7])
        assert edited.averaged(name)
        alone = edited.read(f"model.layers.0.mlp.experts.1.{leaf}.weight")
        assert torch.equal(alone, model.read(f"model.layers.0.mlp.experts.3.{leaf}.weight"))
    assert not edited.averaged("model.layers.1.mlp.experts.0.up_proj.weight")


def test_equal_experts_become_exactly_one_of_them(tiny: Tiny, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.mlp.experts.gate_up_proj[:] = layer.mlp.experts.gate_up_proj[0].clone()
            layer.mlp.experts.down_proj[:] = layer.mlp.experts.down_proj[0].clone()
    whole.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    third = ((0, 0.1), (1, 0.3), (2, 0.6))
    edit = Edit((0, 1), experts={0: (1,), 1: (2,)}, merged={0: (third,), 1: (third,)})
    edited = EditedModel(model, edit)
    for name in edited.skeleton.shapes:
        kept, before = edited.kept(name, 0), model.read(edited.base_name(name))
        assert torch.equal(edited.read(name), before if kept is None else before[kept])
    expected = logits(whole.float())
    torch.testing.assert_close(logits(sliced(edited)), expected, rtol=1e-4, atol=1e-4)  # all experts were the same


def test_fewer_experts_for_each_token_change_the_config_alone(tiny: Tiny) -> None:
    model, whole = opened(tiny("qwen3_moe"))
    edited = EditedModel(model, Edit((0, 1, 2), top_k=2))
    for layer in (whole.model.layers[0], whole.model.layers[2]):
        layer.mlp.gate.top_k = 2
    assert edited.config.num_experts_per_tok == 2
    assert edited.anatomy().blocks[0].chosen == 2
    torch.testing.assert_close(logits(sliced(edited)), logits(whole), rtol=1e-5, atol=2e-5)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("config", "edit", "said"),
    [
        (
            lambda: tf.Glm4MoeConfig(**SMALL, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
                                     num_key_value_heads=2, moe_intermediate_size=16, first_k_dense_replace=1),
            Edit((0, 1), experts={1: (0, 1)}),
            "within 2 groups",
        ),
        (
            lambda: tf.Glm4MoeConfig(**SMALL, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
                                     num_key_value_heads=2, moe_intermediate_size=16, first_k_dense_replace=1),
            Edit((0, 1), experts={1: (0,)}),
            "does not run",
        ),
        (
            lambda: tf.PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2),
            Edit((0, 1), top_k=1),
            "2 experts where its config says 1",
        ),
        (
            lambda: tf.MixtralConfig(**SMALL, num_local_experts=4, num_key_value_heads=2),
            Edit((0, 1), experts={0: (0, 1), 1: (0,)}),
            "different blocks",
        ),
    ],
)  # fmt: skip
def test_experts_that_a_model_cannot_do_without_are_refused(
    tmp_path: Path, config: Callable[[], Any], edit: Edit, said: str
) -> None:
    AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=said):
        EditedModel(open_model(tmp_path), edit).anatomy()


def test_an_edit_goes_through_the_journal() -> None:
    merged = {0: (((0, 0.1), (2, 0.9)), ((3, 1.0),))}
    for edit in (
        Edit((0, 2), {(0, 0): (1, 5), (2, 0): (0, 3)}, {0: (1,)}, spread=True),
        Edit((0, 1), hidden=8, experts={0: (0, 3)}, merged=merged, top_k=1),
    ):
        assert Edit.from_plain(json.loads(json.dumps(edit.plain()))) == edit
