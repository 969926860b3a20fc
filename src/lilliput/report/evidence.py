"""Everything that is known about a compressed model, as the one object that pages, tables and gates are made from.

`docs/report.md` documents it key by key. Parts that were not run are absent.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput import recipe as recipes
from lilliput.errors import LilliputError, PlanError
from lilliput.export import provenance
from lilliput.metrics.evaluate import Evaluation, compute_dtype, evaluate
from lilliput.model.stored import Model, open_adapted, open_model
from lilliput.options import Compute, Gates, Limits, Parts, Text
from lilliput.recipe import schema
from lilliput.report.verdict import check_gates, verdict

if TYPE_CHECKING:
    from lilliput.progress import Progress

SCHEMA = 1
CONTEXTS = (512, 4096)  # tokens, of the predicted times
Data = dict[str, Any]
_TEXT = (
    "perplexity",
    "reference_perplexity",
    "perplexity_ratio",
    "kl",
    "kl_p95",
    "kl_p99",
    "agreement",
    "flips",
)


def assemble(
    evaluation: Evaluation, model: Model, against: Model | None, parts: Mapping[str, Any], gates: Gates
) -> Data:
    """The evidence of an evaluation of `model`, of what its files say, and of further parts, by their keys. The verdict
    comes last, from all of it."""
    from lilliput.efficiency import count, count_zeros, shapes_of

    evidence = _described(evaluation, model)
    steps = [step.get("target") or {} for step in (evidence.get("recipe") or {}).get("steps") or ()]
    # Reads every weight once more, and a grid has zeros of its own that nobody means to skip.
    pruned = any(x.get("sparsity") or x.get("pattern") for x in steps)
    zeros = count_zeros(model, shapes_of(model)) if pruned else None
    evidence |= {"size": count(model, against, zeros=zeros).to_json()} | dict(parts)
    if evaluation.work is not None:
        evidence["work"] = evaluation.work.to_json()
    if evaluation.cache is not None:
        evidence["cache"] = evaluation.cache.to_json()
    evidence["quality"] = _quality(evaluation) | dict(parts.get("quality") or {})
    evidence["gates"] = check_gates(evidence, **vars(gates))
    evidence["verdict"] = verdict(evidence)
    return evidence


def gather(
    model: str | Path,
    against: str | Path | None = None,
    *,
    text: Text = Text(),
    parts: Parts = Parts(),
    limits: Limits = Limits(),
    compute: Compute = Compute("float32", "cpu"),
    gates: Gates = Gates(),
    evaluation: Evaluation | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, Data]:
    """Measure `model` as it lies on disk, against its original if there is one: the evaluation and the evidence.

    Text metrics and the comparison of weights stream both models within the memory of `limits`. Some other `parts`
    (tasks, of which "instructions=FILE" has both answer, prompts, speed) run whole models. `evaluation`: text metrics
    that are known already, of `evaluate_all`. Raises LilliputError for whatever is known beforehand not to be
    measurable, and where the text metrics fail. A later part that fails is missing in the evidence, whose "failed" says
    why: what was measured before stays.
    """
    from lilliput.tasks.instructions import compare_instructions, separate

    dtype = compute_dtype(compute.dtype)
    bare = parts.tasks or parts.prompts or parts.where or parts.speed or parts.roofline
    if parts.adapter is not None and bare:
        raise PlanError(
            "an adapter is measured on text alone: leave out tasks, prompts, --where, --speed, --roofline and --html, "
            "or merge it (`lilliput merge`)"
        )
    scored, instructed = separate(parts.tasks, against, parts.judge)
    if scored:
        from lilliput.tasks import check_tasks

        check_tasks(model, against, scored, limit=parts.limit, shots=parts.shots)
    ours = open_adapted(model, parts.adapter, dtype=dtype, device=compute.device)
    base = None if against is None else open_model(against, dtype=dtype, device=compute.device)
    if evaluation is None:
        shared: Data = {"memory": limits.memory, "dtype": compute.dtype, "work": compute.work, "progress": progress}
        evaluation = evaluate(ours, base, **vars(text), detail=base is not None, **shared)
    first = evaluation.texts[0].data
    evidence: Data = {"quality": {}}
    failed: dict[str, str] = {}
    if base is not None:
        with _kept("loss", failed):
            evidence["loss"] = _loss(ours, base, first, parts.where, limits, compute, progress)
        if parts.prompts:
            from lilliput.metrics.generation import generation

            with _kept("prompts", failed):
                answered = generation(ours, base, data=first, prompts=parts.prompts)
                evidence["quality"]["generation"] = answered.to_json()
    whole: Data = {"limit": parts.limit, "dtype": compute.dtype, "work": compute.work, "progress": progress}
    if scored:
        from lilliput.tasks import abilities, run_tasks

        with _kept("tasks", failed):
            rows = run_tasks(model, against, scored, shots=parts.shots, **whole)
            evidence |= {"tasks": [x.to_json() for x in rows], "abilities": [x.to_json() for x in abilities(rows)]}
    if against is not None and instructed:
        with _kept("instructions", failed):
            files = [x.file for x in instructed if x.file is not None]
            answers = [compare_instructions(model, against, x, judge=parts.judge, **whole) for x in files]
            evidence["quality"]["instructions"] = [x.to_json() for x in answers]
    if parts.speed:
        from lilliput.efficiency import measure_speed

        with _kept("speed", failed):
            evidence["speed"] = measure_speed(model, against).to_json()
    if parts.roofline:
        with _kept("roofline", failed):
            evidence["roofline"] = {"rows": _rooflines(ours, base)}
    if failed:
        evidence["failed"] = failed
        evidence["notes"] = [*evaluation.notes, *(f"{part}: not measured. {why}" for part, why in failed.items())]
    return evaluation, assemble(evaluation, ours, base, evidence, gates)


@contextmanager
def _kept(part: str, failed: dict[str, str]) -> Iterator[None]:
    """Notes why a part could not be measured, so that the others are not lost with it."""
    try:
        yield
    except (LilliputError, OSError) as error:
        failed[part] = str(error)


def _loss(
    model: Model, against: Model, data: str, where: bool, limits: Limits, compute: Compute, progress: Progress | None
) -> Data:
    from lilliput.attribution import attribute, suspects

    if not where:
        return {"suspects": [x.to_json() for x in suspects(model, against)]}
    attribution = attribute(model, against, data=data, memory=limits.memory, work=compute.work, progress=progress)
    return attribution.to_json()


def _rooflines(model: Model, against: Model | None) -> list[Data]:
    from lilliput.efficiency import devices, measure_device, rooflines

    longest = model.positions or max(CONTEXTS)
    contexts = sorted({min(x, longest) for x in CONTEXTS})
    rows = rooflines(model, against, [*devices(), measure_device()], contexts=contexts)
    return [x.to_json() for x in rows]


def _described(evaluation: Evaluation, model: Model) -> Data:
    """What is known without running anything: names, recipe, tensors, origin."""
    described: Data = {
        "schema": SCHEMA,
        "title": Path(evaluation.model).name,
        "model": evaluation.model,
        "against": evaluation.against,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "notes": list(evaluation.notes),
    }
    record = provenance.read(model.source.folder)
    rows = {} if record is None else {f"{x.stored}.weight": x for x in record.linears}
    described["tensors"] = [
        {
            "name": name,
            "kind": "quantized" if name in rows and rows[name].format != "dense" else "dense",
            "dtype": str(x.dtype).removeprefix("torch."),
            "shape": list(x.shape),
            "bytes": x.nbytes,
            "bits": 8 * x.nbytes / max(1, prod(x.shape)),
            "error": rows[name].error if name in rows else None,
        }
        for name, x in model.source.stored.items()
    ]
    if record is not None:
        recipe = schema.Recipe.model_validate(record.recipe)
        described["recipe"] = {"steps": record.recipe.get("steps", []), "text": recipes.to_yaml(recipe)}
        described["training"] = [asdict(x) for x in record.training]
        described["provenance"] = {
            "original": record.model,
            "format": record.layout,
            "plan": record.plan,
            "seed": record.seed,
            "calibration": None if record.data is None else dict(vars(record.data)),
            "versions": dict(record.versions),
        }
    return described


def _quality(evaluation: Evaluation) -> Data:
    plains = [x.to_json() for x in evaluation.texts]
    rows = []
    for text, plain in zip(evaluation.texts, plains, strict=True):
        row: Data = {"name": _short(text.data), "source": text.data, "fingerprint": text.fingerprint}
        row |= {"windows": text.windows, "tokens": text.windows * text.tokens}
        rows.append(row | {key: plain[key] for key in _TEXT})
    return {"data": rows} | {key: plains[0][key] for key in ("classes", "positions", "worst") if plains[0][key]}


def _short(source: str) -> str:
    """A name for a text: of a file its folder and stem."""
    path = Path(source)
    return f"{path.parent.name}/{path.stem}".strip("/") if path.suffix else source
