"""Experts that leave, from scores to folder: stock engines, planned sizes, the journal, resumption, what follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import api
from lilliput.errors import LilliputError, PlanError
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.run.journal import Work

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32"}
RUN: dict[str, Any] = {**ROOM, "eval_windows": 0, "progress": Quiet()}
FIELDS = ("num_local_experts", "num_experts")
COMPOSED = """steps:
  - {method: drop-layers, options: {blocks: 1}}
  - {method: expert-merging, options: {experts: 3}}
  - {method: refit}
  - {method: distil, options: {iters: 2}}
  - {method: rtn, target: {bits: 4, group_size: 16}, where: {exclude: [gate]}}
"""
FLAP = COMPOSED.replace("  - {method: refit}", "  - {method: flap, options: {ratio: 0.1}}\n  - {method: refit}")


def steps(method: str, **options: Any) -> str:
    return json.dumps({"steps": [{"method": method, "options": options}]}) + "\n"


def count(config: dict[str, Any]) -> set[int]:
    return {config[x] for x in FIELDS if x in config}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("recipe", "experts", "top"),
    [
        (steps("expert-pruning", ratio=0.5), {"mixtral": 2, "qwen3_moe": 4}, {"mixtral": 2, "qwen3_moe": 3}),
        (
            steps("expert-pruning", experts=1, by="share"),
            {"mixtral": 1, "qwen3_moe": 1},
            {"mixtral": 1, "qwen3_moe": 1},
        ),
        (steps("expert-merging", experts=2), {"mixtral": 2, "qwen3_moe": 2}, {"mixtral": 2, "qwen3_moe": 2}),
        (steps("router-pruning", top_k=1), {"mixtral": 4, "qwen3_moe": 8}, {"mixtral": 1, "qwen3_moe": 1}),
        (COMPOSED, {"mixtral": 3, "qwen3_moe": 3}, {"mixtral": 2, "qwen3_moe": 3}),
        (FLAP, {"mixtral": 3}, {"mixtral": 2}),
    ],
)
def test_folders_have_the_planned_size_and_open_as_stock_models(
    tiny: Tiny, tmp_path: Path, kind: str, recipe: str, experts: dict[str, int], top: dict[str, int]
) -> None:
    if kind not in experts:
        pytest.skip("its blocks have different numbers of hidden channels")
    done = api.compress(tiny(kind), tmp_path / "out", recipe=recipe, **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert count(config) == {experts[kind]}
    assert config["num_experts_per_tok"] == top[kind]
    assert config["architectures"] == json.loads((tiny(kind) / "config.json").read_text())["architectures"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(20)[None]).logits).all())
    assert done.engine is not None
    assert not done.engine.problems
    assert api.verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_config_says_the_number_under_the_name_that_it_came_with(tiny: Tiny, tmp_path: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("qwen3_moe")).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in FIELDS}
    path.write_text(json.dumps({**config, name: 8}))
    api.compress(tmp_path / "model", tmp_path / "out", recipe=steps("expert-pruning", experts=5), **RUN)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written[name] == 5
    assert count(written) == {5}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_no_token_chooses_leave_without_a_trace(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, layer in enumerate(whole.model.layers):
            if hasattr(layer.mlp, "gate"):
                gone = [number, 3]
                # What the router reads is made positive along one channel, where only these experts' rows are negative.
                layer.mlp.gate.weight[:] = torch.randn(layer.mlp.gate.weight.shape, generator=draw)
                layer.mlp.gate.weight[:, 0] = 20.0
                layer.mlp.gate.weight[gone, 0] = -20.0
        table = whole.model.embed_tokens.weight
        table[:] = torch.randn(table.shape, generator=draw)
        table[:, 0] = 4.0
    whole.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny(kind)).save_pretrained(tmp_path / "model")
    total = whole.config.num_local_experts
    seen: list[dict[str, Any]] = []
    note = Work.note

    def watch(self: Work, record: dict[str, Any]) -> Any:
        seen.append(record)
        return note(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "note", watch)
        api.compress(tmp_path / "model", tmp_path / "out", recipe=steps("expert-pruning", experts=total - 2), **RUN)
    (record,) = [x for x in seen if x["kind"] == "edit"]
    assert [n for n, _ in record["edit"]["experts"]] == [
        n for n in range(len(whole.model.layers)) if n != 1 or kind == "mixtral"
    ]
    for number, kept in record["edit"]["experts"]:
        assert set(range(total)) - set(kept) == {number, 3}
    ids = torch.randint(500, (2, 24), generator=torch.Generator().manual_seed(0))
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected, got = whole(ids).logits, smaller(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_router_goes_on_giving_weights_that_sum_to_one(tiny: Tiny, tmp_path: Path) -> None:
    api.compress(tiny("mixtral"), tmp_path / "out", recipe=steps("expert-pruning", ratio=0.25), **RUN)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    given: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: given.append(out[1]))
    with torch.no_grad():
        model(torch.arange(30)[None])
    for weights in given:
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


@pytest.mark.parametrize("stop", ["edit", "edit-score"])
def test_a_run_that_is_stopped_ends_with_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    recipe = steps("expert-merging", experts=2)
    api.compress(tiny("mixtral"), tmp_path / "whole", recipe=recipe, **RUN)
    note = Work.note
    found = []

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == stop:
            found.append(record)
            if len(found) == 2 or stop == "edit":
                raise KeyboardInterrupt
        return note(self, record)

    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("mixtral"), tmp_path / "out", recipe=recipe, **RUN)
    monkeypatch.undo()
    api.compress(tiny("mixtral"), tmp_path / "out", recipe=recipe, **RUN)
    first, second = (
        b"".join(p.read_bytes() for p in sorted((tmp_path / x).glob("*.safetensors"))) for x in ("whole", "out")
    )
    assert first == second


def test_models_without_experts_and_too_small_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no experts that a router"):
        api.plan(tiny("llama"), recipe=steps("expert-pruning"), **ROOM)
    with pytest.raises(PlanError, match="there are 4"):
        api.plan(tiny("mixtral"), recipe=steps("expert-merging", experts=5), **ROOM)
    with pytest.raises(LilliputError, match="larger top_k"):
        api.compress(tiny("mixtral"), tmp_path / "out", recipe=steps("router-pruning", top_k=1, keep=1.0), **RUN)
    assert not (tmp_path / "out").exists()


def test_every_tensor_of_a_pruned_folder_has_a_place(tiny: Tiny, tmp_path: Path) -> None:
    api.compress(tiny("mixtral"), tmp_path / "out", recipe=steps("expert-pruning", experts=3), **RUN)
    model = open_model(tmp_path / "out")
    assert model.carried == ()
    assert {x.expert for x in model.anatomy().blocks[0].linears} == {None, 0, 1, 2}
