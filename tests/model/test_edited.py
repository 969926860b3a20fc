"""A model without some of its parts: equal to the whole one with those parts masked, in a config of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput.errors import PlanError
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


def test_an_edit_goes_through_the_journal(tiny: Tiny) -> None:
    edit = Edit((0, 2), {(0, 0): (1, 5), (2, 0): (0, 3)}, {0: (1,)})
    assert Edit.from_plain(edit.plain()) == edit


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
