"""Everything that is known about a compressed model, as the one object that pages, tables and gates are made from.

`docs/report.md` documents it key by key. Parts that were not run are absent.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput import recipe as recipes
from lilliput.metrics.evaluate import DTYPES, Evaluation, evaluate
from lilliput.model import open_model
from lilliput.report import provenance
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


def assemble(evaluation: Evaluation, parts: Mapping[str, Any], gates: Mapping[str, float | None]) -> Data:
    """The evidence of an evaluation and of further parts, by their keys; gates: max_kl, max_ppl_increase and
    min_agreement, None for no limit. The verdict comes last, from all of it."""
    found = _described(evaluation) | dict(parts)
    found["quality"] = _quality(evaluation) | dict(parts.get("quality") or {})
    found["gates"] = check_gates(found, **gates)
    found["verdict"] = verdict(found)
    return found


def gather(
    model: str | Path,
    against: str | Path | None = None,
    *,
    data: str | Path | Sequence[str | Path] = "docs:library",
    windows: int = 8,
    tokens: int = 1024,
    stride: int | None = None,
    memory: int | None = None,
    dtype: str = "float32",
    tasks: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    prompts: int = 0,
    where: bool = False,
    speed: bool = False,
    roofline: bool = False,
    work: str | Path | None = None,
    gates: Mapping[str, float | None] | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, Data]:
    """Measure `model` as it lies on disk, against its original if there is one: the evaluation and the evidence.

    Text metrics and the comparison of weights stream both models within `memory` bytes. The other parts run whole
    models: `tasks` (names, or NAME=FILE), `prompts` to continue greedily, `speed`. `where` finds the blocks and linears
    that the loss comes from; `roofline` predicts times on named devices. Raises LilliputError for whatever cannot be
    measured.
    """
    evaluation = evaluate(
        model,
        against,
        data=data,
        windows=windows,
        tokens=tokens,
        stride=stride,
        detail=against is not None,
        memory=memory,
        dtype=dtype,
        work=work,
        progress=progress,
    )
    first = evaluation.texts[0].data
    parts: Data = {"size": sizes(model, against)}
    if against is not None:
        parts["loss"] = _loss(model, against, first, DTYPES[dtype], where, memory, work, progress)
        if prompts:
            from lilliput.metrics.generation import generation

            found = generation(model, against, data=first, prompts=prompts, dtype=DTYPES[dtype])
            parts["quality"] = {"generation": found.to_json()}
    if tasks:
        from lilliput.tasks import run_tasks

        results = run_tasks(model, against, tasks, limit=limit, shots=shots, dtype=dtype, work=work, progress=progress)
        parts["tasks"] = [x.to_json() for x in results]
    if speed:
        from lilliput.efficiency import measure_speed

        parts["speed"] = measure_speed(model, against).to_json()
    if roofline:
        parts["roofline"] = {"rows": _rooflines(model, against)}
    return evaluation, assemble(evaluation, parts, gates or {})


def sizes(model: str | Path, against: str | Path | None) -> Data:
    """The key `size`: parameters, bytes, operations."""
    from lilliput.efficiency import count

    found = count(open_model(str(model)), None if against is None else open_model(str(against)))
    return found.to_json()


def _loss(
    model: str | Path,
    against: str | Path,
    data: str,
    dtype: torch.dtype,
    where: bool,
    memory: int | None,
    work: str | Path | None,
    progress: Progress | None,
) -> Data:
    from lilliput.attribution import attribute, suspects

    if not where:
        return {"suspects": [x.to_json() for x in suspects(model, against, dtype)]}
    return attribute(model, against, data=data, memory=memory, dtype=dtype, work=work, progress=progress).to_json()


def _rooflines(model: str | Path, against: str | Path | None) -> list[Data]:
    from lilliput.efficiency import devices, measure_device, rooflines

    opened, base = open_model(str(model)), None if against is None else open_model(str(against))
    longest = int(getattr(opened.source.text_config, "max_position_embeddings", None) or max(CONTEXTS))
    contexts = sorted({min(x, longest) for x in CONTEXTS})
    rows = rooflines(opened, base, [*devices(), measure_device()], contexts=contexts)
    return [x.to_json() for x in rows]


def _described(evaluation: Evaluation) -> Data:
    """What is known without running anything: names, recipe, tensors, origin."""
    found: Data = {
        "schema": SCHEMA,
        "title": Path(evaluation.model).name,
        "model": evaluation.model,
        "against": evaluation.against,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "notes": list(evaluation.notes),
    }
    opened = open_model(evaluation.model)
    record = provenance.read(opened.source.folder)
    rows = {} if record is None else {f"{x.stored}.weight": x for x in record.linears}
    found["tensors"] = [
        {
            "name": name,
            "kind": "quantized" if name in rows and rows[name].format != "dense" else "dense",
            "dtype": str(x.dtype).removeprefix("torch."),
            "shape": list(x.shape),
            "bytes": x.nbytes,
            "bits": 8 * x.nbytes / max(1, _count(x.shape)),
            "error": rows[name].error if name in rows else None,
        }
        for name, x in opened.source.stored.items()
    ]
    if record is not None:
        recipe = recipes.Recipe.model_validate(record.recipe)
        found["recipe"] = {"steps": record.recipe.get("steps", []), "text": recipes.to_yaml(recipe)}
        found["provenance"] = {
            "original": record.model,
            "format": record.layout,
            "plan": record.plan,
            "seed": record.seed,
            "calibration": None if record.data is None else dict(vars(record.data)),
            "versions": dict(record.versions),
        }
    return found


def _count(shape: Sequence[int]) -> int:
    out = 1
    for side in shape:
        out *= side
    return out


def _quality(evaluation: Evaluation) -> Data:
    rows = []
    for text in evaluation.texts:
        plain = text.to_json()
        row: Data = {"name": _short(text.data), "source": text.data, "fingerprint": text.fingerprint}
        row |= {"windows": text.windows, "tokens": text.windows * text.tokens}
        rows.append(row | {key: plain[key] for key in _TEXT})
    first = evaluation.texts[0].to_json()
    detail = {key: first[key] for key in ("classes", "positions", "worst") if first[key]}
    return {"data": rows} | detail


def _short(source: str) -> str:
    """A name for a text: of a file its folder and stem."""
    path = Path(source)
    return f"{path.parent.name}/{path.stem}".strip("/") if path.suffix else source
