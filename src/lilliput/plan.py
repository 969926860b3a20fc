"""What will happen: every tensor with its exact bytes, peak memory and time. All user errors surface here."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

import lilliput
from lilliput import backward, export, memory, rotated
from lilliput.errors import PlanError
from lilliput.export.folder import safetensors_bytes
from lilliput.export.outcome import Outcome
from lilliput.inventory import METADATA, TensorPlan, lay_out
from lilliput.model import Model
from lilliput.recipe import Recipe
from lilliput.resolve import LinearPlan, Resolved, as_json, resolve


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a model. Sizes in bytes, time in seconds, memory above a fresh `import lilliput`."""

    model: str
    fingerprint: str
    resolved: Resolved
    exporter: str
    quantization_config: Mapping[str, Any] | None
    outcomes: Mapping[str, Outcome]  # by canonical linear name
    tensors: tuple[TensorPlan, ...]
    shards: tuple[str, ...]
    layout: memory.Layout
    samples: int
    tokens: int
    dtype: torch.dtype
    device: str
    threads: int
    budget: int | None
    seed: int | None
    seconds: float
    notes: tuple[str, ...]
    side_bytes: int

    @cached_property
    def bytes(self) -> int:
        """Bytes of all safetensors files, headers included."""
        return sum(self.shard_bytes(n) for n in range(len(self.shards)))

    def of_shard(self, shard: int) -> tuple[TensorPlan, ...]:
        return tuple(x for x in self.tensors if x.shard == shard)

    def shard_bytes(self, shard: int) -> int:
        return safetensors_bytes({x.name: (x.dtype, x.shape) for x in self.of_shard(shard)}, METADATA)

    @cached_property
    def folder_bytes(self) -> int:
        """Bytes of the whole folder, within a percent."""
        rows = 520 * len(self.resolved.linears) + 120 * len(self.tensors) + 12_000
        return self.bytes + self.side_bytes + rows

    @cached_property
    def compressed(self) -> tuple[LinearPlan, ...]:
        return tuple(x for x in self.resolved.linears if x.tasks)

    @cached_property
    def bits_per_weight(self) -> float | None:
        """Stored bits over the weights of the compressed linears, scales, zeros, shapes and all."""
        weights = sum(x.linear.parameters for x in self.compressed)
        names = {x.name for x in self.compressed}
        stored = sum(x.nbytes for x in self.tensors if x.source in names)
        return 8 * stored / weights if weights else None

    @cached_property
    def model_bits_per_weight(self) -> float:
        """Stored bits of every tensor over the parameters of the original model."""
        return 8 * sum(x.nbytes for x in self.tensors) / max(self.parameters, 1)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the original model (quantization's own tensors do not count)."""
        linears = {x.name: x.linear.parameters for x in self.resolved.linears}
        quantized = {x.source for x in self.tensors if x.kind == "quantized"}
        dense = sum(x.nbytes // x.dtype.itemsize for x in self.tensors if x.kind not in {"quantized", "untied head"})
        return dense + sum(linears[name] for name in quantized)

    def hash(self, data_fingerprint: str) -> str:
        """Identifies runs that may continue each other: same result bytes, same way of computing them."""
        facts = {
            "model": self.fingerprint,
            "recipe": as_json(self.resolved.recipe),
            "exporter": self.exporter,
            "data": data_fingerprint,
            "samples": self.samples,
            "tokens": self.tokens,
            "seed": self.seed,
            "dtype": str(self.dtype),
            "device": self.device,
            "threads": self.threads,
            "batch": self.layout.batch,
            "lockstep": self.layout.lockstep,
            "memory": self.budget,
            "versions": [lilliput.__version__, torch.__version__, transformers.__version__],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Everything a script may want: `bytes`, both bit counts, `peak_rss_bytes`, `seconds`, `tensors` and more."""
        by_kind: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
        for tensor in self.tensors:
            by_kind[tensor.kind]["tensors"] += 1
            by_kind[tensor.kind]["bytes"] += tensor.nbytes
        return {
            "model": self.model,
            "recipe": as_json(self.resolved.recipe),
            "format": self.exporter,
            "bytes": self.bytes,
            "folder_bytes": self.folder_bytes,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "parameters": self.parameters,
            "peak_rss_bytes": self.layout.bytes,
            "peak_phase": self.layout.where,
            "seconds": self.seconds,
            "samples": self.samples,
            "tokens_per_sample": self.tokens,
            "batch": self.layout.batch,
            "lockstep": self.layout.lockstep,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "by_kind": dict(by_kind),
            "formats": dict(Counter(describe(x) for x in self.resolved.linears)),
            "notes": list(self.notes),
            "tensors": [
                {
                    "name": x.name,
                    "kind": x.kind,
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "shape": list(x.shape),
                    "bytes": x.nbytes,
                    "file": self.shards[x.shard],
                    "source": x.source,
                }
                for x in self.tensors
            ],
        }


def describe(plan: LinearPlan) -> str:
    """What a linear becomes, in a few words."""
    words = [plan.scheme.describe()] if plan.scheme.parts else []
    if plan.pattern is not None:
        words.append(f"{plan.pattern} sparse")
    elif plan.sparsity:
        words.append(f"{plan.sparsity:.0%} sparse")
    return " + ".join(words) or "dense"


def scale_dtype(model: Model) -> torch.dtype:
    """Scales are stored in the model's own half precision; float32 models take float16."""
    stored = {model.written_dtype(name) for name in model.skeleton.names_of(0) if name.endswith(".weight")}
    return torch.bfloat16 if torch.bfloat16 in stored else torch.float16


def compute_dtype(wanted: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if wanted != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if wanted not in known:
            raise PlanError(f"--dtype {wanted} is not known: choose auto, float32, bfloat16 or float16")
        return known[wanted]
    if device != "cpu":
        return torch.bfloat16
    flags = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if flags else torch.float32


def _seconds(model: Model, resolved: Resolved, samples: int, tokens: int, dtype: torch.dtype, measured: bool) -> float:
    """Time from a short measured product and the work that the shapes imply; a guide, not a promise."""
    side = 1024
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    f = torch.randn(side, side)
    for x, y in ((a, b), (f, f)):
        x @ y
    start = time.perf_counter()
    for _ in range(4):
        a @ b
    middle = time.perf_counter()
    for _ in range(2):
        f @ f
    rate = 4 * 2 * side**3 / max(middle - start, 1e-9)
    slow = 2 * 2 * side**3 / max(time.perf_counter() - middle, 1e-9)
    count = samples * tokens
    weights = sum(x.linear.parameters for x in resolved.linears)
    seconds = 3.0  # opening
    if resolved.needs:
        passes = 1 + bool(resolved.rewrites) + len(resolved.allocations) + len(resolved.learned)
        seconds += passes * 3.0 * 2 * weights * count / rate
    for task in {task.step: task for x in resolved.linears for task in x.together}.values():
        # Three products a weight and token for each step, and three passes that only look.
        looked = getattr(task.options, "iters", 0) * min(getattr(task.options, "batch", 1), samples) * 3 + 3 * samples
        seconds += looked * tokens * 2 * weights / rate
    if "gram" in resolved.needs:
        sites = {(x.block, x.linear.site): x.linear.in_features for x in resolved.linears if x.tasks}
        seconds += sum(2 * width**2 * count for width in sites.values()) / (1.5 * slow)
        seconds += sum(6 * x.linear.parameters * x.linear.in_features for x in resolved.linears if x.tasks) / slow
    # The closing evaluation: 8 windows of 1,024 tokens through both models in float32.
    seconds += measured * 2 * 2 * 1.5 * weights * 8 * 1024 / slow
    return seconds + weights / 25e6


def _phases(
    model: Model, resolved: Resolved, tensors: Sequence[TensorPlan], tokens: int, dtype: torch.dtype
) -> tuple[tuple[str, int], ...]:
    """What turning the model takes at its fullest, where a recipe does that."""
    if not resolved.learned:
        return ()
    width, vocabulary = model.skeleton.hidden_size, model.skeleton.shapes[model.skeleton.head][0]
    turning = rotated.resident(width) * 5
    outside = [x for x in tensors if x.kind in {"embedding", "head", "untied head", "carried"}]
    shard = max(sum(x.nbytes for x in outside if x.shard == n) for n in {x.shard for x in outside})
    phases = [("turning the model", turning), ("writing the turned head", 2 * shard + 2 * 4 * rotated.ROWS * width)]
    if any(getattr(task.method.module, "TOKENS", False) for task in resolved.learned):
        held = backward.peak(model.anatomy().blocks, width, vocabulary, tokens, dtype.itemsize)
        phases.append(("learning a rotation", turning + held))
    return tuple(phases)


def _measuring(model: Model) -> int:
    """The least that the closing evaluation takes: 8 windows of the result and the original, in float32."""
    from lilliput.metrics.layout import least, window

    tokens = window(model)
    return least([model, model], tokens, 8 * tokens, torch.float32.itemsize)


def _side_bytes(model: Model) -> int:
    """Bytes of the files beside the weights; a GGUF file has none, so its tokenizer is written out to see."""
    if not model.source.from_gguf:
        return sum(path.stat().st_size for path in model.source.side_files())
    with tempfile.TemporaryDirectory() as folder:
        model.source.tokenizer().save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _opening(model: Model) -> tuple[tuple[str, int], ...]:
    """transformers reads the whole metadata of a GGUF file, vocabulary and merges, into Python objects (measured)."""
    return (("opening the GGUF file", 230 * memory.MB),) if model.source.from_gguf else ()


def make(
    model: Model,
    recipe: Recipe,
    *,
    samples: int,
    tokens: int,
    budget: int | None,
    size: int | None,
    seed: int | None,
    dtype: torch.dtype,
    device: str = "cpu",
    measured: bool = True,
) -> Plan:
    """Resolve `recipe` on `model`; `measured`: an evaluation follows, in the same memory.

    Raises PlanError for whatever cannot be carried out; reads no weights.
    """
    anatomy = model.anatomy()
    resolved = resolve(recipe, anatomy, scale_dtype(model), width=model.skeleton.hidden_size)
    outcomes = {
        x.name: Outcome(
            name=x.name,
            stored=model.stored_name(f"{x.name}.weight").removesuffix(".weight"),
            out_features=x.linear.out_features,
            in_features=x.linear.in_features,
            scheme=x.scheme,
            dtype=model.written_dtype(f"{x.name}.weight"),
            sparsity=x.sparsity,
            pattern=x.pattern,
            transposed=x.linear.transposed,
            expert=x.linear.expert is not None,
        )
        for x in resolved.linears
    }
    ordered: Sequence[Outcome] = tuple(outcomes.values())
    exporter = export.choose(ordered, model.source.config, recipe.export)
    tensors, shards = lay_out(model, exporter, outcomes)
    skeleton = model.skeleton
    embedding = max((model.shape(name)[0] for name in skeleton.embeddings), default=0)
    sizes = [x.nbytes for x in tensors if x.kind in {"embedding", "head", "untied head", "carried"}]
    by_file: Counter[int] = Counter()
    for tensor in tensors:
        by_file[tensor.shard] += tensor.nbytes
    layout = memory.choose(
        anatomy.blocks,
        memory.Shape(
            hidden=int(model.source.text_config.hidden_size),
            vocabulary=embedding,
            samples=samples,
            tokens=tokens,
            itemsize=dtype.itemsize,
            stored=max(x.dtype.itemsize for x in tensors),
            outside=max(sizes, default=0),
            packed=max((by_file[n] for n in range(len(shards))[-len(skeleton.block_names) :]), default=0),
            fitting=max((t.method.module.COPIES for x in resolved.linears for t in x.together), default=0),
            resident=rotated.resident(skeleton.hidden_size) if resolved.learned else 0,
            phases=(
                *_phases(model, resolved, tensors, tokens, dtype),
                *([("measuring the result", _measuring(model))] if measured else []),
                *_opening(model),
            ),
        ),
        budget=budget,
        needs=resolved.needs,
        rewriting=bool(resolved.rewrites),
    )
    note = exporter.dense_note(ordered)
    plan = Plan(
        model=model.source.model,
        fingerprint=model.source.fingerprint(),
        resolved=resolved,
        exporter=exporter.name,
        quantization_config=exporter.config(ordered, model.source.config),
        outcomes=outcomes,
        tensors=tensors,
        shards=shards,
        layout=layout,
        samples=samples,
        tokens=tokens,
        dtype=dtype,
        device=device,
        threads=torch.get_num_threads(),
        budget=budget,
        seed=seed,
        seconds=_seconds(model, resolved, samples, tokens, dtype, measured=measured),
        notes=tuple(x for x in (note, *anatomy.notes) if x),
        side_bytes=_side_bytes(model),
    )
    if size is not None and plan.folder_bytes > size:
        over = plan.folder_bytes - size
        raise PlanError(
            f"the recipe makes {plan.folder_bytes} bytes, {over} bytes ({memory.readable(over)}) more than --size "
            f"{size}: lower the bits, enlarge the groups or prune more"
        )
    return plan
