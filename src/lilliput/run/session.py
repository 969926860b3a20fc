"""A compression from its options to its answer: what is refused, the run itself, and what is measured afterwards."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lilliput import recipe as recipes
from lilliput.data.tokens import Tokens
from lilliput.errors import DataError, LilliputError, PlanError
from lilliput.export.engine import Look
from lilliput.machine import memory, ranks
from lilliput.machine.cost import Cost
from lilliput.machine.device import choose as choose_device
from lilliput.machine.device import compute_dtype
from lilliput.metrics.evaluate import Evaluation
from lilliput.metrics.evaluate import evaluate as measure
from lilliput.metrics.slices import window
from lilliput.model.stored import Model, open_adapted, open_model
from lilliput.options import Calibration, Compute, Fit, Gates, Limits, Text
from lilliput.plan import choices
from lilliput.plan.plan import Plan, make, resized
from lilliput.progress import Progress, Quiet
from lilliput.recipe import texts
from lilliput.recipe.compose import compose
from lilliput.recipe.schema import Recipe
from lilliput.report.evidence import assemble
from lilliput.run import (
    adapting,
    caching,
    calibration,
    delivery,
    editing,
    journal,
    lessons,
    sizing,
    stages,
    stream,
    training,
)
from lilliput.run.journal import Work
from lilliput.run.result import Compression
from lilliput.runtime import behaviours, caches
from lilliput.runtime.adapter import beside_linears
from lilliput.verbs.spec import Stage

ADAPTED = "Figures are those of the folder with the adapter that this run has trained."
BARE = "Figures are those of the folder without its adapter, which is in front of the text."


@dataclass(frozen=True)
class Job:
    """What is to be done to which model, and with what."""

    model: str | Path
    recipe: str | Path | Recipe
    settings: Sequence[str] = ()
    calibration: Calibration = Calibration()
    limits: Limits = Limits()
    compute: Compute = Compute()
    fit: Fit | None = None  # in place of a recipe: the best that keeps to it
    teacher: str | Path | None = None  # of training steps; None: the model itself

    @property
    def work(self) -> Path | None:
        return None if self.compute.work is None else self.compute.work.absolute()


def planned(job: Job) -> Plan:
    """What `compressed` would do. Reads no weights and writes nothing. Raises LilliputError."""
    with ranks.joined(), ranks.together():
        refuse_work(job.work)
        opened, plan = _open(job)
        if ranks.lead():
            calibration.read(opened, plan, job.calibration)
            if job.work is not None:
                journal.room(job.work, spill(plan, opened, 0))
        return plan


@memory.steady()
def compressed(job: Job, out: Path, text: Text, progress: Progress | None = None) -> Compression:
    """Carry out the job, put the folder to `out` and measure it on `text`, or not where that has no windows.

    Raises LilliputError; what is finished is kept.
    """
    began = time.perf_counter()
    progress = Quiet() if not ranks.lead() else Progress() if progress is None else progress
    with ranks.joined(), progress as display:
        with ranks.together():
            _refuse(out, job.work, text)
            opened, plan = _open(job, measured=text.windows > 0)
        try:
            return _run(opened, plan, out.absolute(), job, text, display, began)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LilliputError(
                    f"the disk is full ({error.filename or out.parent}); nothing is lost: free some space and "
                    "repeat the command, which continues where it stopped"
                ) from None
            raise


def _open(job: Job, *, measured: bool = True) -> tuple[Model, Plan]:
    opened, plan = resolved(job, measured=measured)
    for task in choices.steps(plan):
        choices.feasible(plan, opened, task, sizing.sizer(plan, task, opened))
    return opened, plan


def resolved(job: Job, *, measured: bool = True) -> tuple[Model, Plan]:
    """The model of a job and its plan. Raises PlanError for what cannot be carried out, whatever its size."""
    text, compute = job.calibration, job.compute
    if text.samples < 1 or text.tokens < 2:
        raise PlanError(
            f"{text.samples} samples of {text.tokens} tokens: calibration takes at least 1 sample of 2 tokens"
        )
    if job.fit is not None:
        recipe = compose(job.fit)
    else:
        recipe = job.recipe if isinstance(job.recipe, Recipe) else recipes.load(job.recipe)
    adjusted = recipes.with_settings(recipe, job.settings) if job.settings else recipe
    where = choose_device(compute.device)
    dtype = compute_dtype(compute.dtype, where)
    base = open_model(job.model, dtype=dtype, device=where)
    if behaviours.of(base.skeleton.model) is not None:
        raise PlanError(
            f"{job.model} leaves tokens or channels out while it runs, so its blocks are not those that would be "
            "compressed: compress the model that it was made of, with that step at the end of the recipe"
        )
    if caches.of(base.skeleton.model) is not None:
        raise PlanError(
            f"{job.model} stores keys and values compressed, and would be written without that: compress the model "
            "that it was made of, with that step at the end of the recipe"
        )
    if base.source.inputs:
        raise PlanError(
            f"{job.model} rounds the inputs of its linears, and would be written without that: compress the model that "
            "it was made of, with that step behind the one for the weights"
        )
    if job.fit is not None and not any(block.links for block in base.anatomy().blocks):
        recipe = compose(job.fit, folds=False)
        adjusted = recipes.with_settings(recipe, job.settings) if job.settings else recipe
    opened = editing.prepared(base, adjusted, text.data)
    calibration.known_positions(opened, text.tokens)
    plan = make(
        opened,
        adjusted,
        samples=text.samples,
        tokens=text.tokens,
        budget=job.limits.memory,
        size=job.limits.size if job.fit is None else None,
        context=job.limits.context,
        seed=text.seed,
        dtype=dtype,
        device=where,
        measured=measured,
        processes=ranks.size(),
        teacher=None if job.teacher is None else open_model(job.teacher, dtype=dtype, device=where),
    )
    caching.long_enough(plan)
    plan = replace(plan, container=None if job.fit is None else job.fit.to, texts=texts.hashed(adjusted))
    for task in choices.steps(plan):
        plan = sizing.sizer(plan, task, opened)(plan)
    return opened, plan


def _refuse(out: Path, elsewhere: Path | None, text: Text) -> None:
    if os.path.lexists(out) and not journal.published(out.absolute(), elsewhere):
        raise LilliputError(f"{out} exists already: choose another --out, or move it away first")
    if not out.absolute().parent.is_dir():
        raise LilliputError(f"the folder {out.absolute().parent} does not exist: create it, or choose another --out")
    refuse_work(elsewhere)
    if text.windows == 1:
        raise DataError("one window gives no interval: use 2 or more, or 0 for no measurement")


def refuse_work(place: Path | None) -> None:
    """Raises PlanError where no folder can be made at `place`."""
    if place is None:
        return
    existing = next(x for x in (place, *place.parents) if os.path.lexists(x))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "cannot be written to" if existing.is_dir() else "is no folder"
        raise PlanError(f"--work {place}: {existing} {why}; name a folder for the unfinished run")


def spill(plan: Plan, model: Model, eval_windows: int) -> int:
    """Bytes of what lies in the work folder at its fullest."""
    measuring = Cost(disk=2 * eval_windows * window(model) * model.skeleton.hidden_size * 4 if eval_windows else 0)
    return stream.cost(plan, model).then(measuring).then(Cost(disk=plan.driving.disk)).disk


def _folders(plan: Plan) -> int:
    """Bytes of the folder, beside which a training step writes the trained one."""
    return plan.folder_bytes * (2 if plan.resolved.at(Stage.TRAINING) else 1)


def _shared(tokens: Tokens | None, plan: Plan) -> Tokens | None:
    """The leader's tokens on all ranks."""
    if not plan.resolved.reads_tokens:
        return None
    source = ranks.agreed("" if tokens is None else tokens.source)
    ids = ranks.same(torch.empty(plan.samples, plan.tokens, dtype=torch.int64) if tokens is None else tokens.ids)
    return Tokens.of(ids, source) if tokens is None else tokens


def read(opened: Model, plan: Plan, text_options: Calibration, text: Text) -> tuple[Plan, Tokens | None]:
    """The plan with the checkpoint's fingerprint, and the calibration windows. The leader alone reads.

    Text that is missing or too short is found before the checkpoint is read, not after the work.
    """
    tokens: Tokens | None = None
    with ranks.together():
        if ranks.lead():
            tokens = calibration.read(opened, plan, text_options)
            calibration.measurable(opened, text)
            opened.source.scan()
            plan = replace(plan, fingerprint=opened.source.fingerprint())  # now that every byte has been read
            if text_options.data == "self":
                tokens = calibration.write(opened, plan, text_options.seed)
    return plan, _shared(tokens, plan)


def _run(opened: Model, plan: Plan, out: Path, job: Job, text: Text, progress: Progress, began: float) -> Compression:
    plan, tokens = read(opened, plan, job.calibration, text)
    batching: dict[str, Any] = {"batch": plan.batching.batch, "lockstep": plan.batching.lockstep}
    if plan.budget is None:
        # Batching depends on the free memory of the moment; a resumed run keeps what it began with.
        before = journal.first_facts(out, job.work)
        batching |= {k: before[k] for k in batching if k in before}
    batching = ranks.agreed(batching)
    plan = replace(plan, batching=replace(plan.batching, **batching))
    taught = "" if job.teacher is None else f" taught by {open_model(job.teacher).source.fingerprint()}"
    key = plan.hash(("none" if tokens is None else tokens.fingerprint) + taught)
    original: Model | None = None
    evaluation: Evaluation | None = None
    warnings: tuple[str, ...] = ()
    look: Look | None = None
    with Work(out, key, job.work, batching) as place:
        with ranks.together():
            if ranks.lead():
                place.need(_folders(plan), spill(plan, opened, text.windows))
        skipped = len(place.find("block"))
        training.exchange(place)
        if training.begun(place):
            rows = stream.finished_rows(place)
        else:
            rows = stream.run(plan, opened, None if tokens is None else tokens.ids, place, progress)
        peak = max(ranks.gathered(memory.peak_above_base()))
        opened = editing.again(plan, opened, place)
        plan = stages.decided(resized(plan, opened), opened, place)
        facts = delivery.Delivery(plan, opened, key, tokens, tuple(rows), place.hashes(), training.rows(place))
        with ranks.together():
            if ranks.lead():
                delivery.write_loadable(place.staging, facts)
        if training.pending(plan, place):
            name = opened.source.model if job.teacher is None else job.teacher
            taught_by = open_model(name, dtype=plan.dtype, device=plan.device)
            training.train(plan, taught_by, tokens, place, progress)
            facts = replace(facts, hashes=place.hashes(), training=training.rows(place))
            if ranks.lead():
                delivery.write_loadable(place.staging, facts)
        if ranks.lead():
            look = delivery.opened(place, out, plan.room, progress)
            if text.windows > 0:
                original = open_model(opened.source.model if job.teacher is None else job.teacher, device=plan.device)
                seen = [x for x in (tokens, *lessons.seen(plan, place)) if x is not None]
                evaluation = _measure(original, plan, place, seen, text, progress)
                warnings = evaluation.notes
            warnings = (*warnings, *look.notes)
            spent, peak = time.perf_counter() - began, max(peak, memory.peak_above_base())
            delivery.write_report(place.staging, facts, look, evaluation, spent, peak, warnings)
            _within(place.staging, plan, job.fit)
        place.publish()
    evidence = None
    if evaluation is not None and original is not None:
        measured = replace(evaluation, model=str(out))
        notes = [*plan.notes, *evaluation.notes]
        evidence = assemble(measured, open_model(out), original, {"notes": notes}, Gates())
    return Compression(
        out=out,
        plan=plan,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=max(peak, memory.peak_above_base()),
        folder_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        skipped=skipped,
        evaluation=evaluation,
        rows=tuple(rows),
        warnings=warnings,
        engine=look,
        evidence=evidence,
    )


def _within(folder: Path, plan: Plan, fit: Fit | None) -> None:
    """Raises LilliputError for a folder of more bytes than were asked for, with the keys and values that count."""
    whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    cache = "" if plan.context is None else f" and its keys and values {plan.context.bytes}"
    written, whole = whole, whole + (0 if plan.context is None else plan.context.bytes)
    if fit is not None and fit.size is not None and fit.to is None and whole > fit.size:
        raise LilliputError(
            f"the folder has {written} bytes{cache}, {whole - fit.size} more than --size {fit.size}: the files beside "
            f"the weights are larger than planned; ask for --size {2 * fit.size - whole}"
        )


def _measure(
    original: Model, plan: Plan, place: Work, seen: Sequence[Tokens], text: Text, progress: Progress
) -> Evaluation:
    made = adapting.beside(plan, place.staging)
    adapted = made is not None and beside_linears(made)
    found = measure(
        open_adapted(place.staging, made if adapted else None, device=plan.device),
        original,
        work=place.folder,
        data=text.data,
        windows=text.windows,
        tokens=window(original),
        detail=True,
        memory=plan.room,
        calibration=seen,
        progress=progress,
    )
    said = () if made is None else (ADAPTED if adapted else BARE,)
    return replace(found, notes=(*found.notes, *said))
