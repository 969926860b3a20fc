"""Quantization-aware training end to end: the folder computes what was trained, and what cannot be is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lilliput import api
from lilliput.errors import PlanError
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.runtime import caches

Tiny = Callable[[str], Path]
RTN = "{method: rtn, target: {bits: 4, group_size: channel}}"
FEW = "steps: 2, tokens: 16, batch: 2, lr: 0.001"


def _run(model: Path, out: Path, *steps: str) -> Path:
    recipe = "steps:\n" + "\n".join(f"  - {x}" for x in steps)
    api.compress(
        model, out, recipe=recipe, samples=4, tokens=16, device="cpu", dtype="float32", eval_windows=0, progress=Quiet()
    )
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",
    [
        (RTN, "{method: act-static-dynamic, target: {bits: 8}}", "{method: kv-rtn, target: {bits: 4}}", "lr-qat"),
        ("{method: bcq, target: {format: binary, bits: 2, group_size: 32}}", "alphatuning"),
        ("{method: svid, target: {format: sign}}", "onebit"),
        ("{method: quip, target: {bits: 3}}", "l4q"),
        (
            "{method: gptq, target: {bits: 3, group_size: 32}}",
            "{method: eora, target: {rank: 4}, options: {factors: float16}}",
            "int2-1",
        ),
    ],
    ids=lambda x: x[-1],
)
def test_a_folder_holds_what_was_trained(tiny: Tiny, tmp_path: Path, steps: tuple[str, ...]) -> None:
    *before, method = steps
    plain = _run(tiny("llama"), tmp_path / "plain", *before)
    out = _run(tiny("llama"), tmp_path / "out", *before, f"{{method: {method}, options: {{{FEW}}}}}")
    assert not api.verify(out).problems  # transformers computes what the files say
    old, new = load_file(plain / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: (x.dtype, x.shape) for k, x in old.items()} == {k: (x.dtype, x.shape) for k, x in new.items()}
    assert any(not torch.equal(old[k], new[k]) for k in old)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_no_step_changes_nothing(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Transposed weights, square ones among them, and experts."""
    for number, (step, method) in enumerate(((RTN, "peqa"), ("{method: wanda, target: {sparsity: 0.5}}", "full"))):
        plain = _run(tiny(name), tmp_path / f"plain{number}", step)
        out = _run(tiny(name), tmp_path / f"out{number}", step, f"{{method: {method}, options: {{steps: 0}}}}")
        old, new = load_file(plain / "model.safetensors"), load_file(out / "model.safetensors")
        assert [k for k in old if not torch.equal(old[k], new[k])] == []


@pytest.mark.parametrize("group", ["tensor", "64", "channel"])
def test_engines_layouts_keep_the_groups_that_were_planned(tiny: Tiny, tmp_path: Path, group: str) -> None:
    """Whose files do not say whether a scale of a row, or the same for all rows, was one of a group or of a matrix."""
    step = f"{{method: rtn, target: {{bits: 4, group_size: {group}, symmetric: false}}}}"
    out = _run(tiny("llama"), tmp_path / "out", step, f"{{method: lsq, options: {{{FEW}}}}}")
    assert not api.verify(out).problems


def test_pruned_codes_stay_pruned(tiny: Tiny, tmp_path: Path) -> None:
    steps = ("{method: wanda, target: {pattern: '2:4'}}", "{method: rtn, target: {bits: 4, group_size: 32}}")
    out = _run(tiny("llama"), tmp_path / "out", *steps, f"{{method: lsq, options: {{{FEW}, start: original}}}}")
    model = open_model(out)
    weight = model.read("model.layers.0.mlp.up_proj.weight")
    assert int((weight.view(-1, 4) != 0).sum(1).max()) <= 2


def test_training_sees_the_cache_as_it_will_be(tiny: Tiny, tmp_path: Path) -> None:
    out = _run(tiny("llama"), tmp_path / "out", RTN, "{method: kv-rtn, target: {bits: 2}}")
    model = open_model(out)
    skeleton = model.skeleton
    model.load(tuple(skeleton.shapes))
    ids = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = caches.training(skeleton.model, skeleton.config)
    assert cache is not None
    table = skeleton.model.get_input_embeddings().weight  # type: ignore[operator]
    table.requires_grad_()
    trained = skeleton.read(ids, cache=cache)
    again = skeleton.read(ids, cache=cache)  # as blocks that are computed again on the way back
    assert torch.equal(trained, again)
    with torch.no_grad():
        from lilliput.anatomy.cached import filled

        assert torch.equal(skeleton.read(ids, cache=filled(skeleton.config, 2, 0)), trained)
        assert not torch.equal(skeleton.read(ids), trained)
    trained.square().sum().backward()
    assert table.grad is not None
    assert bool(table.grad.isfinite().all())
    assert bool(table.grad.any())


def test_a_teacher_writes_the_text(tiny: Tiny, tmp_path: Path) -> None:
    options = f"{{{FEW}, data: self, greedy: [1, 2]}}"
    out = _run(tiny("llama"), tmp_path / "out", RTN, f"{{method: lsq, options: {options}}}")
    assert not api.verify(out).problems


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((RTN, "{method: kivi, target: {bits: 2}}", "{method: lsq}"), "train with kv-rtn"),
        ((RTN, "{method: lr-qat, options: {hold: q4.4}}", RTN), "would undo"),
        (("{method: lsq}",), "plain linear"),
        ((RTN, "{method: int2-1}"), "without a product"),
        ((RTN, "{method: lsq, options: {others: ['*nrom*']}}"), "no tensor of .* is called so"),
        (
            (RTN, "{method: lsq, where: {include: ['*q_proj']}, options: {others: ['*k_proj.weight']}}"),
            r"k_proj.weight, a linear that is stored as codes",
        ),
        (
            ("{method: omniquant, target: {bits: 4}, options: {let: norm}}", "{method: lsq, options: {start: within}}"),
            "and .*omniquant.* has left others in their place",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny: Tiny, steps: tuple[str, ...], words: str) -> None:
    recipe = "steps:\n" + "\n".join(f"  - {x}" for x in steps)
    with pytest.raises(PlanError, match=words):
        api.plan(tiny("llama"), recipe=recipe, samples=2, tokens=16, device="cpu")


@pytest.mark.parametrize("start", ["original", "within"])
def test_weights_that_were_folded_are_no_originals(tiny: Tiny, tmp_path: Path, start: str) -> None:
    learn = f"{{method: lsq, options: {{{FEW}, start: {start}}}}}"
    words = "begins at the original's weights, and .*awq.* has left others in their place.* `start` to codes"
    with pytest.raises(PlanError, match=words):
        _run(tiny("llama"), tmp_path / "out", "{method: awq}", RTN, learn)
    folder = _run(tiny("llama"), tmp_path / "folder", "{method: awq}", RTN)
    with pytest.raises(PlanError, match=words):
        api.plan(folder, recipe=f"steps:\n  - {learn}", teacher=tiny("llama"), tokens=16)
    api.plan(folder, recipe=f"steps:\n  - {learn}".replace(start, "codes"), teacher=tiny("llama"), tokens=16)


def test_weights_of_another_model_are_no_originals(tiny: Tiny, tmp_path: Path) -> None:
    folder = _run(tiny("llama"), tmp_path / "folder", RTN)
    learn = f"steps:\n  - {{method: lsq, options: {{{FEW}, start: original}}}}"
    with pytest.raises(PlanError, match=r"reads the weight that .* had in the original, and in .* it is \["):
        api.plan(folder, recipe=learn, teacher=tiny("wide"), tokens=16)


def test_codes_that_were_trained_are_not_trained_from_the_original_again(tiny: Tiny, tmp_path: Path) -> None:
    once = _run(tiny("llama"), tmp_path / "once", RTN, f"{{method: lsq, options: {{{FEW}}}}}")
    learn = f"steps:\n  - {{method: lsq, options: {{{FEW}, start: within}}}}"
    with pytest.raises(PlanError, match=r"and lsq in .* has left others in their place"):
        api.plan(once, recipe=learn, teacher=tiny("llama"), tokens=16)
