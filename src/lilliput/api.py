"""Lilliput from Python: compress, plan, evaluate, load, verify, inspect, generate. The command line calls these."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lilliput import recipe as recipes
from lilliput.data.load import load_tokens
from lilliput.data.tokens import Tokens
from lilliput.errors import DataError, LilliputError, PlanError
from lilliput.export.engine import Look
from lilliput.export.verify import Verification
from lilliput.export.verify import verify as verify_folder
from lilliput.machine import memory, ranks
from lilliput.machine.device import choose as choose_device
from lilliput.metrics.evaluate import Evaluation
from lilliput.metrics.evaluate import evaluate as measure
from lilliput.metrics.layout import window
from lilliput.model import rotated
from lilliput.model.stored import Model, open_model
from lilliput.plan.plan import Plan, compute_dtype, make
from lilliput.plan.resolve import rotates
from lilliput.progress import Progress, Quiet
from lilliput.recipe.schema import Recipe
from lilliput.report.evidence import assemble
from lilliput.run import calibration, delivery, fisher, journal, stages, stream
from lilliput.run.continuation import continuation
from lilliput.run.journal import Work
from lilliput.run.result import Compression
from lilliput.runtime.load import load as load
from lilliput.streaming import forward

DEFAULT_RECIPE = "w4"


def _recipe(what: str | Path | Recipe, settings: Sequence[str]) -> Recipe:
    found = what if isinstance(what, Recipe) else recipes.load(what)
    return recipes.with_settings(found, settings) if settings else found


def _open(
    model: str | Path,
    recipe: str | Path | Recipe,
    settings: Sequence[str],
    *,
    samples: int,
    tokens: int,
    memory_bytes: int | None,
    size: int | None,
    dtype: str,
    device: str,
    seed: int | None,
    measured: bool = True,
) -> tuple[Model, Plan]:
    if samples < 1 or tokens < 2:
        raise PlanError(f"{samples} samples of {tokens} tokens: calibration takes at least 1 sample of 2 tokens")
    wanted = _recipe(recipe, settings)
    where = choose_device(device)
    compute = compute_dtype(dtype, where)
    opened = rotated.prepared(open_model(model, dtype=compute, device=where), rotates(wanted))
    calibration.known_positions(opened, tokens)
    made = make(
        opened,
        wanted,
        samples=samples,
        tokens=tokens,
        budget=memory_bytes,
        size=size,
        seed=seed,
        dtype=compute,
        device=where,
        measured=measured,
        processes=ranks.size(),
    )
    return opened, made


def plan(
    model: str | Path,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    data: str = "docs",
    samples: int = 128,
    tokens: int = 512,
    memory: int | None = None,
    size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    work: str | Path | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
) -> Plan:
    """What `compress` with the same arguments would do. Reads no weights and writes nothing.

    `memory` and `size` are budgets in bytes. The calibration text is read, and the place for `work` looked at. Raises
    LilliputError for whatever stands in the way.
    """
    with ranks.joined(), ranks.together():
        place = None if work is None else Path(work).absolute()
        _refuse_work(place)
        opened, made = _open(
            model,
            recipe,
            settings,
            samples=samples,
            tokens=tokens,
            memory_bytes=memory,
            size=size,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        if ranks.lead():
            calibration.read(opened, made, data, seed)
            if place is not None:
                journal.room(place, _spill(made, opened, 0))
        return made


def _shared(tokens: Tokens | None, made: Plan) -> Tokens | None:
    """The leader's tokens on all ranks."""
    if not made.resolved.reads_tokens:
        return None
    source = ranks.agreed("" if tokens is None else tokens.source)
    ids = ranks.same(torch.empty(made.samples, made.tokens, dtype=torch.int64) if tokens is None else tokens.ids)
    return Tokens.of(ids, source) if tokens is None else tokens


def _spill(made: Plan, model: Model, eval_windows: int) -> int:
    """Bytes of what lies in the work folder at its fullest."""
    hidden = model.skeleton.hidden_size  # of what flows between blocks, which may be wider than the embeddings
    spill = 2 * made.samples * made.tokens * hidden * made.dtype.itemsize if made.resolved.needs else 0
    spill = max(spill, stages.spill(made, model), fisher.spill(made, model)) + fisher.stored(made)
    if eval_windows:
        spill = max(spill, 2 * eval_windows * window(model) * hidden * 4)
    return spill


@memory.steady()
def compress(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    data: str = "docs",
    samples: int = 128,
    tokens: int = 512,
    memory: int | None = None,
    size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    work: str | Path | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    eval_data: str | None = None,
    eval_windows: int = 8,
    progress: Progress | None = None,
) -> Compression:
    """Compress `model` into the new folder `out` and measure it as re-read from there.

    model: Hugging Face id, folder with safetensors, or GGUF file. recipe: a named recipe, a method's name, a YAML file
    or a Recipe; `settings` such as "gptq.bits=3" change it. data: calibration text, `samples` windows of `tokens`
    tokens. memory: the most bytes of RAM to take above the imported package. size: the most bytes that `out` may have.
    eval_data: text to measure on (default: the second half of `docs`); eval_windows: windows of 1,024 tokens, 0 for
    none. A killed call continues when it is repeated. Raises LilliputError; nothing half-written ever shows at `out`.

    Under torchrun every process calls this, and they share the samples; the first writes, measures and shows progress,
    and what the others return lacks the evaluation.
    """
    began = time.perf_counter()
    target = Path(out)
    elsewhere = None if work is None else Path(work).absolute()
    progress = Quiet() if not ranks.lead() else Progress() if progress is None else progress
    with ranks.joined(), progress as shown:
        with ranks.together():
            _refuse(target, elsewhere, eval_windows)
            opened, made = _open(
                model,
                recipe,
                settings,
                samples=samples,
                tokens=tokens,
                memory_bytes=memory,
                size=size,
                dtype=dtype,
                device=device,
                seed=seed,
                measured=eval_windows > 0,
            )
        try:
            return _run(opened, made, target.absolute(), elsewhere, data, seed, eval_data, eval_windows, shown, began)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LilliputError(
                    f"the disk is full ({error.filename or target.parent}); nothing is lost: free some space and "
                    "repeat the command, it goes on where it stopped"
                ) from None
            raise


def _refuse(target: Path, elsewhere: Path | None, eval_windows: int) -> None:
    if os.path.lexists(target) and not journal.published(target.absolute(), elsewhere):
        raise LilliputError(f"{target} exists already: choose another --out, or move it away first")
    if not target.absolute().parent.is_dir():
        raise LilliputError(f"the folder {target.absolute().parent} does not exist: create it, or choose another --out")
    _refuse_work(elsewhere)
    if eval_windows == 1:
        raise DataError("one window gives no interval: measure on 2 or more, or on 0 for no measurement")


def _refuse_work(place: Path | None) -> None:
    """Raises PlanError where no folder can be made at `place`."""
    if place is None:
        return
    there = next(x for x in (place, *place.parents) if os.path.lexists(x))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written to" if there.is_dir() else "is no folder"
        raise PlanError(f"--work {place}: {there} {why}; name a place where the unfinished run can lie")


def _run(
    opened: Model,
    made: Plan,
    out: Path,
    work: Path | None,
    data: str,
    seed: int | None,
    eval_data: str | None,
    eval_windows: int,
    progress: Progress,
    began: float,
) -> Compression:
    tokens: Tokens | None = None
    with ranks.together():
        if ranks.lead():
            # Text that is missing or too short is found now, not when the checkpoint has been read, or after the work.
            tokens = calibration.read(opened, made, data, seed)
            calibration.measurable(opened, eval_data, eval_windows)
            opened.source.scan()
            made = replace(made, fingerprint=opened.source.fingerprint())  # now that every byte has been read
            if data == "self":
                tokens = calibration.write(opened, made, seed)
    tokens = _shared(tokens, made)
    layout: dict[str, Any] = {"batch": made.layout.batch, "lockstep": made.layout.lockstep}
    if made.budget is None:
        # The layout follows the free memory of the moment; a run that goes on keeps the one that it began with.
        before = journal.begun(out, work)
        layout |= {k: before[k] for k in layout if k in before}
    layout = ranks.agreed(layout)
    made = replace(made, layout=replace(made.layout, **layout))
    key = made.hash("none" if tokens is None else tokens.fingerprint)
    original: Model | None = None
    evaluation: Evaluation | None = None
    warnings: tuple[str, ...] = ()
    seen: Look | None = None
    with Work(out, key, work, layout) as place:
        with ranks.together():
            if ranks.lead():
                place.need(made.folder_bytes, _spill(made, opened, eval_windows))
        skipped = len(place.find("block"))
        rows = stream.run(made, opened, None if tokens is None else tokens.ids, place, progress)
        peak = max(ranks.gathered(memory.peak_above_base()))
        made = stages.decided(made, opened, place)
        if ranks.lead():
            facts = delivery.Delivery(made, opened, key, tokens, tuple(rows), place.hashes())
            delivery.write_loadable(place.staging, facts)
            seen = delivery.opened(place, out, made.room, progress)
            if eval_windows > 0:
                original = open_model(opened.source.model, device=made.device)
                evaluation = _measure(original, made, place, tokens, eval_data, eval_windows, progress)
                warnings = evaluation.notes
            warnings = (*warnings, *seen.notes)
            spent, peak = time.perf_counter() - began, max(peak, memory.peak_above_base())
            delivery.write_report(place.staging, facts, seen, evaluation, spent, peak, warnings)
        place.publish()
    evidence = None
    if evaluation is not None and original is not None:
        measured = replace(evaluation, model=str(out))
        notes = [*made.notes, *evaluation.notes]
        evidence = assemble(measured, open_model(out), original, {"notes": notes}, {})
    return Compression(
        out=out,
        plan=made,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=max(peak, memory.peak_above_base()),
        folder_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        skipped=skipped,
        evaluation=evaluation,
        rows=tuple(rows),
        warnings=warnings,
        engine=seen,
        evidence=evidence,
    )


def _measure(
    original: Model,
    made: Plan,
    place: Work,
    tokens: Tokens | None,
    eval_data: str | None,
    windows: int,
    progress: Progress,
) -> Evaluation:
    return measure(
        place.staging,
        original,
        work=place.folder,
        device=made.device,
        data=eval_data or calibration.EVALUATION,
        windows=windows,
        tokens=window(original),
        detail=True,
        memory=made.room,
        calibration=tokens,
        progress=progress,
    )


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    data: str = "docs:library",
    windows: int = 8,
    tokens: int | None = None,
    memory: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity and, against a reference, the paired ratio, KL divergence and agreement, each with a 95 % interval.

    Windows have `tokens` tokens: 1,024, or as many as the models know positions.
    """
    return measure(
        model, against, data=data, windows=windows, tokens=tokens, memory=memory, dtype=dtype, progress=progress
    )


def verify(folder: str | Path, *, memory: int | None = None) -> Verification:
    """Whether a written folder is whole: hashes, shapes, finite values, and that its engine computes what it holds.

    memory: bytes above the imported package, half of what is free where None; a folder whose model needs more is
    compared block by block.
    """
    return verify_folder(Path(folder), memory=memory)


def inspect(
    model: str | Path, data: str | None = None, *, samples: int = 8, tokens: int | None = None
) -> dict[str, Any]:
    """Anatomy of a model; with `data`, the outlier channels of each input site as well, over `samples` windows of
    `tokens` tokens (512, or as many as the model knows positions)."""
    from lilliput.model.inspect import inspect as inspect_anatomy
    from lilliput.model.inspect import outliers

    opened = open_model(model, dtype=compute_dtype("auto", "cpu"))
    ids: torch.Tensor | None = None
    if data is not None:
        length = min(512, opened.positions or 512) if tokens is None else tokens
        calibration.known_positions(opened, length)
        tokenizer = opened.source.tokenizer()
        ids = load_tokens(data, tokenizer, samples=samples, tokens=length, vocabulary=opened.vocabulary).ids
    found = inspect_anatomy(opened)
    if ids is not None:
        with tempfile.TemporaryDirectory() as folder:
            seen = forward.site_statistics(opened, ids, Path(folder), frozenset({"absmax", "square"}))
        found["outliers"] = outliers(seen)
    return found


def generate(model: str | Path, prompt: str, *, max_new_tokens: int = 64) -> str:
    """The model's greedy continuation of a prompt (through the chat template where there is one).

    It stops where transformers stops, and heeds what else generation_config.json says of a greedy choice. Raises
    DataError for a prompt that the model cannot read or that leaves no room for `max_new_tokens`.
    """
    return continuation(open_model(model, dtype=compute_dtype("auto", "cpu")), prompt, max_new_tokens)


memory.set_base()
