"""Compressed and converted in one go: the folder is made beside the output, becomes the container, and goes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from lilliput import export
from lilliput.errors import LilliputError, PlanError
from lilliput.export import convert
from lilliput.export.convert import Converted
from lilliput.export.convert.folder import vacant
from lilliput.machine import ranks
from lilliput.options import Text
from lilliput.progress import Progress
from lilliput.recipe.load import load
from lilliput.recipe.schema import Recipe
from lilliput.run import session
from lilliput.run.result import Compression
from lilliput.run.session import Job
from lilliput.source.open import open_source


def converted(job: Job, out: Path, to: str, text: Text, progress: Progress | None = None) -> Compression:
    """Carry out the job, measure its folder, and write it to `out` as the container `to`.

    The metadata of a GGUF file that is compressed are carried over to a GGUF file. Raises LilliputError: before
    anything is compressed where the container cannot hold the result.
    """
    converter = convert.get(to)
    folder = out.absolute().with_name(f".{out.name}.folder")
    vacant(out)
    if folder.exists():
        raise PlanError(
            f"{folder} holds an earlier result for this output: `lilliput convert {folder} --to {to} --out {out}` "
            "writes it, or remove the folder"
        )
    if job.fit is None:
        recipe = job.recipe if isinstance(job.recipe, Recipe) else load(job.recipe)
        job = replace(job, recipe=recipe.model_copy(update={"export": "lilliput"}))
    planned = session.planned(job)
    reason = converter.refuse(tuple(planned.outcomes.values()), open_source(str(job.model)).config)
    if planned.spread:
        reason = "its blocks will differ in width, and the engine has one width for all: set uniform to true"
    if reason is not None:
        raise PlanError(f"the result cannot be written as {to}: {reason}")
    result = session.compressed(job, folder, text, progress)
    if not ranks.lead():
        return replace(result, out=out)
    model = Path(job.model).expanduser()
    like = model if to == "gguf" and model.suffix == ".gguf" else None
    container = converter.convert(folder, out, convert.Wanted(like))
    shutil.rmtree(folder)
    if job.fit is not None and job.fit.size is not None and container.bytes > job.fit.size:
        if out.is_dir():
            shutil.rmtree(out)
        else:
            out.unlink()
        raise LilliputError(
            f"{out} would have {container.bytes} bytes, {container.bytes - job.fit.size} more than --size "
            f"{job.fit.size}: ask for --size {2 * job.fit.size - container.bytes}"
        )
    return _answer(result, out, container)


def _answer(result: Compression, out: Path, container: Converted) -> Compression:
    """The answer for the container: its notes take the place of the one on how the folder is read."""
    outcomes = tuple(result.plan.outcomes.values())
    folder_note = export.get(result.plan.exporter).dense_note(outcomes)
    evidence = result.evidence
    if evidence is not None and "notes" in evidence:
        evidence = {**evidence, "notes": [*(x for x in evidence["notes"] if x != folder_note), *container.notes]}
    return replace(
        result,
        out=out,
        plan=replace(result.plan, notes=tuple(x for x in result.plan.notes if x != folder_note)),
        warnings=(*result.warnings, *container.notes),
        converted=container,
        folder_bytes=container.bytes,
        evidence=evidence,
    )
