"""A quantized base with a LoRA adapter: together the weights of the folder."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lilliput import api
from lilliput.errors import PlanError
from lilliput.export.convert.adapter import CONVERTER
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.linear import parse_config
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.part import PartSpec
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.source import open_source

Made = Callable[..., Path]
CODES = "bits: 4, group_size: 32"
EVEN = "{method: lorc, target: {rank: 4}, options: {factors: float16}}"
UNEVEN = (
    "{method: lorc, target: {rank: 6}, where: {include: ['*down_proj']}}",
    "{method: lorc, target: {rank: 3}, options: {factors: int8}, where: {exclude: ['*q_proj', '*down_proj']}}",
)
KEY = "base_model.model."


def same(folder: Path, out: Path) -> dict[str, int]:
    """Compares every tensor, by the layout's description. Returns the rank of each linear."""
    whole, base = open_source(str(folder)), open_source(str(out / "base"))
    held = load_file(out / "adapter" / "adapter_model.safetensors")
    ranks: dict[str, int] = {}
    assert set(whole.stored) == set(base.stored)
    for name in whole.stored:
        value = base.read(name).float()
        a = held.pop(f"{KEY}{name.removesuffix('.weight')}.lora_A.weight", None)
        if a is not None:
            b = held.pop(f"{KEY}{name.removesuffix('.weight')}.lora_B.weight")
            ranks[name.removesuffix(".weight")] = len(a)
            value = value + b.float() @ a.float()
        assert torch.equal(whole.read(name).float(), value), name
    assert not held
    return ranks


def config(out: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((out / "adapter" / "adapter_config.json").read_text())
    return plain


@pytest.mark.filterwarnings("ignore")
def test_base_and_adapter_are_the_folder(made: Made, tmp_path: Path) -> None:
    folder = made("qwen2", CODES, EVEN)
    done = api.convert(folder, tmp_path / "out", to="adapter")
    ranks = same(folder, done.out)
    assert len(ranks) == 14
    assert set(ranks.values()) == {4}
    plain = config(done.out)
    assert (plain["peft_type"], plain["r"], plain["lora_alpha"], plain["rank_pattern"]) == ("LORA", 4, 4, {})
    assert sorted(plain["target_modules"]) == sorted(ranks)
    held = load_file(done.out / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in held.values()} == {torch.float16}
    assert done.bytes == sum(x.stat().st_size for x in done.out.rglob("*") if x.is_file())
    assert sum(done.types.values()) > sum(x.nbytes for x in held.values())
    assert api.verify(done.out / "base").whole
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out"]


@pytest.mark.filterwarnings("ignore")
def test_ranks_that_differ_and_factors_of_integers(made: Made, tmp_path: Path) -> None:
    folder = made("llama", CODES, *UNEVEN)
    done = api.convert(folder, tmp_path / "out", to="adapter")
    ranks = same(folder, done.out)
    assert {name.rsplit(".")[-1]: rank for name, rank in ranks.items()} == {
        "down_proj": 6, "gate_proj": 3, "up_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 3,
    }  # fmt: skip
    plain = config(done.out)
    assert plain["r"] == plain["lora_alpha"] == 6
    assert plain["rank_pattern"] == plain["alpha_pattern"] == {x: 3 for x, rank in ranks.items() if rank == 3}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "steps"), [("qwen2", (EVEN,)), ("llama", UNEVEN)])
def test_peft_computes_the_same(made: Made, tmp_path: Path, name: str, steps: tuple[str, ...]) -> None:
    from peft import PeftModel  # type: ignore[import-not-found, unused-ignore]

    folder = made(name, CODES, *steps)
    out = api.convert(folder, tmp_path / "out", to="adapter").out
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        alone = base(ids).logits
        theirs = PeftModel.from_pretrained(base, out / "adapter")(ids).logits
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.abs().max())
    assert float((ours - alone).abs().max()) > 1e-2 * float(ours.abs().max())


def linear(*parts: PartSpec, **more: bool) -> Outcome:
    return Outcome("a.q_proj", "a.q_proj", 64, 64, Scheme(parts), torch.float32, **more)


INT, LOW = QuantizedSpec(IntegerFormat(4, True, 32)), LowRankSpec(4)


@pytest.mark.parametrize(("outcome", "says"), [
    (linear(INT), "none of its linears has a part of low rank.*Nearest: compressed-tensors, or a recipe with eora"),
    (linear(LOW), r"'a.q_proj' is rank 4 \(float16\), and an adapter goes with integers and parts of low rank"),
    (linear(LOW, INT), "goes with integers and parts of low rank"),
    (linear(INT, LOW, INT), "goes with integers and parts of low rank"),
    (linear(INT, LOW, table=True), "'a.q_proj' is an embedding, a head, an expert or stored"),
    (linear(QuantizedSpec(IntegerFormat(4, True, 48)), LOW), "groups of 48 do not divide the 64 inputs of 'a.q_proj'"),
])  # fmt: skip
def test_what_it_cannot_hold_is_named(outcome: Outcome, says: str) -> None:
    assert CONVERTER.refuse([linear(INT, LOW)], LlamaConfig()) is None
    reason = CONVERTER.refuse([outcome], LlamaConfig())
    assert reason is not None
    assert re.search(says, reason)


def test_a_folder_without_parts_of_low_rank(made: Made, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be written as adapter: none of its linears has a part of low rank"):
        api.convert(made("qwen2", CODES), tmp_path / "out", to="adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_the_low_rank_parts_are_those_of_the_folder(made: Made, tmp_path: Path) -> None:
    """What is adapted is what config.json tells of."""
    folder = made("qwen2", CODES, EVEN)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    low = {name for name, spec in parse_config(entry).items() if len(spec.scheme.parts) == 2}
    done = api.convert(folder, tmp_path / "out", to="adapter")
    assert set(config(done.out)["target_modules"]) == low
