"""What a plan says of a model that is large enough to weigh more than the files beside its weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lilliput import api
from lilliput.algebra import compiled
from lilliput.errors import PlanError
from lilliput.machine import memory
from lilliput.model.stored import open_model
from lilliput.plan.plan import Plan
from lilliput.progress import Quiet

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 2, "tokens": 16, "device": "cpu", "dtype": "float32"}


def plan(model: Path, recipe: str = "w4-engines", **more: Any) -> Plan:
    return api.plan(model, recipe=recipe, **(ROOM | more))


@pytest.mark.parametrize("recipe", ["magnitude", "w8"])
def test_the_folder_within_a_percent(tiny: Tiny, tmp_path: Path, recipe: str) -> None:
    settings = {"magnitude": (), "w8": ("rtn.search=minmax", "embed.search=minmax")}[recipe]
    done = api.compress(
        tiny("wide"), tmp_path / "out", recipe=recipe, settings=settings, eval_windows=0, progress=Quiet(), **ROOM
    )
    size = sum(x.stat().st_size for x in done.out.rglob("*") if x.is_file())
    assert size == done.folder_bytes
    assert done.plan.folder_bytes == pytest.approx(size, rel=0.01)
    assert done.plan.bytes == sum(x.stat().st_size for x in done.out.glob("*.safetensors"))


def test_parameters_and_bits(tiny: Tiny) -> None:
    made = plan(tiny("wide"))
    model = open_model(str(tiny("wide")))
    total = sum(x.nbytes // x.dtype.itemsize for x in model.source.stored.values())
    assert made.parameters == total
    # 4 bits, a half-precision scale for each 128 inputs, and a shape of two int64 for each linear
    linears = [x.linear for x in made.compressed]
    expected = 4 + 16 / 128 + 128 * len(linears) / sum(x.parameters for x in linears)
    assert made.bits_per_weight == pytest.approx(expected)
    untouched = sum(x.nbytes for x in made.tensors if x.kind != "quantized")
    quantized = sum(x.nbytes for x in made.tensors if x.kind == "quantized")
    assert made.model_bits_per_weight == pytest.approx(8 * (untouched + quantized) / total)


def test_json(tiny: Tiny) -> None:
    made = plan(tiny("llama"))
    said = json.loads(json.dumps(made.to_json()))
    for key in ("bytes", "bits_per_weight", "model_bits_per_weight", "peak_rss_bytes", "seconds", "tensors"):
        assert said[key]
    assert sum(x["bytes"] for x in said["tensors"]) < said["bytes"]
    assert {x["file"] for x in said["tensors"]} == set(made.shards)
    assert sum(x["bytes"] for x in said["by_kind"].values()) == sum(x["bytes"] for x in said["tensors"])


@pytest.mark.parametrize(
    "change",
    [{"threads": 7}, {"samples": 3}, {"tokens": 17}, {"budget": 10**9}, {"seed": 1}, {"fingerprint": "other"}],
)
def test_the_hash_holds_what_decides_the_bytes(tiny: Tiny, change: dict[str, Any]) -> None:
    made = plan(tiny("llama"))
    assert made.hash("data") == made.hash("data")
    assert made.hash("data") != made.hash("other data")
    assert replace(made, **change).hash("data") != made.hash("data")
    wider = replace(made.batching, batch=made.batching.batch + 1)
    assert replace(made, batching=wider).hash("data") != made.hash("data")


def test_sizes(tiny: Tiny) -> None:
    made = plan(tiny("llama"))
    assert plan(tiny("llama"), size=made.folder_bytes).folder_bytes == made.folder_bytes
    with pytest.raises(PlanError, match=r"17 bytes .* more than --size"):
        plan(tiny("llama"), size=made.folder_bytes - 17)


def test_budgets(tiny: Tiny) -> None:
    many = {"samples": 64, "tokens": 256}
    free = plan(tiny("wide"), **many)
    assert free.batching.lockstep
    tight = plan(tiny("wide"), memory=free.batching.bytes - 1, **many)
    assert tight.batching.bytes < free.batching.bytes
    with pytest.raises(PlanError, match="give --memory") as refused:
        plan(tiny("wide"), memory=1_000_000, **many)
    least = int(float(str(refused.value).split("give --memory ")[1].split("MB")[0]) * 1e6)
    assert plan(tiny("wide"), memory=least, **many).batching.bytes <= least
    with pytest.raises(PlanError, match="is too small"):
        plan(tiny("wide"), memory=least - 20_000, **many)


@pytest.mark.parametrize(
    ("name", "recipe", "said"),
    [
        ("qwen2", "michel-heads", "50.0% of the heads leave, where 25.0% was asked for"),
        ("llama", "slicegpt", "of the residual stream's channels leave, where 20.0% was asked for"),
        ("mixtral", "expert-pruning", None),
        ("llama", "sparsegpt", None),
    ],
)
def test_what_leaves_is_said_where_sizes_do_not_hold_the_ratio(
    tiny: Tiny, name: str, recipe: str, said: str | None
) -> None:
    notes = [
        x for x in api.plan(tiny(name), recipe=recipe, samples=2, tokens=16, device="cpu").notes if "asked for" in x
    ]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_a_menu_with_codes_counts_the_compiled_search(tiny: Tiny, tmp_path: Path) -> None:
    """The target that stands for a menu until it has decided has no codes of its own."""

    def peak(menu: str) -> int:
        path = tmp_path / "menu.yaml"
        path.write_text(
            f"steps:\n  - method: menu\n    options: {{menu: [{menu}], average: 4.0}}\n"
            "  - method: mixed\n    target: {bits: 2, group_size: 64, symmetric: false}\n"
        )
        return plan(tiny("wide"), str(path)).batching.bytes

    plain, coded = peak("int2/64/asym, int3/64/asym, int8/64/asym"), peak("int2/64/asym, int8/64/asym, trellis3")
    taken = compiled.MEMORY if compiled.available() else 0
    assert coded - plain == pytest.approx(taken * memory.SLACK, abs=2)
