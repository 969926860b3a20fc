"""What a method that fills the zeros of a pruned layer owes its callers, in whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lilliput import api, methods
from lilliput.model.stored import Model, open_model
from lilliput.parts import kept
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.dense import DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.pattern import PatternSpec
from lilliput.progress import Quiet
from lilliput.target import Target

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 4, "tokens": 64, "device": "cpu", "dtype": "float32", "eval_windows": 0}
COMPENSATE = sorted(n for n, m in methods.discover().items() if getattr(m.spec, "compensates", False))
PRUNINGS = {"2:4": "pattern: '2:4'", "half": "sparsity: 0.5", "little": "sparsity: 0.02"}


def _run(source: Path, out: Path, *steps: str) -> Any:
    recipe = "export: auto\nsteps:\n" + "".join(f"  - {{{step}}}\n" for step in steps)
    return api.compress(source, out, recipe=recipe, progress=Quiet(), **ROOM)


def _distances(model: Model, original: Model, names: list[str]) -> list[float]:
    return [float((model.read(f"{x}.weight") - original.read(f"{x}.weight")).norm()) for x in names]


def test_there_are_such_methods() -> None:
    assert set(COMPENSATE) >= {"eora", "lorc"}


@pytest.mark.parametrize("name", COMPENSATE)
@pytest.mark.parametrize("support", ["pattern", "anywhere"])
def test_kept_weights_and_a_product_lose_no_more_than_the_kept_weights(name: str, support: str, toy: Any) -> None:
    w, stats, gram = toy.tensors["up"], toy.io().stats["up"], toy.io().stats["up"].need("gram").double()
    target = {"pattern": "2:4"} if support == "pattern" else {"sparsity": 0.6}
    pruned = methods.get("wanda").spec.run(  # type: ignore[attr-defined]
        Layer("up", w), stats, Target.model_validate(target), methods.get("wanda").parse({})
    )
    first = kept.spec_of(*w.shape, torch.float16, target.get("pattern"), int(pruned.support.sum()))  # type: ignore[arg-type]
    opened = kept.opened(pruned, first)
    found = methods.get(name)
    lost: list[float] = []
    for rank in (1, 4, 16, 40):
        out = found.spec.run(opened, stats, Target(rank=rank), found.parse({"factors": "float32"}))  # type: ignore[attr-defined]
        assert [type(x.spec) for x in out.parts] == [PatternSpec if support == "pattern" else BitmaskSpec, LowRankSpec]
        assert torch.equal(out.parts[0].decode(), pruned.decode().half().float())
        change = (out.decode() - w).double()
        lost.append(float((change @ gram * change).sum() if "gram" in found.spec.needs else change.square().sum()))
    change = (pruned.decode() - w).double()
    whole = float((change @ gram * change).sum() if "gram" in found.spec.needs else change.square().sum())
    assert whole > lost[0] > lost[1] > lost[2] > lost[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPENSATE)
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_of_kept_weights_and_products(tiny: Tiny, tmp_path: Path, name: str, pruning: str, kind: str) -> None:
    source, prune = tiny(kind), f"method: wanda, target: {{{PRUNINGS[pruning]}}}"
    alone = _run(source, tmp_path / "alone", prune)
    done = _run(source, tmp_path / "filled", prune, f"method: {name}, target: {{rank: 4}}")
    assert done.plan.exporter == "lilliput"
    assert done.plan.bytes == sum(x.stat().st_size for x in done.out.glob("*.safetensors"))
    names = list(done.plan.outcomes)
    for x in done.plan.outcomes.values():
        first, second = x.scheme.parts
        assert isinstance(first, {"2:4": PatternSpec, "half": BitmaskSpec, "little": DenseSpec}[pruning])
        assert isinstance(second, LowRankSpec)
        assert (x.sparsity, x.pattern, x.kept) == (None, None, None)
    assert any("keeps no zeros" in x for x in done.plan.notes)
    assert not any("keeps no zeros" in x for x in alone.plan.notes)
    original, ours = open_model(str(source)), open_model(str(done.out))
    if name == "lorc":  # the other one measures what leaves the layer
        pairs = zip(
            _distances(ours, original, names), _distances(open_model(str(alone.out)), original, names), strict=True
        )
        assert all(a < b for a, b in pairs)
    _reads_the_same(ours, done.out, names)


def _reads_the_same(ours: Model, out: Path, names: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    weights: dict[str, Tensor] = {name: model.get_submodule(name).weight for name in names}
    for name in names:
        assert torch.equal(weights[name], ours.read(f"{name}.weight").view_as(weights[name])), name


@pytest.mark.parametrize("name", COMPENSATE)
@pytest.mark.parametrize("pruning", ["2:4", "half"])
def test_codes_of_a_pruned_layer_are_kept_and_compensated(tiny: Tiny, tmp_path: Path, name: str, pruning: str) -> None:
    source = tiny("llama")
    prune, quantize = (
        f"method: wanda, target: {{{PRUNINGS[pruning]}}}",
        "method: gptq, target: {bits: 4, group_size: 32}",
    )
    coded = _run(source, tmp_path / "coded", prune, quantize)
    done = _run(source, tmp_path / "filled", prune, quantize, f"method: {name}, target: {{rank: 8}}")
    assert done.plan.bytes == sum(x.stat().st_size for x in done.out.glob("*.safetensors"))
    assert any("keeps no zeros" in x for x in done.plan.notes)
    names = list(done.plan.outcomes)
    before = open_model(str(coded.out)).read(f"{names[0]}.weight")
    original, ours = open_model(str(source)), open_model(str(done.out))
    first = original.read(f"{names[0]}.weight")
    assert float((before == 0).float().mean()) >= 0.5
    assert float((ours.read(f"{names[0]}.weight") == 0).float().mean()) < 0.01
    if name == "lorc":
        assert _distances(ours, original, names[:1])[0] < float((before - first).norm())
    _reads_the_same(ours, done.out, names)
