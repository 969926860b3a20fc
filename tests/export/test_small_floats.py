"""Small floats in compressed-tensors: the library's own bytes, what is refused, and folders in transformers as in our
own reader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from lilliput import api
from lilliput.errors import PlanError
from lilliput.export import layouts
from lilliput.export.compressed_tensors import CompressedTensors
from lilliput.export.engine import look
from lilliput.export.outcome import Outcome
from lilliput.formats import levels
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.model.stored import open_model
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.minifloat import GLOBAL, SCALE, FloatInput
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.progress import Quiet
from lilliput.streaming.walk import last_hidden
from lilliput.target import Target

Tiny = Callable[[str], Path]
UP = "model.layers.0.mlp.up_proj"
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
TOKEN, ONE = FloatInput("e4m3"), FloatInput("e4m3", "tensor", dynamic=False)
BLOCK = {
    "nvfp4": FloatInput("e2m1", "group", 16, "e4m3"),
    "mxfp4": FloatInput("e2m1", "group", 32, "e8m0-even"),
    "mxfp8": FloatInput("e4m3", "group", 32, "e8m0-even"),
}
PAIRS: list[tuple[str, InputSpec | None]] = [
    ("fp8", None), ("fp8", TOKEN), ("fp8", ONE), ("tensor", TOKEN),
    *((name, inputs) for name, own in BLOCK.items() for inputs in (None, own)),
]  # fmt: skip


def form(name: str) -> LevelFormat:
    if name == "tensor":
        return levels.from_target(Target(format="fp8", group_size="tensor"))
    return levels.from_target(Target(format=name))


def outcome(grid: Any, inputs: InputSpec | None = None, **more: Any) -> Outcome:
    plain = {"name": UP, "stored": UP, "out_features": 96, "in_features": 64, "dtype": torch.bfloat16} | more
    if isinstance(grid, LevelFormat) and plain["dtype"] == torch.bfloat16 and "keep" not in more:
        grid = levels.LevelFormat(grid.table, grid.bits, grid.group_size, _narrow(grid))
    plain.pop("keep", None)
    return Outcome(scheme=Scheme((QuantizedSpec(grid),), activation=inputs), **plain)


def _narrow(grid: LevelFormat) -> Any:
    plain = isinstance(grid.scales, levels.FloatScales)
    return levels.FloatScales(torch.bfloat16) if plain else grid.scales


def layer_of(x: Outcome, weight: Tensor | None = None) -> Layer:
    if weight is None:
        weight = torch.randn(x.out_features, x.in_features, generator=torch.Generator().manual_seed(3))
        weight = weight * torch.logspace(-2, 1, x.in_features)
        weight[5] = 0.0
    grid: Any = x.codes
    fitted = grid.fit(weight)
    layer = Layer(x.name, weight).with_part(QuantizedPart(grid, grid.encode(weight, fitted), fitted))
    spec = x.scheme.activation
    if spec is None:
        return layer
    tensors = {suffix: torch.full(shape, 0.37, dtype=dtype) for suffix, (dtype, shape) in spec.stored(64).items()}
    return Layer(layer.name, layer.weight, layer.parts, activation=InputGrid(spec, tensors))


def scheme(x: Outcome) -> tuple[QuantizationScheme, str]:
    entry = CompressedTensors().config([x], CONFIG)
    assert entry is not None
    config = QuantizationConfig.model_validate({k: v for k, v in entry.items() if k != "dequantize"})
    (group,) = config.config_groups.values()
    return group, str(entry["format"])


@pytest.mark.parametrize(("name", "inputs"), PAIRS)
def test_tensors_are_the_librarys_own(name: str, inputs: InputSpec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.export.small_floats.CHUNK", 700)  # several pieces
    x = outcome(form(name), inputs)
    layer = layer_of(x)
    tensors = CompressedTensors().pack(x, layer)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == CompressedTensors().describe(x)
    group, layout = scheme(x)
    assert layout == x.layout == infer_module_format(torch.nn.Linear, group).value
    part = layer.parts[0]
    assert isinstance(part, QuantizedPart)
    scale = part.grid.codes.expand(96, -1) if name == "tensor" else part.grid.codes
    state = {"weight": layer.decode(), "weight_scale": scale.float()}
    if name == "nvfp4":
        state |= {"weight_scale": scale.to(torch.uint8).view(torch.float8_e4m3fn).float()}
        state |= {"weight_global_scale": part.grid.second[0]}
    elif name in BLOCK:
        state |= {"weight_scale": part.grid.values()}
    # The library's fp8 weights keep the sign of a weight that rounds to 0; codes have one zero.
    theirs = BaseCompressor.get_value_from_registry(layout).compress(state, group)
    own = {n.removeprefix(f"{UP}."): t for n, t in tensors.items() if "input" not in n}
    assert set(own) == set(theirs)
    for suffix, tensor in own.items():
        expected = theirs[suffix].to(tensor.dtype) if suffix == "weight_scale" else theirs[suffix]
        assert torch.equal(tensor.view(torch.uint8), expected.contiguous().view(torch.uint8)), suffix
    decoded = BaseCompressor.get_value_from_registry(layout).decompress(own, group)["weight"]
    assert torch.equal(decoded, layer.decode().to(torch.bfloat16))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_a_table_is_packed_in_pieces_as_it_is_whole(name: str) -> None:
    x = outcome(form(name), ONE if name == "fp8" else BLOCK[name], table=True)
    whole = layer_of(x)
    pieces = [CompressedTensors().pack_rows(x, whole.rows(a, a + 32, UP), a) for a in (0, 32, 64)]
    for tensor_name, tensor in CompressedTensors().pack(x, whole).items():
        joined = torch.cat([p[tensor_name].view(torch.uint8) for p in pieces if tensor_name in p])
        assert torch.equal(joined, tensor.view(torch.uint8)), tensor_name


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (outcome(levels.from_target(Target(format="fp8", group_size=32))), "Nearest: format fp8 with group_size chan"),
        (outcome(levels.from_target(Target(format="e5m2"))), "Nearest: format fp8;"),
        (outcome(levels.from_target(Target(format="fp4"))), "Nearest: format nvfp4 or mxfp4;"),
        (outcome(levels.from_target(Target(format="nf4"))), "Nearest: rtn or gptq with format int;"),
        (outcome(form("fp8"), UniformInput(8)), "Nearest: minifloat with format fp8, by token"),
        (outcome(form("fp8"), FloatInput("e4m3", clip=0.9)), "of a kind or range"),
        (outcome(form("nvfp4"), TOKEN), "Nearest: minifloat with format nvfp4;"),
        (outcome(form("mxfp4"), FloatInput("e2m1", "group", 32, "e8m0")), "format mxfp4 and power: even"),
        (outcome(IntegerFormat(8, True, -1), TOKEN), "Nearest: act-static-dynamic"),
        (outcome(form("fp8"), keep=True), "Nearest: scale_dtype bfloat16"),
        (outcome(form("nvfp4"), in_features=72), "format fp8, with a scale for each row, always fits"),
        (outcome(form("mxfp4"), BLOCK["mxfp4"], dtype=torch.float32), "a model in bfloat16 .this one is float32"),
        (outcome(IntegerFormat(8, False, -1), UniformInput(8)), "decodes this folder while it loads for the int8"),
        (outcome(IntegerFormat(8, True, -1, torch.bfloat16), UniformInput(8), expert=True), "runs all experts as one"),
        (outcome(form("fp8"), expert=True), "small floats in experts were tried in no engine"),
    ],
)
def test_refuses_with_the_nearest_that_loads(x: Outcome, message: str) -> None:
    reason = CompressedTensors().refuse([x], CONFIG)
    assert reason is not None
    assert re.search(message, reason), reason


@pytest.mark.parametrize(
    ("x", "runs"),
    [
        (outcome(IntegerFormat(8, True, -1, torch.bfloat16), UniformInput(8)), True),
        (outcome(IntegerFormat(8, True, -1, torch.bfloat16), UniformInput(8, "tensor", dynamic=False)), True),
        (outcome(IntegerFormat(8, True, 32, torch.bfloat16), UniformInput(8)), False),
        (outcome(IntegerFormat(8, True, -1, torch.bfloat16)), False),
        (outcome(IntegerFormat(4, True, 32, torch.bfloat16), UniformInput(8)), True),
        (outcome(form("fp8"), TOKEN), True),
        (outcome(form("fp8"), ONE), False),
        (outcome(form("fp8")), False),
        (outcome(form("mxfp8")), False),
    ],
)
def test_the_plan_says_what_vllm_runs_on_a_cpu(x: Outcome, runs: bool) -> None:
    note = CompressedTensors().dense_note([x])
    assert note is not None
    assert ("vLLM on a CPU refuses this file" not in note) is runs
    eight = x.layout in (layouts.WHOLE, layouts.FLOAT)
    assert ("rounds inputs as this plan does" in note) is (runs and eight)
    assert ("with inputs as they are" in note) is (runs and not eight)


def test_the_plan_says_what_vllm_makes_of_global_scales() -> None:
    names = [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")]
    found = [outcome(form("nvfp4"), name=x) for x in names]
    assert "takes one global scale of nvfp4 for gate_proj, up_proj" in (CompressedTensors().dense_note(found) or "")
    assert "global scale" not in (CompressedTensors().dense_note(found[1:]) or "")
    shared = [outcome(form("nvfp4"), name=x, stack=names[0]) for x in names[:2]]
    assert "global scale" not in (CompressedTensors().dense_note(shared) or "")


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["rtn", "gptq", "differ"])
def test_linears_that_engines_run_as_one_share_a_global_scale(tiny: Tiny, tmp_path: Path, steps: str) -> None:
    """And what is written is what the plan's layers compute: their codes on that scale."""
    weights = "  - {{method: {}, target: {{format: nvfp4}}{}}}\n"
    inputs = "  - {method: minifloat, target: {format: nvfp4}}\n"
    own = weights.format(steps, "")
    if steps == "differ":
        own = weights.format("gptq", ", where: {include: ['*.q_proj']}") + weights.format(
            "rtn", ", where: {exclude: ['*.q_proj']}"
        )
    recipe = f"export: compressed-tensors\nsteps:\n{own}{inputs}"
    source = tf.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16)
    for x in ("v_proj", "up_proj"):  # whose own global scales would be others
        for name, value in source.named_parameters():
            if name.endswith(f"{x}.weight"):
                value.data *= 3
    source.save_pretrained(tmp_path / "source")
    for x in tiny("llama").iterdir():
        if not (tmp_path / "source" / x.name).exists():
            (tmp_path / "source" / x.name).write_bytes(x.read_bytes())
    out = tmp_path / "out"
    done = api.compress(tmp_path / "source", out, recipe=recipe, samples=2, tokens=32, eval_windows=0, progress=Quiet())
    said = any("takes one global scale" in x for x in done.plan.notes)
    assert said == (steps == "differ")
    tensors = load_file(out / "model.safetensors")
    model, before = open_model(out), open_model(tmp_path / "source")
    for n in range(4):
        for place, names in {"self_attn": "qkv", "mlp": ("gate", "up")}.items():
            prefixes = [f"model.layers.{n}.{place}.{x}_proj" for x in names]
            first, *others = (tensors[f"{x}.weight_global_scale"] for x in prefixes)
            assert all(torch.equal(first, x) for x in others) == (steps != "differ" or place == "mlp")
            if steps != "rtn":
                continue
            together = torch.cat([before.read(f"{x}.weight").float() for x in prefixes])
            grid = form("nvfp4").fit(together, search="mse", importance=None)
            assert torch.equal(grid.second[0], first)
            ends = torch.cat([model.read(f"{x}.weight").float() for x in prefixes])
            scale = torch.cat([tensors[f"{x}.weight_scale"].float() for x in prefixes]) / first
            codes = ends.view(len(ends), -1, 16) / scale[..., None]
            nearest = form("nvfp4").on(ends).levels
            assert float((codes[..., None] - nearest).abs().amin(-1).max()) < 0.03  # read in bfloat16
            assert float((ends - together).norm() / together.norm()) < 0.12


def test_two_layouts_in_one_folder_name_their_linears() -> None:
    down = outcome(IntegerFormat(8, True, -1, torch.bfloat16), UniformInput(8), name="model.layers.0.mlp.down_proj")
    found = [outcome(form("fp8"), TOKEN), down]
    assert CompressedTensors().refuse(found, CONFIG) is None
    entry = CompressedTensors().config(found, CONFIG)
    assert entry is not None
    assert entry["format"] == "mixed-precision"
    assert {x["format"] for x in entry["config_groups"].values()} == {layouts.FLOAT, layouts.WHOLE}


def recipe(name: str, inputs: str, more: str = "") -> str:
    scales = ", scale_dtype: bfloat16, group_size: channel" if name == "fp8" else ""
    steps = f"export: compressed-tensors\nsteps:\n  - {{method: rtn, target: {{format: {name}{scales}}}}}\n"
    return steps + (f"  - {{method: minifloat, target: {{format: {inputs}}}{more}}}\n" if inputs else "")


FOLDERS = [
    ("fp8", "", "", "float32"),
    ("fp8", "fp8", "", "float32"),
    ("fp8", "fp8", ", options: {dynamic: false}", "bfloat16"),
    ("nvfp4", "", "", "float32"),
    ("nvfp4", "nvfp4", "", "bfloat16"),
    ("mxfp4", "", "", "bfloat16"),
    ("mxfp4", "mxfp4", ", options: {power: even}", "bfloat16"),
    ("mxfp8", "mxfp8", ", options: {power: even}", "bfloat16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("name", "inputs", "more", "dtype"), FOLDERS)
def test_a_folder_computes_in_transformers_what_our_own_reader_does(
    name: str, inputs: str, more: str, dtype: str, kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    kept, source = getattr(torch, dtype), tmp_path / "source"
    tf.AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=kept).save_pretrained(source)
    tf.AutoTokenizer.from_pretrained(tiny(kind)).save_pretrained(source)
    api.compress(
        source, tmp_path / "out", recipe=recipe(name, inputs, more), samples=2, tokens=32, eval_windows=0,
        progress=Quiet(),
    )  # fmt: skip
    seen = look(tmp_path / "out")
    assert not seen.problems
    assert seen.logits is not None
    assert seen.logits < (1e-5 if inputs or dtype == "float32" else 2e-2)
    entry = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert entry.get("dequantize", False) is (name in BLOCK and dtype == "float32")
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=kept)(ids, use_cache=False).logits
    model = open_model(tmp_path / "out", dtype=torch.float32)
    states = last_hidden(model, ids, tmp_path)
    model.load(model.skeleton.final)
    model.load([model.skeleton.head])
    ours = model.skeleton.logits(model.skeleton.finish(states.read(0, 1)))
    # A model that runs in bfloat16 rounds everything, and codes of inputs move with it.
    assert float((ours - theirs).norm() / ours.norm()) < (1e-5 if dtype == "float32" else 0.4 if inputs else 0.05)


def test_static_scales_are_where_engines_look_for_them() -> None:
    x = outcome(form("fp8"), ONE)
    layer = layer_of(x)
    assert layer.activation is not None
    assert torch.equal(CompressedTensors().pack(x, layer)[f"{UP}.input_scale"], layer.activation.tensors[SCALE])
    x = outcome(form("nvfp4"), BLOCK["nvfp4"])
    layer = layer_of(x)
    assert layer.activation is not None
    assert torch.equal(CompressedTensors().pack(x, layer)[f"{UP}.input_global_scale"], layer.activation.tensors[GLOBAL])


def test_formats_that_convert_does_not_copy_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    steps = recipe("fp8", "").replace("compressed-tensors", "lilliput")
    api.compress(tiny("llama"), tmp_path / "out", recipe=steps, samples=2, tokens=32, eval_windows=0, progress=Quiet())
    with pytest.raises(PlanError):
        api.convert(tmp_path / "out", tmp_path / "to", to="compressed-tensors")
