"""The text of a training step: read once, kept beside the journal, so that a resumed run trains on the same rows."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lilliput.data import lessons as texts
from lilliput.data.generate import generate_tokens
from lilliput.data.lessons import Lessons
from lilliput.data.tokens import Tokens
from lilliput.errors import DataError
from lilliput.machine import ranks
from lilliput.model.stored import Model
from lilliput.plan.adapting import lengthening
from lilliput.plan.plan import Plan
from lilliput.run.journal import Work, save_atomically
from lilliput.training.packing import leaks
from lilliput.verbs.spec import Stage, Task
from lilliput.verbs.train import common


def folder(work: Work) -> Path:
    """Where files lie that all processes read: the leader's folder."""
    return work.folder if ranks.lead() else work.folder.parent


def of(plan: Plan, task: Task, model: Model, taught_by: Model, tokens: Tokens | None, work: Work) -> Lessons:
    """The rows that a step trains on; of several processes the leader reads. Raises DataError."""
    path = _path(work, task)
    with ranks.together():
        if ranks.lead() and not path.exists():
            _save(path, _read(plan, task, model, taught_by, tokens))
    found = _load(path)
    limit, tokens_each = model.skeleton.positions, found.ids.shape[1]
    before = lengthening(task)
    if limit is not None and tokens_each + before > limit:
        more = f" after {before} positions of the step's own" if before else ""
        raise DataError(
            f"{task.label}: samples of {tokens_each} tokens{more} are longer than the model's {limit}: ask for fewer "
            "--tokens"
        )
    return found


def separate(model: Model, lessons: Lessons, name: str) -> None:
    """Raises DataError where rows hold several documents and the model, which is loaded whole, lets one see another."""
    if lessons.positions is not None and leaks(model.skeleton):
        raise DataError(
            f"{name} lets documents of one row see each other, whatever positions it is given: train on text in one "
            "piece (a .txt file, or rows with 'text' and documents: false)"
        )


def seen(plan: Plan, work: Work) -> list[Tokens]:
    """The texts of training steps, to look for overlap with."""
    paths = [_path(work, task) for task in plan.resolved.at(Stage.TRAINING)]
    return [_load(path).tokens() for path in paths if path.exists()]


def _path(work: Work, task: Task) -> Path:
    return folder(work) / f"lessons-{task.step}.safetensors"


def _read(plan: Plan, task: Task, model: Model, taught_by: Model, tokens: Tokens | None) -> Lessons:
    o = common(task.options)
    if o.data is None:
        if tokens is None:
            raise DataError(f"{task.label} has no text: name one with --data or its option `data`")
        return texts.whole(tokens.ids, tokens.source)

    def own(count: int) -> Tokens:
        tokenizer = taught_by.source.tokenizer()
        return generate_tokens(taught_by, tokenizer, samples=count, tokens=o.tokens, seed=o.seed, greedy=o.greedy)

    return texts.read(
        o.data,
        model.source.tokenizer(),
        samples=max(1, o.steps * o.batch),
        tokens=o.tokens,
        apart=o.documents,
        vocabulary=model.vocabulary,
        own=own,
    )


def _save(path: Path, lessons: Lessons) -> None:
    facts = {"source": lessons.source, "domains": json.dumps(lessons.domains)}
    save_atomically(path, lessons.tensors(), facts)


def _load(path: Path) -> Lessons:
    tensors: dict[str, Tensor] = {}
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Lessons.taken_up(tensors, facts["source"], json.loads(facts["domains"]))
