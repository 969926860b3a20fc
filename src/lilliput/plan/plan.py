"""What will happen: every tensor with its exact bytes, peak memory and time. All user errors surface here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers

from lilliput import export, units
from lilliput.anatomy.tables import tables
from lilliput.errors import PlanError
from lilliput.export.folder import safetensors_bytes
from lilliput.export.outcome import Outcome
from lilliput.machine.version import __version__
from lilliput.model.edited import spreads, unedited, vocabulary_of
from lilliput.model.stored import Model
from lilliput.plan import adapting, contexts, footprint, rehearsal, running, training
from lilliput.plan import cost as estimates
from lilliput.plan.contexts import Context
from lilliput.plan.driving import UNDRIVEN, Driving, decided
from lilliput.plan.outcomes import outcomes_of
from lilliput.plan.remarks import remarks
from lilliput.plan.resolve import LinearPlan, Resolved, as_json, resolve
from lilliput.plan.tensors import BEHAVIOUR, METADATA, TensorPlan, lay_out
from lilliput.recipe.schema import Recipe
from lilliput.streaming.peak import Run
from lilliput.verbs.spec import Stage


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a model. Sizes in bytes, time in seconds, memory above the imported package."""

    model: str
    fingerprint: str
    resolved: Resolved
    exporter: str
    quantization_config: Mapping[str, Any] | None
    outcomes: Mapping[str, Outcome]  # by canonical linear name
    tensors: tuple[TensorPlan, ...]
    shards: tuple[str, ...]
    batching: footprint.Batching
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
    processes: int = 1  # that share the samples
    other_bytes: int | None = None  # bytes beside the weights at most, where a step keeps to a size
    predicted_kl: float | None = None  # KL divergence in nats that a step predicts of its decision
    container: str | None = None  # that takes the place of the folder
    vocabulary: tuple[int, ...] | None = None  # tokens of the stored model that stay; None: all
    texts: tuple[tuple[str, str], ...] = ()  # name and sha256 of files that options of the recipe name
    spread: bool = False  # blocks become as wide as an edit decides: sizes are those of equal widths until then
    decoding: float | None = None  # predicted seconds of a decoding step, where a step keeps to a time
    context: Context | None = None  # the sequence whose keys and values count
    driving: Driving = UNDRIVEN  # how training steps are carried out

    @cached_property
    def bytes(self) -> int:
        """Bytes of all safetensors files, headers included."""
        return sum(self.shard_bytes(n) for n in range(len(self.shards)))

    def of_shard(self, shard: int) -> tuple[TensorPlan, ...]:
        return tuple(x for x in self.tensors if x.shard == shard)

    def of_block(self, block: int | None) -> tuple[TensorPlan, ...]:
        """Tensors of a block; None: those outside the blocks."""
        return tuple(x for x in self.tensors if x.block == block)

    def shard_bytes(self, shard: int) -> int:
        return safetensors_bytes(self.files[self.shards[shard]], METADATA)

    @cached_property
    def files(self) -> Mapping[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """dtype and shape of every tensor, by name, of every file, by name."""
        files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {name: {} for name in self.shards}
        for x in self.tensors:
            files[self.shards[x.shard]][x.name] = x.dtype, x.shape
        return files

    @cached_property
    def folder_bytes(self) -> int:
        """Bytes of the whole folder or file: within a percent, and at most so many where a step keeps to a size."""
        if self.other_bytes is not None:
            return self.bytes + self.other_bytes
        rows = 520 * len(self.resolved.linears) + 120 * len(self.tensors) + 12_000
        return self.bytes + self.side_bytes + rows

    @property
    def whole_bytes(self) -> int:
        """Bytes of the folder, and of the keys and values that count."""
        return self.folder_bytes + (0 if self.context is None else self.context.bytes)

    @cached_property
    def compressed(self) -> tuple[LinearPlan, ...]:
        """The compressed linears of the blocks."""
        return tuple(x for x in self.resolved.linears if x.tasks or x.scheme.parts)

    @cached_property
    def bits_per_weight(self) -> float | None:
        """Stored bits over the weights of the blocks' compressed linears, scales, zeros, shapes and all."""
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
        linears = {x.name: x.linear.parameters for x in self.resolved.planned}
        added = ("untied head", BEHAVIOUR)
        others = [x for x in self.tensors if x.source not in linears and x.kind not in added]
        held = {x.source for x in self.tensors} & linears.keys()
        return sum(x.nbytes // x.dtype.itemsize for x in others) + sum(linears[name] for name in held)

    @property
    def room(self) -> int:
        """Bytes of RAM that the run may take: the budget, or what was planned without one."""
        return self.batching.bytes if self.budget is None else self.budget

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
            "batch": self.batching.batch,
            "lockstep": self.batching.lockstep,
            "memory": self.budget,
            "versions": [__version__, torch.__version__, transformers.__version__],
            **({"processes": self.processes} if self.processes > 1 else {}),
            **({"vocabulary": self.vocabulary} if self.vocabulary is not None else {}),
            **({"container": self.container} if self.container else {}),
            **self.driving.facts(),
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
            "predicted_kl": self.predicted_kl,
            "decode_seconds": self.decoding,
            **({} if self.context is None else self.context.to_json()),
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "parameters": self.parameters,
            "peak_rss_bytes": self.batching.bytes,
            "peak_phase": self.batching.where,
            "seconds": self.seconds,
            "samples": self.samples,
            "tokens_per_sample": self.tokens,
            "batch": self.batching.batch,
            "lockstep": self.batching.lockstep,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "by_kind": dict(by_kind),
            "formats": dict(Counter(describe(x) for x in self.resolved.linears)),
            "tables": {x.name: describe(x) for x in self.resolved.tables},
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
    words = [plan.scheme.describe()] if plan.scheme.parts or plan.scheme.activation is not None else []
    if plan.pattern is not None:
        words.append(f"{plan.pattern} sparse")
    elif plan.sparsity:
        words.append(f"{plan.sparsity:.0%} sparse")
    return " + ".join(words) or "dense"


def scale_dtype(model: Model) -> torch.dtype:
    """Scales are stored in the model's own half precision; float32 models take float16."""
    stored = {model.written_dtype(name) for name in model.skeleton.names_of(0) if name.endswith(".weight")}
    return torch.bfloat16 if torch.bfloat16 in stored else torch.float16


def _unloadable(
    exporter: export.Exporter, model: Model, resolved: Resolved, outcomes: Mapping[str, Outcome]
) -> str | None:
    """Why a layout cannot hold what the recipe may become: as allocations may divide it, or in the engine's loader."""
    for task in resolved.at(Stage.TARGETS):
        governed = resolved.governed(task)
        planned = [x for x in resolved.planned if x.name in governed]
        shared = [task.spec.together(x.name, x.linear, task.options) for x in planned]
        number = {key: n for n, key in enumerate(dict.fromkeys(shared))}
        targets = {}
        for x, key in zip(planned, shared, strict=True):
            if choice := task.spec.farthest(governed[x.name].target, task.options):
                targets[x.name] = choice[number[key] % len(choice)]
        if targets:
            mixed = outcomes_of(model, resolved.with_targets(task, targets))
            reason = exporter.refuse(tuple(mixed.values()), model.config)
            if reason is not None:
                return f"as {task.label} may decide, {reason}"
    if spreads(model) and exporter.name != running.LAYOUT:
        return (
            f"engines' own layouts have one width for all blocks. Nearest: export '{running.LAYOUT}', or uniform: true."
        )
    entry = exporter.config(tuple(outcomes.values()), model.config)
    return running.refuse(entry, resolved, exporter.name) or rehearsal.refuse(exporter, model, outcomes)


def divided(plan: Plan, model: Model, resolved: Resolved) -> Plan:
    """The plan when an allocation has decided: targets such as ranks change sizes, so all tensors are laid out anew.

    Files may change, so none is written before.
    """
    outcomes = outcomes_of(model, resolved)
    ordered = tuple(outcomes.values())
    exporter = export.get(plan.exporter)
    reason = exporter.refuse(ordered, model.config)
    if reason is not None:
        raise PlanError(f"the layout '{plan.exporter}' cannot hold what an allocation decided: {reason}")
    tensors, shards = lay_out(model, exporter, outcomes, running.tensors(resolved, model))
    config = running.config(exporter.config(ordered, model.config), resolved, model, exporter.name)
    if config is not None and (plan.quantization_config or {}).get("dequantize"):
        config["dequantize"] = True  # what the engine's loader needs does not depend on the decision
    return replace(
        plan, resolved=resolved, outcomes=outcomes, tensors=tensors, shards=shards, quantization_config=config,
        context=None if plan.context is None else plan.context.stored(model, resolved),
    )  # fmt: skip


def resized(plan: Plan, model: Model) -> Plan:
    """The plan when an edit has decided how wide blocks become. Raises PlanError for widths that a step refuses."""
    if not plan.spread:
        return plan
    resolved, asked = _resolved(model, plan.resolved.recipe), None if plan.context is None else plan.context.tokens
    return divided(replace(plan, context=contexts.counted(model, resolved, asked, plan.tokens)), model, resolved)


def _resolved(model: Model, recipe: Recipe) -> Resolved:
    resolved = resolve(
        recipe,
        model.anatomy(),
        scale_dtype(model),
        dtype_of=model.written_dtype,
        width=model.skeleton.hidden_size,
        tables=tables(model.skeleton),
    )
    return training.held(resolved, model)


def make(
    model: Model,
    recipe: Recipe,
    *,
    samples: int,
    tokens: int,
    budget: int | None,
    size: int | None,
    context: int | None = None,
    seed: int | None,
    dtype: torch.dtype,
    device: str = "cpu",
    measured: bool = True,
    processes: int = 1,
    teacher: Model | None = None,
) -> Plan:
    """Resolve `recipe` on `model`; `measured`: an evaluation follows, in the same memory; `processes` share samples.

    `context`: tokens of a sequence whose keys and values count in the size. Raises PlanError for whatever cannot be
    carried out; reads no weights.
    """
    anatomy = model.anatomy()
    resolved = _resolved(model, recipe)
    single = next((task for task in resolved.tasks if task.spec.single), None)
    if single is not None and processes > 1:
        raise PlanError(f"{single.label} looks at all samples in one process: start only one")
    if resolved.reads_tokens and processes > samples:
        raise PlanError(
            f"{processes} processes cannot share {samples} calibration samples: start at most {samples}, or ask for "
            "more --samples"
        )
    outcomes = outcomes_of(model, resolved)
    ordered: Sequence[Outcome] = tuple(outcomes.values())
    running.check(model, resolved)
    training.check(resolved, model, teacher)
    counted = contexts.counted(model, resolved, context, tokens)
    wanted = running.layout(model, resolved, recipe.export)
    exporter = export.choose(ordered, model.config, wanted, lambda x: _unloadable(x, model, resolved, outcomes))
    tensors, shards = lay_out(model, exporter, outcomes, running.tensors(resolved, model))
    skeleton = model.skeleton
    embedding = max((model.shape(name)[0] for name in skeleton.embeddings), default=0)
    by_block: Counter[int] = Counter()
    for tensor in tensors:
        if tensor.block is not None:
            by_block[tensor.block] += tensor.nbytes
    run = Run(
        blocks=anatomy.blocks,
        hidden=skeleton.hidden_size,
        vocabulary=embedding,
        samples=-(-samples // processes),
        tokens=tokens,
        itemsize=dtype.itemsize,
        stored=max(x.dtype.itemsize for x in tensors),
        processes=processes,
    )
    whole = unedited(model)
    if whole is not model:
        blocks, hidden = whole.anatomy().blocks, whole.skeleton.hidden_size
        before = replace(run, blocks=blocks, hidden=hidden)
        run = replace(before if spreads(model) else run, before=before)  # any block may keep its width
    driven, driving = decided(resolved, run, model, teacher, budget)
    needed = estimates.phases(model, driven, run, tensors, teacher)
    batching = footprint.choose(
        driven,
        run,
        (*needed, *estimates.closing(model, budget, processes, measured)),
        packed=max(by_block.values(), default=0),
        budget=budget,
        processes=processes,
    )
    config = running.config(exporter.config(ordered, model.config), resolved, model, exporter.name)
    told = (exporter.dense_note(ordered), running.note(exporter.name, config, model, resolved))
    note = " ".join(x for x in told if x) or None
    plan = Plan(
        model=model.source.model,
        fingerprint=model.source.fingerprint(),
        resolved=resolved,
        exporter=exporter.name,
        quantization_config=config,
        outcomes=outcomes,
        tensors=tensors,
        shards=shards,
        batching=batching,
        samples=samples,
        tokens=tokens,
        dtype=dtype,
        device=device,
        threads=torch.get_num_threads(),
        budget=budget,
        seed=seed,
        seconds=estimates.seconds(resolved, run, dtype, measured=measured),
        notes=remarks(model, driven, tensors, note, processes, counted, teacher),
        side_bytes=sum(x.stat().st_size for x in model.source.side_files().values()) + adapting.written(driven, run),
        processes=processes,
        spread=spreads(model),
        vocabulary=vocabulary_of(model),
        context=counted,
        driving=driving,
    )
    if size is not None and plan.whole_bytes > size:
        over = plan.whole_bytes - size
        cache = "" if counted is None else f" and {counted.bytes} of keys and values for {counted.tokens} tokens"
        raise PlanError(
            f"the recipe makes {plan.folder_bytes} bytes{cache}, {over} bytes ({units.readable(over)}) more than "
            f"--size {size}: lower the bits, enlarge the groups or prune more"
            f"{'' if counted is None else ', store the cache in fewer bits or ask for less --context'}"
        )
    return plan
