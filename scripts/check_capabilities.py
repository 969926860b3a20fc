"""Check what the installed transformers loads from compressed-tensors folders against the committed table.

    python scripts/check_capabilities.py            # compare, exit status 1 where the table is wrong
    python scripts/check_capabilities.py --write    # measure again and update the installed version's column

Each case writes a tiny random model twice, packed by lilliput's exporter (even where that would refuse) and decoded by
lilliput, opens both with AutoModelForCausalLM.from_pretrained, and compares logits: "exact" (equal to the bit),
"tolerance" (within TOLERANCE of the largest logit) or "fails: why". Where inputs are rounded, lilliput rounds those of
the decoded model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

import lilliput.export
from lilliput.export.compressed_tensors import CompressedTensors
from lilliput.export.outcome import Outcome
from lilliput.formats import levels
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.scales import FloatScales
from lilliput.parts.inputs.grid import InputGrid, InputSpec
from lilliput.parts.inputs.minifloat import FloatInput
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import quantized
from lilliput.runtime import inputs
from lilliput.target import Target

TABLE = Path(lilliput.export.__file__).with_name("capabilities.json")
TOLERANCE = 1e-3
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, **HEADS}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, **MOE, decoder_sparse_step=2, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}
FORMATS = {"FP8": "fp8", "NVFP4": "nvfp4", "MXFP4": "mxfp4", "MXFP8": "mxfp8"}
INPUTS: dict[str, InputSpec] = {
    "inputs by token": UniformInput(8),
    "inputs by token, asym": UniformInput(8, symmetric=False),
    "inputs with one static scale": UniformInput(8, "tensor", dynamic=False),
    "inputs with one static scale, asym": UniformInput(8, "tensor", symmetric=False, dynamic=False),
    "FP8, inputs by token": FloatInput("e4m3"),
    "FP8, inputs with one static scale": FloatInput("e4m3", "tensor", dynamic=False),
}
STATIC = {SCALE: torch.tensor([0.03]), ZERO: torch.tensor([3], dtype=torch.int32)}  # of inputs of a tiny random model


@dataclass(frozen=True)
class Case:
    """One row of the table. `group`: inputs per scale, -1 per output row, 0 per tensor."""

    kind: str
    model: str
    bits: int
    symmetric: bool
    group: int = 32
    dtype: str = "float32"
    scale: str = "float16"

    @property
    def tolerance(self) -> float:
        """Of logits, relative to the largest: the library decodes nvfp4 in bfloat16, whatever the model's dtype."""
        return 5 * TOLERANCE if self.kind == "NVFP4" and self.dtype == "float32" else TOLERANCE

    @property
    def inputs(self) -> InputGrid | None:
        """How inputs of the linears that are compressed are rounded; None: they are not."""
        spec = INPUTS.get(self.kind)
        return None if spec is None else InputGrid(spec, {x: STATIC[x].clone() for x in spec.stored(1)})

    def format(self, linear: str) -> IntegerFormat | LevelFormat | None:
        """What a linear of the case's model becomes; None: it stays dense."""
        bits, group = self.bits, self.group
        expert = ".experts." in linear
        if linear.endswith(("mlp.gate", "lm_head")) and self.kind != "head":
            return None
        if self.kind == "dense experts" and expert:
            return None
        if self.kind == "mixed bits" and ".down_proj" in linear:
            bits = 8
        if self.kind == "mixed groups" and ".down_proj" in linear:
            group = -1
        if self.kind == "mixed experts" and not expert:
            bits = 8
        small = FORMATS.get(self.kind.split(",")[0])
        if small is not None:
            form = levels.from_target(Target(format=small))
            plain = isinstance(form.scales, FloatScales)
            return replace(form, scales=FloatScales(getattr(torch, self.scale))) if plain else form
        return IntegerFormat(bits, self.symmetric, group, getattr(torch, self.scale))


def cases() -> Iterator[Case]:
    """All rows, in the order of the table."""
    for symmetric in (True, False):
        for bits in range(2, 9):
            for group in (32, -1, 0):
                yield Case("plain", "llama", bits, symmetric, group)
    for symmetric in (True, False):
        for bits in (4, 8):
            for dtype in ("float16", "bfloat16"):
                yield Case("plain", "llama", bits, symmetric, 32, dtype, dtype)
        for dtype, scale in (("float32", "float32"), ("bfloat16", "float16"), ("bfloat16", "float32")):
            yield Case("other scales", "llama", 4, symmetric, 32, dtype, scale)
        yield Case("biases, tied head", "qwen2", 4, symmetric)
        yield Case("head", "llama", 4, symmetric)
        yield Case("mixed bits", "llama", 4, symmetric)
        yield Case("mixed groups", "llama", 4, symmetric)
        yield Case("ragged", "llama", 4, symmetric, 48)
        yield Case("conv1d", "gpt2", 4, symmetric)
        for bits in (3, 4, 8):
            yield Case("experts", "qwen3_moe", bits, symmetric)
        yield Case("experts", "qwen3_moe", 4, symmetric, -1)
        yield Case("experts", "qwen3_moe", 4, symmetric, 32, "float32", "float32")
        yield Case("experts", "qwen3_moe", 4, symmetric, 32, "bfloat16", "bfloat16")
        yield Case("dense experts", "qwen3_moe", 4, symmetric)
        yield Case("mixed experts", "qwen3_moe", 4, symmetric)
    for kind, spec in INPUTS.items():
        for model in ("llama", "qwen2"):
            yield Case(kind, model, 8, True, -1, "float32", "float32")
        if isinstance(spec, UniformInput):
            yield Case(kind, "llama", 4, True)
    yield Case("inputs by token", "llama", 8, False, -1)
    yield Case("inputs by token", "qwen3_moe", 8, True, -1)
    for dtype in ("float32", "bfloat16"):
        yield Case("FP8", "llama", 8, True, -1, dtype, dtype)
        for name, bits, group in (("NVFP4", 4, 16), ("MXFP4", 4, 32), ("MXFP8", 8, 32)):
            yield Case(name, "llama", bits, True, group, dtype, "own")


def outcomes(case: Case, weights: dict[str, torch.Tensor]) -> list[Outcome]:
    """The linears of a stored model, by file name (which these models share with their module trees)."""
    rows = []
    for name, weight in weights.items():
        stored = name.removesuffix(".weight")
        if weight.dim() != 2 or "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            continue
        conv = case.model == "gpt2" and stored != "lm_head"
        out, width = reversed(weight.shape) if conv else weight.shape
        expert = ".experts." in stored
        scheme = quantized(case.format(stored))
        if scheme.parts and case.inputs is not None:
            scheme = replace(scheme, activation=case.inputs.spec)
        rows.append(Outcome(stored, stored, out, width, scheme, weight.dtype, transposed=conv, expert=expert))
    return rows


def stored_weights(case: Case, config: PretrainedConfig, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """The random model of a case as `save_pretrained` stores it, in `folder` or for a moment."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            return stored_weights(case, config, Path(place))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype)).save_pretrained(folder)
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return weights


def write(case: Case, exporter: lilliput.export.Exporter, folder: Path) -> tuple[Path, Path, list[Outcome]]:
    """The case's model as `exporter` packs it and as lilliput decodes it: two folders, and the outcomes."""
    config = CONFIGS[case.model]()
    dense, packed = folder / "dense", folder / "packed"
    weights = stored_weights(case, config, dense)
    linears = outcomes(case, weights)
    tensors = dict(weights)
    for x in linears:
        weight = tensors.pop(f"{x.stored}.weight").float()
        layer = Layer(x.name, weight.T.contiguous() if x.transposed else weight)
        form = x.scheme.weights.grid
        if form is not None:
            grid = form.fit(layer.weight)
            layer = layer.with_part(QuantizedPart(form, form.encode(layer.weight, grid), grid))
            layer = replace(layer, activation=case.inputs)
        decoded = layer.decode().to(x.dtype)
        weights[f"{x.stored}.weight"] = (decoded.T if x.transposed else decoded).contiguous()
        tensors |= exporter.pack(x, layer)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    plain = json.loads((dense / "config.json").read_text())
    plain["quantization_config"] = exporter.config(linears, config)
    (packed / "config.json").write_text(json.dumps(plain))
    return dense, packed, linears


def logits(folder: Path, rounded: Mapping[str, InputGrid]) -> torch.Tensor:
    """What transformers computes from a folder, in the dtype that its config names; `rounded`: the inputs of these
    linears by lilliput's own code."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for name, grid in rounded.items():
        inputs.attach(model.get_submodule(name), inputs.Rounding(grid))
    with torch.no_grad():
        scores: torch.Tensor = model(input_ids=torch.arange(32).unsqueeze(0), use_cache=False).logits.float()
    return scores


def measure(case: Case, exporter: lilliput.export.Exporter | None = None) -> str:
    """ "exact", "tolerance" or "fails: why" with the installed transformers."""
    with tempfile.TemporaryDirectory() as place:
        try:
            dense, packed, linears = write(case, exporter or CompressedTensors(), Path(place))
            grid = case.inputs
            names = [x.name for x in linears if x.scheme.activation is not None]
            reference = logits(dense, {} if grid is None else dict.fromkeys(names, grid))
            packed_logits = logits(packed, {})
        except Exception as error:  # whatever the engine raises is the finding
            return f"fails: {type(error).__name__}"
    if torch.equal(reference, packed_logits):
        return "exact"
    difference = float((reference - packed_logits).abs().max() / reference.abs().max())
    return "tolerance" if difference <= case.tolerance else "fails: wrong logits"


def read_table() -> dict[str, Any]:
    """The committed table."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.is_file() else {"cases": []}
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update the table instead of comparing")
    writing = parser.parse_args().write
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    version = transformers.__version__
    table = read_table()
    # A version without a column should do what the newest one with a column does.
    columns = sorted(table.get("compressed-tensors", {}), key=Version)
    column = version if version in columns or not columns else columns[-1]
    by_case = {json.dumps(row["case"]): row["transformers"] for row in table["cases"]}
    rows, wrong = [], 0
    for case in cases():
        plain = asdict(case)
        result = measure(case)
        before = by_case.get(json.dumps(plain), {})
        rows.append({"case": plain, "transformers": dict(sorted({**before, version: result}.items()))})
        if before.get(column) != result:
            wrong += 1
            print(f"{plain}: the table says {before.get(column)} of {column}, transformers {version} gives {result}")
    if writing:
        versions = {**table.get("compressed-tensors", {}), version: compressed_tensors.__version__}
        body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps({"tolerance": TOLERANCE, "compressed-tensors": dict(sorted(versions.items()))})
        TABLE.write_text(f'{head[:-1]}, "cases": [\n{body}\n]}}\n')
        return 0
    print(f"{len(rows)} cases, {wrong} differ from the table" if wrong else f"{len(rows)} cases, as the table says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
