"""Head rotations against loops over heads, and what they are for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput import api
from lilliput.errors import LilliputError, PlanError
from lilliput.folds.kinds import HeadFold, PermuteFold, ScaleFold, ShiftFold
from lilliput.methods.rewrite import head_rotation
from lilliput.model.block import BlockWeights
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.run import rewriting
from lilliput.target import Target
from lilliput.verbs.view import BlockIO, BlockView

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_values_and_outputs_are_turned_head_by_head(tiny: Tiny, kind: str) -> None:
    """qwen2: two key-value heads of 16 for four query heads, and biases."""
    model = open_model(tiny("qwen2"))
    weights = BlockWeights(model, 0, model.anatomy().blocks[0])
    block = BlockView(weights.anatomy, {})
    folds = head_rotation.rewrite(block, BlockIO({}), Target(), head_rotation.Options.model_validate({"kind": kind}))
    (fold,) = folds
    v, o = (model.read(f"model.layers.0.self_attn.{x}_proj.weight").double() for x in "vo")
    bias = model.read("model.layers.0.self_attn.v_proj.bias").double()
    for k in range(2):
        r = fold.matrices[k]
        torch.testing.assert_close(r.T @ r, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
        v[16 * k : 16 * k + 16] = r.T @ v[16 * k : 16 * k + 16]
        bias[16 * k : 16 * k + 16] = r.T @ bias[16 * k : 16 * k + 16]
        for q in (2 * k, 2 * k + 1):
            o[:, 16 * q : 16 * q + 16] = o[:, 16 * q : 16 * q + 16] @ r
    assert not torch.equal(fold.matrices[0], fold.matrices[1])
    weights.fold(folds)
    for name, expected in {"v_proj.weight": v, "v_proj.bias": bias, "o_proj.weight": o}.items():
        torch.testing.assert_close(weights.tensor(f"self_attn.{name}").double(), expected, rtol=0, atol=1e-5)
    again = head_rotation.rewrite(block, BlockIO({}), Target(), head_rotation.Options.model_validate({"kind": kind}))
    assert torch.equal(again[0].matrices, fold.matrices)
    with pytest.raises(LilliputError, match="squared gradients"):
        weights.through_folds(weights.anatomy.linear("self_attn.o_proj"), torch.ones(64, 64))


def test_what_is_no_rotation_and_what_has_no_bias_is_refused(tiny: Tiny) -> None:
    model = open_model(tiny("llama"))
    weights = BlockWeights(model, 0, model.anatomy().blocks[0])
    values = next(x for x in weights.anatomy.links if x.head)
    norm = weights.anatomy.links[0]
    with pytest.raises(LilliputError, match="no rotations of the heads"):
        weights.fold([HeadFold(values, torch.ones(2, 16, 16))])
    with pytest.raises(LilliputError, match="cannot be turned"):
        weights.fold([HeadFold(norm, torch.eye(64)[None])])
    with pytest.raises(LilliputError, match="cannot be shifted"):
        weights.fold([ShiftFold(norm, torch.zeros(64))])


def test_all_ranks_get_the_same_folds(tiny: Tiny) -> None:
    """What travels between processes is plain data."""
    anatomy = open_model(tiny("gpt2")).anatomy().blocks[0]
    norm, values = anatomy.links[0], next(x for x in anatomy.links if x.head)
    channels = anatomy.groups.channels[0]
    turns = head_rotation.rewrite(BlockView(anatomy, {}), BlockIO({}), Target(), head_rotation.Options())
    draw = torch.rand(64)
    folds = [
        ShiftFold(norm, draw),
        ScaleFold(values, draw),
        PermuteFold(channels, torch.randperm(channels.width)),
        *turns,
    ]
    for fold in folds:
        again = rewriting._unpacked(anatomy, *json.loads(json.dumps(rewriting._packed(anatomy, fold))))
        assert type(again) is type(fold)
        for name, value in vars(fold).items():
            same = getattr(again, name)
            assert (
                torch.equal(same, value) and same.dtype == value.dtype if isinstance(value, Tensor) else same is value
            )


@pytest.mark.slow
def test_a_folder_computes_what_the_model_did(tiny: Tiny, tmp_path: Path) -> None:
    recipe = "steps:\n  - {method: head-rotation}\n  - {method: rtn, target: {bits: 8, group_size: 16}}\n"
    api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, samples=2, tokens=32, eval_windows=0, progress=Quiet())
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        ours, theirs = (
            tf.AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32)(ids).logits
            for x in (tmp_path / "out", tiny("qwen2"))
        )
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03
    reading = "steps:\n  - {method: head-rotation}\n  - {method: squeezellm, target: {format: codebook, bits: 4}}\n"
    with pytest.raises(PlanError, match="squared gradients"):
        api.compress(tiny("qwen2"), tmp_path / "no", recipe=reading, samples=2, tokens=32, progress=Quiet())
