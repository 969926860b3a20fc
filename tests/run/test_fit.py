"""A size or an average of bits goes in, a folder that keeps to it comes out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import api
from lilliput.errors import PlanError
from lilliput.model.stored import open_model
from lilliput.report import frontier as curve
from lilliput.report import table

Tiny = Callable[[str], Path]
SHORT: dict[str, Any] = {"samples": 3, "tokens": 32, "device": "cpu", "dtype": "float32"}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_folder_of_a_size(tiny: Tiny, tmp_path: Path) -> None:
    size = 4_000_000
    done = api.compress(tiny("wide"), tmp_path / "out", size=size, eval_windows=2, **SHORT)
    assert size_of(tmp_path / "out") <= size
    assert size_of(tmp_path / "out") > 0.995 * size
    said = done.to_json()
    assert said["predicted"]["kl"] > 0
    assert said["measured"]["kl"]["value"] > 0
    assert any("menu chose" in note for note in said["notes"])
    assert "KL divergence" in table.text(table.compress(said))


@pytest.mark.slow
def test_engines_read_a_mixture(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = api.compress(tiny("wide"), out, bits=3.6, menu=["compressed-tensors"], eval_windows=0, **SHORT)
    assert done.plan.bits_per_weight is not None
    assert 3.55 < done.plan.bits_per_weight <= 3.6
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert len(config["config_groups"]) > 1
    assert AutoModelForCausalLM.from_pretrained(out) is not None


def test_the_frontier_falls_and_is_shown(tiny: Tiny) -> None:
    data = api.frontier(tiny("llama"), **SHORT).to_json()
    points = data["frontier"]
    assert len(points) > 5
    assert all(a["kl"] > b["kl"] and a["folder_bytes"] < b["folder_bytes"] for a, b in itertools.pairwise(points))
    assert "29 x int8/64/asym" in table.text(curve.show(data), 200)
    page = curve.render(data)
    assert "<svg" in page
    assert "Predicted loss against bytes" in page


@pytest.mark.slow
def test_blocks_are_fitted_on_the_chosen_grids(tiny: Tiny, tmp_path: Path) -> None:
    chosen, kl = [], []
    for fitted in (False, True):
        out = tmp_path / f"out-{fitted}"
        done = api.compress(tiny("llama"), out, bits=3.8, menu=["integers"], fit_blocks=fitted, eval_windows=4, **SHORT)
        assert done.evaluation is not None
        chosen.append([x.scheme for x in done.plan.resolved.linears])
        kl.append(done.evaluation.to_json()["kl"]["value"])
    assert chosen[0] == chosen[1]
    assert kl[0] != kl[1]


def test_codes_between_rotations_are_not_fitted(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match="--fit-blocks: the codes of trellis2 cannot be fitted: take --menu integers"):
        api.plan(tiny("llama"), bits=3.8, fit_blocks=True, **SHORT)
    with pytest.raises(PlanError, match="--fit-blocks asks for a composition found by measuring"):
        api.plan(tiny("llama"), recipe="w4", fit_blocks=True, **SHORT)


@pytest.mark.slow
def test_a_menu_knows_pruning_too(tiny: Tiny, tmp_path: Path) -> None:
    """Half of the weights of some linears are nearly 0, so that codes without them are the best of their size."""
    model = AutoModelForCausalLM.from_pretrained(tiny("wide"))
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.weight[:, ::2] *= 1e-3
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("wide")).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    done = api.compress(tmp_path / "model", out, bits=4.0, menu=["prune", "integers"], eval_windows=2, **SHORT)
    assert done.plan.bits_per_weight is not None
    assert done.plan.bits_per_weight <= 4.0
    pruned = [x for x in done.plan.resolved.linears if x.pattern is not None]
    assert pruned
    assert all(x.linear.role in ("gate", "up", "down") for x in pruned)
    assert done.plan.bytes == sum(x.stat().st_size for x in out.glob("*.safetensors"))
    assert done.engine is not None
    assert not done.engine.problems
    weight = open_model(out).read(f"{pruned[0].name}.weight")
    n, m = (int(x) for x in (pruned[0].pattern or "").split(":"))
    assert int((weight.reshape(-1, m) != 0).sum(1).max()) <= n
