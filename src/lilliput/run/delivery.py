"""What turns finished weight files into a folder that users and engines can take: config, index, card, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput import recipe as recipes
from lilliput.anatomy.wrapper import opener
from lilliput.data import hub
from lilliput.data.tokens import Tokens
from lilliput.errors import LilliputError
from lilliput.export.card import Card, Figure, read_licence, render
from lilliput.export.engine import Look, look
from lilliput.export.folder import OWN, config_text, write_index, write_side_files
from lilliput.export.provenance import DataRow, LinearRow, Provenance, TensorRow, TrainingRow, versions
from lilliput.metrics.evaluate import Evaluation
from lilliput.model.stored import Model
from lilliput.plan.plan import Plan, describe
from lilliput.plan.tensors import written_config
from lilliput.progress import Progress
from lilliput.recipe.texts import portable
from lilliput.run.journal import Work
from lilliput.source.source import own_name
from lilliput.units import interval
from lilliput.units import size as readable
from lilliput.verbs.adapt import AdapterOptions
from lilliput.verbs.spec import Stage
from lilliput.verbs.train import TrainOptions, common

_LONGEST = -1.2345678901234567e-05  # as a figure takes the most letters
_MEASURED = 12_000  # bytes for what an evaluation says, in the card and lilliput.json, and for the text's name


@dataclass(frozen=True)
class Delivery:
    """Everything that is known when the last block is written."""

    plan: Plan
    model: Model
    key: str  # hash of the plan with its data
    tokens: Tokens | None
    rows: tuple[Mapping[str, Any], ...]
    hashes: Mapping[str, str]  # stored tensor name -> sha256
    training: tuple[TrainingRow, ...] = ()


def _provenance(d: Delivery, measured: Mapping[str, Any], notes: tuple[str, ...]) -> Provenance:
    plan = d.plan
    formats = {x.name: (describe(x), plan.outcomes[x.name].stored) for x in plan.resolved.planned}
    linears = tuple(
        LinearRow(
            name=str(row["name"]),
            stored=formats[row["name"]][1],
            format=formats[row["name"]][0],
            bits=float(row["bits"]),
            error=float(row["error"]),
            seconds=float(row["seconds"]),
            notes=(
                f"methods: {' -> '.join(row['methods'])}",
                f"relative error of its {row['error_of']}s",
                f"{row['tokens']} calibration tokens",
                f"{row['zeros']:.4f} of the weights are zero",
            ),
        )
        for row in d.rows
    )
    tensors = tuple(
        TensorRow(x.name, plan.shards[x.shard], str(x.dtype).removeprefix("torch."), x.shape, d.hashes[x.name])
        for x in plan.tensors
    )
    data = d.tokens and DataRow(own_name(d.tokens.source), plan.samples, plan.tokens, d.tokens.fingerprint)
    return Provenance(
        model=d.model.source.name,
        fingerprint=plan.fingerprint,
        layout=plan.exporter,
        recipe=portable(plan.resolved.recipe).model_dump(mode="json"),
        files=dict(plan.texts),
        plan=d.key,
        seed=plan.seed,
        data=data or None,
        versions=versions(),
        notes=(*plan.notes, *notes),
        measured=measured,
        linears=linears,
        tensors=tensors,
        training=d.training,
    )


def _figures(plan: Plan, evaluation: Evaluation | None, size: int, original: int) -> tuple[Figure, ...]:
    figures = [Figure("weights", readable(size), readable(original))]
    if plan.bits_per_weight is not None:
        figures.append(Figure("bits per weight, compressed linears", f"{plan.bits_per_weight:.2f}"))
    figures.append(Figure("bits per weight, whole model", f"{plan.model_bits_per_weight:.2f}"))
    if plan.predicted_kl is not None:
        figures.append(Figure("predicted KL divergence, nats", f"{plan.predicted_kl:.4f}"))
    if plan.context is not None:
        context = plan.context
        label = f"keys and values of {context.tokens} tokens"
        figures.append(Figure(label, readable(context.bytes), readable(context.plain_bytes)))
    if evaluation is None:
        return tuple(figures)
    plain = evaluation.to_json()
    reference = plain.get("reference_perplexity")
    text = evaluation.texts[0]
    where = f"{text.windows} x {text.tokens} tokens of {own_name(text.data)}"
    labels = {
        "perplexity": f"perplexity on {where}",
        "perplexity_ratio": "perplexity, ratio to the original",
        "kl": "KL divergence from the original, nats",
        "agreement": "top-1 agreement with the original",
    }
    for key, label in labels.items():
        if plain.get(key) is not None:
            base = interval(reference) if key == "perplexity" and reference else ""
            figures.append(Figure(label, interval(plain[key]), base))
    return tuple(figures)


def _portable(plain: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without paths of this machine; the folder that was measured needs no name within itself."""
    portable = {
        key: own_name(x) if key in ("against", "data") and x else x for key, x in plain.items() if key != "model"
    }
    return portable | {"texts": [_portable(x) for x in plain["texts"]]} if "texts" in plain else portable


def _contents(
    d: Delivery, measured: Mapping[str, Any], notes: tuple[str, ...], figures: tuple[Figure, ...]
) -> tuple[dict[str, Any], Provenance, Card]:
    plan, model = d.plan, d.model
    dataset = None if d.tokens is None else hub.dataset(d.tokens.source)
    card = Card(
        title=f"{model.source.name.rsplit('/', 1)[-1].removesuffix('.gguf')}-{plan.resolved.recipe.name}",
        base_model=model.source.name,
        layout=plan.exporter if plan.quantization_config is not None else "dense",
        recipe=recipes.to_yaml(portable(plan.resolved.recipe)),
        figures=figures,
        licence=read_licence(model.source.folder),
        notes=(*plan.notes, *notes),
        datasets=() if dataset is None else (dataset,),
        opener=opener(model.config).__name__,
    )
    return written_config(model, plan.quantization_config), _provenance(d, measured, notes), card


def _write(
    folder: Path, d: Delivery, measured: Mapping[str, Any], notes: tuple[str, ...], figures: tuple[Figure, ...]
) -> None:
    config, provenance, card = _contents(d, measured, notes, figures)
    write_side_files(
        folder, source_side_files=d.model.source.side_files(), config=config, provenance=provenance, card=card
    )


def other_bytes(plan: Plan, model: Model) -> int:
    """Bytes at most of the files beside the weights, before a weight is written."""
    tasks = {x.name: x.tasks for x in plan.resolved.planned if x.tasks}
    row = {"bits": _LONGEST, "error": _LONGEST, "seconds": _LONGEST, "error_of": "output", "zeros": 1.0}
    rows = tuple(
        {**row, "name": name, "methods": [x.method.name for x in mine], "tokens": plan.samples * plan.tokens}
        for name, mine in tasks.items()
    )
    hashes = {x.name: "0" * 64 for x in plan.tensors}
    longest = Delivery(plan, model, "0" * 64, None, rows, hashes, tuple(_trained(x) for x in _training(plan)))
    config, provenance, card = _contents(longest, {}, (), ())
    own = len(config_text(config).encode()) + len(provenance.to_json().encode()) + len(render(card).encode())
    files = model.source.side_files()
    carried = sum(path.stat().st_size for name, path in files.items() if name not in OWN)
    index = sum(len(x.name.encode()) + 64 for x in plan.tensors) + 100 if len(plan.shards) > 1 else 0
    return own + carried + index + _MEASURED


def _training(plan: Plan) -> tuple[TrainOptions, ...]:
    return tuple(common(task.options) for task in plan.resolved.at(Stage.TRAINING))


def _trained(o: TrainOptions) -> TrainingRow:
    """As large as a row can be."""
    data = DataRow(" " * 200, o.steps * o.batch, o.tokens, "0" * 64)
    states = tuple((o.steps, _LONGEST) for _ in range(o.steps // o.save + 2)) if o.held_out else ()
    name = " " * 100
    adapter = {f"{name}{n}": "0" * 64 for n in range(3)} if isinstance(o, AdapterOptions) else {}
    return TrainingRow(name, name, name, data, name, (_LONGEST,) * o.steps, states, o.steps, _LONGEST, name, adapter)


def write_loadable(folder: Path, d: Delivery) -> None:
    """Config, tokenizer and, for several files, index: from here on the folder opens like any model."""
    if len(d.plan.shards) > 1:
        names = {file: list(tensors) for file, tensors in d.plan.files.items()}
        write_index(folder, names, sum(x.nbytes for x in d.plan.tensors))
    _write(folder, d, {}, (), ())


def opened(work: Work, out: Path, memory: int, progress: Progress) -> Look:
    """What the engine makes of the written folder. Raises LilliputError where it is not what was compressed."""
    result = look(work.staging, memory=memory, progress=progress)
    if result.problems:
        raise LilliputError(
            f"{out} is not written, because {result.engine} does not compute what was compressed: "
            f"{'; '.join(result.problems[:3])}. Set `export: lilliput` in the recipe: that layout does not depend "
            f"on how an engine reads others. Finished pieces stay in {work.folder}"
        )
    return result


def write_report(
    folder: Path,
    d: Delivery,
    opened: Look,
    evaluation: Evaluation | None,
    seconds: float,
    peak: int,
    notes: tuple[str, ...],
) -> None:
    """The card and lilliput.json again, now with what was measured on the folder as re-read."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    original = sum(x.nbytes for x in d.model.source.stored.values())
    measured: dict[str, Any] = {} if evaluation is None else _portable(evaluation.to_json())
    measured |= {"engine": opened.detail}
    measured |= {"bytes": size, "seconds": seconds, "peak_rss_bytes": peak}
    measured |= {} if d.plan.context is None else d.plan.context.to_json()
    _write(folder, d, measured, notes, _figures(d.plan, evaluation, size, original))
