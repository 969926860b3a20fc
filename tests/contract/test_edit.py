"""What every method that edits the model's structure owes its callers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lilliput import methods
from lilliput.anatomy.model import Channels, Groups
from lilliput.errors import LilliputError, PlanError
from lilliput.model.edited import Edit as Decision
from lilliput.stats import fold
from lilliput.target import Target
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, Units, first_of
from lilliput.verbs.spec import Task

EDIT = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Edit))
BLOCKS = 12
UNITS = tuple(Units((64,), 4, 3 * 48, 3000, 40_000, 160, 4, 8, 2) for _ in range(BLOCKS))


def spec(name: str) -> tuple[Edit[Any], Any]:
    method = methods.get(name)
    assert isinstance(method.spec, Edit)
    return method.spec, method.parse({"layers": 7} if name == "sheared-llama" else {})


def scores() -> list[EditScores]:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "block": (float(torch.rand(1, generator=draw)),),
            "heads": tuple(torch.rand(4, generator=draw).tolist()),
            "channels.0": tuple(torch.rand(64, generator=draw).tolist()),
            "experts": tuple(torch.rand(8, generator=draw).tolist()),
            "experts.alike": tuple(torch.rand(64, generator=draw).tolist()),
            "gates": (0.75, 0.25),
            "attention": (0.5,),
            "mlp": (0.5,),
        }
        for _ in range(BLOCKS)
    ]


def sizes_of(edit: Decision) -> Sizes:
    channels = {len(x) for x in edit.channels.values()}
    heads = {len(x) for x in edit.heads.values()}
    experts = {len(x) for x in edit.experts.values()}
    assert max(len(channels), len(heads), len(experts)) <= 1
    found = (next(iter(x), None) for x in (channels, heads))
    return Sizes(len(edit.blocks), *found, edit.hidden, experts=next(iter(experts), None), top_k=edit.top_k)


@pytest.mark.parametrize("name", EDIT)
def test_what_stays_has_the_sizes_that_were_planned_and_repeats(name: str) -> None:
    method, options = spec(name)
    if method.vocabulary is not None:
        pytest.skip("its sizes come from a tokenizer")
    sizes = method.sizes(UNITS, options)
    if method.branches is not None:
        pytest.skip("all shapes stay")
    assert sizes not in (Sizes(BLOCKS), Sizes(BLOCKS, 64, 4), Sizes(BLOCKS, hidden=160), Sizes(BLOCKS, experts=8))
    first, again = (method.run(scores(), UNITS, sizes, options) for _ in range(2))
    assert first == again
    assert sizes_of(first) == sizes_of(first_of(UNITS, sizes)) == sizes
    for kept in (first.blocks, *first.channels.values(), *first.heads.values(), *first.experts.values()):
        assert list(kept) == sorted(set(kept))


@pytest.mark.parametrize("name", EDIT)
def test_scores_that_are_no_numbers_are_refused(name: str) -> None:
    method, options = spec(name)
    broken = [{key: tuple(float("nan") for _ in values) for key, values in x.items()} for x in scores()]
    if method.score is None:
        pytest.skip("it reads no scores")
    with pytest.raises(LilliputError, match="NaN"):
        method.run(broken, UNITS, method.sizes(UNITS, options), options)


@pytest.mark.parametrize("name", EDIT)
def test_scores_leave_their_inputs_alone_and_name_what_there_is(name: str, toy: Any) -> None:
    method, options = spec(name)
    if method.score is None:
        pytest.skip("it reads no scores")
    tensors = {n: x.clone() for n, x in toy.tensors.items()}
    inner = Channels((("up", torch.arange(96)),), ("down",), 96)
    block = replace(toy.block, groups=Groups((), (inner,)))
    stats = {n: fold.finish(fold.update(fold.init(x.shape[1], fold.NAMES), x)) for n, x in toy.inputs.items()}
    slopes = {x.name: torch.randn(x.out_features, x.in_features) for x in block.linears}
    squares = {n: x.square() for n, x in slopes.items()}
    gates = {"channels.0": torch.randn(3, 96, dtype=torch.float64)}
    io = EditIO(stats, slopes, squares, 0.5, gates, {n: x @ x.T for n, x in slopes.items()})
    found = method.score(EditView(block, lambda n: toy.tensors[n]), io, options)
    for key, values in found.items():
        assert key in ("block", "heads", "experts", "experts.alike", "gates") or key.startswith("channels.")
        assert all(isinstance(x, float) for x in values)
    assert found or method.branches or method.sizes(UNITS, options).channels is None
    assert all(torch.equal(tensors[n], x) for n, x in toy.tensors.items())


@pytest.mark.parametrize("name", EDIT)
def test_it_comes_before_whatever_decides_weights(name: str) -> None:
    method: Any = methods.get(name)
    task = Task(1, method, Target(), method.parse({}))
    gptq = methods.get("gptq")
    with pytest.raises(PlanError, match="move it to the front"):
        method.spec.ordered(task, [Task(0, gptq, Target(), gptq.parse({})), task])
