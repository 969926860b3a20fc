"""What a backward pass shows of a block, against whole-model autograd with explicit gates and hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lilliput.model.stored import open_model
from lilliput.streaming.backward import Samples, backward
from lilliput.streaming.watched import Watched
from lilliput.verbs.edits import linears_of, readers_of

Tiny = Callable[[str], Path]


def seen(tiny: Tiny, kind: str, folder: Path, ids: Tensor, number: int) -> tuple[Any, Watched]:
    model = open_model(tiny(kind))
    block = model.anatomy().blocks[number]
    watched = Watched(
        model.skeleton,
        number,
        block,
        scale=len(ids),
        gates=readers_of(block),
        needs=frozenset({"gram"}),
        outputs=linears_of(block),
    )
    for _ in backward(model.skeleton, model.read, Samples(ids, folder), watch={number: watched}.get):
        pass
    return block, watched


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox"])
def test_gates_inputs_and_output_gradients_are_those_of_the_whole_model(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    ids = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(0))
    block, watched = seen(tiny, kind, tmp_path, ids, 1)
    whole = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    prefix = open_model(tiny(kind)).skeleton.block_names[1]
    modules = {x.name: whole.get_submodule(f"{prefix}.{x.name}") for x in block.linears}
    ends = {name for owners in readers_of(block).values() for name in owners}
    gates = {name: torch.ones(block.linear(name).in_features, requires_grad=True) for name in ends}
    for name, gate in gates.items():
        modules[name].register_forward_pre_hook(lambda _, x, gate=gate: (x[0] * gate, *x[1:]))
    inputs: dict[str, list[Tensor]] = {x.name: [] for x in block.sites}
    outputs: dict[str, list[Tensor]] = {x.name: [] for x in block.linears}
    for site in block.sites:
        modules[site.linears[0]].register_forward_pre_hook(lambda _, x, n=site.name: inputs[n].append(x[0].detach()))
    for name, module in modules.items():
        module.register_full_backward_hook(lambda _, __, g, n=name: outputs[n].append(g[0].detach()))
    for n, sample in enumerate(ids):
        loss = torch.nn.functional.cross_entropy(whole(input_ids=sample[None]).logits[0, :-1], sample[1:])
        slopes = torch.autograd.grad(loss, tuple(gates.values()), retain_graph=True)
        for values in outputs.values():
            del values[n:]
        loss.backward()
        for kind_of, owners in readers_of(block).items():
            expected = torch.zeros(watched.gates()[kind_of].shape[1], dtype=torch.float64)
            for (name, _), slope in zip(gates.items(), slopes, strict=True):
                if name in owners:
                    for j, owner in enumerate(owners[name].tolist()):
                        expected[owner] += float(slope[j])
            scale = float(expected.abs().max())
            torch.testing.assert_close(watched.gates()[kind_of][n], expected, rtol=1e-3, atol=1e-4 * scale)
    covariances = watched.outputs()
    for name, values in outputs.items():
        g = torch.cat([x.reshape(-1, x.shape[-1]) for x in values])
        expected = g.T @ g / len(g)
        torch.testing.assert_close(
            covariances[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=name
        )
    for name, stats in watched.stats().items():
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]])
        expected = x.T @ x
        torch.testing.assert_close(stats.gram, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_experts_have_gates_too(tiny: Tiny, tmp_path: Path) -> None:
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    block, watched = seen(tiny, "mixtral", tmp_path, ids, 0)
    gates = watched.gates()
    assert set(gates) == set(readers_of(block))
    assert all(bool(torch.isfinite(x).all()) for x in gates.values())
    assert float(gates["heads"].abs().min()) > 0
    assert any(float(x.abs().max()) > 0 for key, x in gates.items() if key != "heads")
    assert sum(x.count for x in watched.stats().values()) > 0
