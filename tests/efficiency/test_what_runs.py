"""Operations of a folder in the native layout, counted from its headers, against those that torch carries out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lilliput
from lilliput import api
from lilliput.efficiency.counts import count, flops, prefill_flops, serving_of
from lilliput.efficiency.devices import Device
from lilliput.efficiency.roofline import operators, workload
from lilliput.efficiency.shapes import Shapes, shapes_of
from lilliput.efficiency.zeros import count_zeros
from lilliput.model.stored import Model, open_model
from lilliput.progress import Quiet

GROUPS = "group_size: 16"
RECIPES = {
    "product": "steps:\n  - {method: svd-truncate, target: {ratio: 0.5}}\n",
    "quantized product": "steps:\n  - {method: lplr, target: {rank: 6}}\n",
    "codes and product": f"steps:\n  - {{method: rtn, target: {{bits: 4, {GROUPS}}}}}\n"
    "  - {method: lorc, target: {rank: 5}}\n",
    "codes and outliers": "steps:\n  - {method: spqr, target: {bits: 3, group_size: 16}, options: {share: 0.05}}\n",
    "codes and columns": "steps:\n  - {method: owq, target: {bits: 3}, options: {columns: 3}}\n",
    "pattern": 'export: lilliput\nsteps:\n  - {method: wanda, target: {pattern: "2:4"}}\n',
    "codes": f"export: lilliput\nsteps:\n  - {{method: rtn, target: {{bits: 4, {GROUPS}}}}}\n",
    "binary codes": "steps:\n  - {method: bcq, target: {format: binary, bits: 3, group_size: 16}}\n",
    "codes between products": "steps:\n  - {method: quip, target: {bits: 4, group_size: 16}, "
    "options: {turn: kronecker, diagonal: false}}\n",
}


@pytest.fixture(scope="module")
def written(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / "out"
            api.compress(
                tiny("llama"), made[kind], recipe=RECIPES[kind], samples=2, tokens=16, device="cpu", dtype="float32",
                eval_windows=0, progress=Quiet(),
            )  # fmt: skip
        return made[kind]

    return make


def opened(path: Path) -> tuple[Model, Shapes]:
    model = open_model(str(path))
    return model, shapes_of(model)


def carried_out(module: Any, tokens: int) -> int:
    """Operations of matrix products while a linear runs, its decoding included."""
    x = torch.randn(tokens, module.in_features, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if kind != "binary codes"])
def test_what_is_counted_is_what_runs(written: Callable[[str], Path], kind: str) -> None:
    model, shapes = opened(written(kind))
    served = serving_of(model, shapes)
    whole: Any = lilliput.load(written(kind))
    for x in shapes.matrices:
        if x.block is not None:
            held, module = served[x.tensor], whole.get_submodule(x.tensor.removesuffix(".weight"))
            for tokens in (1, 7):
                wanted = float(x.flops) * held.keep * tokens + held.forming * x.weights
                assert carried_out(module, tokens) == pytest.approx(wanted, rel=1e-12)


def test_a_product_costs_its_two_thin_ones(tiny: Callable[[str], Path], written: Callable[[str], Path]) -> None:
    base, shapes = opened(tiny("llama"))
    model, ours = opened(written("product"))
    served = serving_of(model, ours)
    thin = [x for x in ours.matrices if x.block is not None]
    ranks = {x.tensor: int(0.5 * x.weights / (x.out_features + x.in_features)) for x in thin}
    saved = sum(2 * (x.weights - ranks[x.tensor] * (x.out_features + x.in_features)) for x in thin)
    assert saved > 0
    for context in (1, 9):
        before, after = flops(shapes, context), flops(ours, context, served)
        assert before.decode - after.decode == pytest.approx(saved)
        assert before.prefill - after.prefill == pytest.approx(saved)
    assert prefill_flops(shapes, 2, 8) - prefill_flops(ours, 2, 8, served) == pytest.approx(2 * 8 * saved)
    found = count(model, base, context=9)
    assert found.base_flops_per_token is not None
    assert found.flops_per_token.decode == found.base_flops_per_token.decode - saved
    assert found.base_flops_per_token == flops(shapes, 9)
    assert found.ram_bytes < (found.base_ram_bytes or 0)
    zeros = count(model, zeros=count_zeros(model, ours))
    assert (zeros.macs_saved, zeros.macs_saved_share) == (0, 0.0)


def test_a_term_that_is_decoded_costs_once_a_pass(written: Callable[[str], Path]) -> None:
    """2 rank out in for each linear: alone for one token, shared by those of a prefill."""
    model, shapes = opened(written("codes and product"))
    served = serving_of(model, shapes)
    forming = sum(2 * 5 * x.weights for x in shapes.matrices if x.block is not None)
    plain = flops(shapes, 9)
    assert flops(shapes, 9, served).decode - plain.decode == pytest.approx(forming)
    assert flops(shapes, 9, served).prefill - plain.prefill == pytest.approx(forming / 9)
    assert prefill_flops(shapes, 1, 9, served) == prefill_flops(shapes, 1, 9)


def test_the_roofline_of_factors_by_hand(written: Callable[[str], Path], device: Device) -> None:
    model, shapes = opened(written("product"))
    work = workload(model, device, dtype=torch.bfloat16)
    (gate,) = [x for x in operators(work, device, "decode", 3, 10) if x.name == "gate"]
    count_, (out, into) = shapes.blocks, (128, 64)
    rank = int(0.5 * out * into / (out + into))
    factors = rank * (out + into)
    assert gate.flops == pytest.approx(count_ * 3 * 2 * factors)
    through = 3 * 2 * (into + 2 * rank + out)
    stored = 2 * factors  # float16; decoded to the model's type in each pass
    assert gate.bytes == pytest.approx(count_ * (stored + 2 * 2 * factors + through))


def test_the_roofline_of_a_sum_by_hand(written: Callable[[str], Path], device: Device) -> None:
    model, shapes = opened(written("codes and product"))
    fast = Device("fast", "fast", {"fp32": 500.0, "bf16": 1000.0}, 1e12, 1e9)
    work = workload(model, fast, dtype=torch.bfloat16)
    (gate,) = [x for x in operators(work, fast, "decode", 3, 10) if x.name == "gate"]
    dense, forming = shapes.blocks * 3 * 2 * 128 * 64, shapes.blocks * 2 * 5 * 128 * 64
    assert gate.flops == pytest.approx(dense + forming)
    assert gate.seconds == pytest.approx(dense / 1000 + forming / 500)


def test_tables_in_place_of_a_decoded_weight(written: Callable[[str], Path], device: Device) -> None:
    """3 planes: up to 5 tokens at once are looked up; a token takes the tables, the look-ups and the groups' scales."""
    model, shapes = opened(written("binary codes"))
    served = serving_of(model, shapes)
    (gate, *_) = [x for x in shapes.matrices if x.role == "gate"]
    held = served[gate.tensor]
    one = 2 * 256 * 64 + 3 * 128 * 64 // 8 + 2 * 128 * (64 // 16) * 4
    assert held.at(5).keep * float(gate.flops) == pytest.approx(one)
    assert (held.at(5).decoded, held.at(6).decoded) == (0.0, 2 * 4)
    assert held.at(6).keep == 1.0
    whole: Any = lilliput.load(written("binary codes"))
    module = whole.get_submodule(gate.tensor.removesuffix(".weight"))
    dense = 2 * 128 * 64
    assert carried_out(module, 6) == 6 * dense, "decoded"
    assert carried_out(module, 5) < 5 * one, "torch counts products alone: the tables and the offsets"
    few, many = flops(shapes, 5, served), flops(shapes, 6, served)
    assert few.decode == pytest.approx(many.decode - (flops(shapes, 6).decode - flops(shapes, 5).decode))
    saved = sum(float(x.flops) * (1 - served[x.tensor].at(1).keep) for x in shapes.matrices)
    assert flops(shapes, 5).prefill - few.prefill == pytest.approx(saved)
    assert flops(shapes, 6).prefill == pytest.approx(many.prefill)
    ours = Device("cpu", "cpu", {"fp32": 500.0, "bf16": 1000.0}, 10.0, 1e9, runtime="transformers")
    work = workload(model, ours)
    (row,) = [x for x in operators(work, ours, "decode", 2, 10) if x.name == "gate"]
    stored = served[gate.tensor].bits / 8 * gate.weights
    assert row.bytes == pytest.approx(shapes.blocks * (stored + 2 * 4 * (64 + 128)))
