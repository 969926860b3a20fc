"""What every behaviour promises: an entry that loads, tensors as described, inputs untouched, nothing left out at 1."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.methods import discover
from lilliput.model.stored import open_model
from lilliput.runtime import behaviours
from lilliput.verbs.behave import Behave, MlpIO, mlp_of
from lilliput.verbs.spec import Method

METHODS = [x for x in discover().values() if isinstance(x.spec, Behave)]
Tiny = Callable[[str], Path]


def looked(method: Method, anatomy: Any, block: int, options: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What a method fits to one MLP of an anatomy on random inputs, and those."""
    mlp, draw = mlp_of(anatomy, block), torch.Generator().manual_seed(block)
    seen = [torch.randn(40, n, generator=draw) for n in (mlp.inputs, mlp.width)]
    down = torch.randn(mlp.inputs, mlp.width, generator=draw)

    def passes() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(seen[0].split(15), seen[1].split(15), strict=True)

    return dict(method.spec.fit(MlpIO(mlp, down, passes), options)), [*seen, down]  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
def test_tensors_are_those_described_and_inputs_stay(tiny: Tiny, method: Method) -> None:
    anatomy, options = open_model(tiny("llama")).anatomy(), method.parse({})
    assert (method.spec.fit is None) == (method.spec.tensors is None)  # type: ignore[attr-defined]
    if method.spec.fit is None:  # type: ignore[attr-defined]
        return
    one, before = looked(method, anatomy, 0, options)
    other, after = looked(method, anatomy, 0, options)
    described = method.spec.tensors(mlp_of(anatomy, 0), options)  # type: ignore[attr-defined]
    assert {name: (x.dtype, tuple(x.shape)) for name, x in one.items()} == described
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
def test_an_entry_loads_and_keeping_all_leaves_the_model_as_it_is(tiny: Tiny, method: Method) -> None:
    anatomy = open_model(tiny("llama")).anatomy()
    for values in ({}, {"keep": 1.0}) if "keep" in method.options.model_fields else ({},):
        options = method.parse(values)
        entry = json.loads(json.dumps(method.spec.entry(anatomy, options)))  # type: ignore[attr-defined]
        tensors: dict[str, Tensor] = {}
        for block, prefix in enumerate(anatomy.block_names if method.spec.fit else ()):  # type: ignore[attr-defined]
            name = f"{prefix}.{mlp_of(anatomy, block).name}"
            tensors |= {f"{name}.{key}": x for key, x in looked(method, anatomy, block, options)[0].items()}
        assert set(tensors) == set(behaviours.stored([entry]))
        model: Any = tf.AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
        ids = torch.arange(20)[None]
        with torch.no_grad():
            plain = model(ids).logits
            state = behaviours.install(model, [entry], tensors.__getitem__)
            found = model(ids).logits
            with behaviours.paused(model):
                assert torch.equal(model(ids).logits, plain)
        assert state.blocks == anatomy.block_names
        assert 0.0 < state.work.share() <= 1.0
        if values:
            assert torch.equal(found, plain)
            assert state.work.share() == 1.0
