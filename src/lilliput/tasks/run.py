"""Two models on the same items: one is loaded, scores everything and is freed before the other."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.data.overlap import items_seen
from lilliput.data.tokens import Tokens, check_ids, same_vocabulary, vocabulary_of
from lilliput.errors import DataError, SourceError
from lilliput.machine import memory
from lilliput.metrics.evaluate import compute_dtype
from lilliput.metrics.vocabulary import shared
from lilliput.progress import Progress, Quiet
from lilliput.source import open_source
from lilliput.tasks import harness
from lilliput.tasks.answers import store_for
from lilliput.tasks.files import Spec, Task, load_task, parse
from lilliput.tasks.likelihood import Loaded, context_length, ids_of
from lilliput.tasks.result import Scored, Scores, TaskResult, results
from lilliput.tasks.shapes import ability_of
from lilliput.tasks.vocabulary import narrow_

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Answers:
    """One model's scores of one task: those of a file, or of what the harness made of a name."""

    kind: str
    metric: str
    shots: int
    fingerprint: str
    scores: Scores
    ability: str
    categories: tuple[str, ...] = ()


@contextmanager
def loaded(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    work: Path | None = None,
    tokens: Sequence[int] | None = None,
) -> Iterator[Loaded]:
    """A model in memory while the context lasts, freed afterwards.

    tokens: ids of those that it reads and predicts, of `shared_tokens` (None: all). work: a folder in which its answers
    are kept, so that an interrupted evaluation goes on. Raises SourceError for a folder that cannot be loaded,
    PlanError for an unknown dtype, DataError for a model that cannot be told to leave tokens out.
    """
    import torch

    from lilliput.runtime.load import load

    compute = compute_dtype(dtype)
    source = open_source(str(model))
    try:
        whole: Any = load(source.folder, dtype=compute).to(torch.device(device))
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error).strip().splitlines()
        raise SourceError(
            f"{model} cannot be loaded whole to run tasks ({text[0] if text else type(error).__name__}): give a "
            "folder that transformers opens, and enough memory for all of it."
        ) from error
    named = () if tokens is None else (hashlib.sha256(repr(list(tokens)).encode()).hexdigest(),)
    answers = store_for(work, source.folder, dtype, torch.device(device).type, *named)
    if tokens is not None:
        narrow_(whole, tokens, str(model))
        source = source.trimmed(tokens)
    try:
        yield Loaded(whole, source.tokenizer(), str(model), context_length(whole), answers)
    finally:
        del whole
        gc.collect()
        memory.trim()


def shared_tokens(model: str | Path, against: str | Path) -> tuple[int, ...] | None:
    """The ids of the tokens that both have where `against` has more (`trim-vocabulary`), else None."""
    ours, theirs = open_source(str(model)), open_source(str(against))
    rows = [int(getattr(x.text_config, "vocab_size", 0) or 0) for x in (ours, theirs)]
    return shared(ours, theirs, (rows[0], rows[1]))


def _same_tokens(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, tasks: Sequence[Task], names: str
) -> None:
    """Raises DataError where two tokenizers do not cut the items alike."""
    same_vocabulary(vocabulary_of(ours), vocabulary_of(theirs), names)
    for task in tasks:
        for item in task.items:
            text = task.kind.text(item)
            if ids_of(ours, text) != ids_of(theirs, text):
                raise DataError(
                    f"{names} cannot be compared: their tokenizers cut an item of '{task.name}' into different tokens."
                )


def fewer_note(tokens: int) -> str:
    """What is compared where the base has more tokens, in words."""
    return f"the base reads and predicts the {tokens:,} tokens that the model has, and no others"


def overlap_note(task: Task, tokenizer: PreTrainedTokenizerBase, calibration: Tokens) -> str:
    """What calibration and task share, in words: items of which a run of 13 tokens occurs in the calibration tokens.

    Empty where there is none. Both must come from `tokenizer`.
    """
    flags = items_seen(calibration, [ids_of(tokenizer, task.kind.text(x), special=False) for x in task.items])
    if not sum(flags):
        return ""
    return (
        f"{sum(flags)} of {len(flags)} items share 13 tokens or more with the calibration text '{calibration.source}': "
        "this task's figures may look better than they are"
    )


def _answers(
    model: Loaded,
    specs: Sequence[Spec],
    tasks: Mapping[str, Task],
    limit: int | None,
    shots: int | None,
    display: Progress,
) -> dict[str, _Answers]:
    """Answers by name, in the order of the specifications; a harness group gives one for each of its tasks."""
    answers: dict[str, _Answers] = {}

    def step(name: str) -> Callable[[int, int], None]:
        return lambda done, total: display.step(done, total, f"{name}, {Path(model.name).name}")

    for spec in specs:
        task = tasks.get(spec.name)
        if task is None:
            scored = harness.run(
                model, [spec.name], definition=spec.definition, limit=limit, shots=shots, step=step(spec.name)
            )
            for name, x in scored.items():
                answers[name] = _Answers(x.kind, x.metric, x.shots, x.fingerprint, x.scores, ability_of(name))
        else:
            scores = task.kind.measure(model, task.shape, task.items, step(spec.name))
            answers[spec.name] = _Answers(
                task.shape.kind,
                task.shape.metric,
                task.shots,
                task.fingerprint,
                scores,
                task.shape.ability,
                task.categories,
            )
    return answers


def check_tasks(
    model: str | Path,
    against: str | Path | None,
    specs: Sequence[str | Spec],
    *,
    limit: int | None = None,
    shots: int | None = None,
) -> tuple[list[Spec], dict[str, Task], PreTrainedTokenizerBase]:
    """The specifications, the items of those that name a file, and the model's tokenizer. Loads no model.

    Raises LilliputError for whatever `run_tasks` would not be able to run, as far as it can be known.
    """
    parsed = [x if isinstance(x, Spec) else parse(x) for x in specs]
    names = [x.name for x in parsed]
    twice = next((x for x in names if names.count(x) > 1), None)
    if twice is not None or not parsed:
        raise DataError(f"the task '{twice}' is given twice." if twice else "no task is given: use NAME=FILE.jsonl.")
    tasks = {x.name: load_task(x, limit=limit, shots=shots) for x in parsed if x.file is not None}
    for x in parsed:
        if x.file is None:
            harness.check(x.name, x.definition)
    sources = {str(x): open_source(str(x)) for x in (model, against) if x is not None}
    kept = None if against is None else shared_tokens(model, against)
    if kept is not None:
        sources[str(against)] = sources[str(against)].trimmed(kept)
    tokenizers = {name: source.tokenizer() for name, source in sources.items()}
    ours = tokenizers[str(model)]
    for name, source in sources.items():
        rows = len(kept) if kept is not None else getattr(source.text_config, "vocab_size", None)
        for task in tasks.values():
            for item in task.items:
                check_ids(ids_of(ours, task.kind.text(item)), ours, rows, f"an item of '{task.name}' for {name}")
    if against is not None:
        _same_tokens(ours, tokenizers[str(against)], list(tasks.values()), f"'{model}' and '{against}'")
    return parsed, tasks, ours


def run_tasks(
    model: str | Path,
    against: str | Path | None,
    specs: Sequence[str | Spec],
    *,
    limit: int | None = None,
    shots: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    work: str | Path | None = None,
    calibration: Tokens | None = None,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Score tasks with a model and, against a base model, test what changed.

    specs: see `files.parse`: "piqa=FILE.jsonl" for a known data set, "my=FILE.jsonl" for the own formats,
    "gsm8k=TEST.jsonl+TRAIN.jsonl" with worked examples, "piqa" alone for the harness, "my=FILE.yaml" for a task in the
    harness's own form. limit: the first so many items of each; shots: worked examples, by default what the table says.
    Both models see identical items, one model in memory at a time; of a base that has more tokens (`trim-vocabulary`)
    those that both have take part. work: folder that keeps answers, so that an
    interrupted run goes on. calibration: tokens that the model was calibrated on; items that occur there are noted.

    Raises DataError (bad task or row, models with different tokenizers, no network for a task without a file),
    SourceError (a model that cannot be loaded, logits that are not finite), PlanError (unknown dtype).
    """
    parsed, tasks, tokenizer = check_tasks(model, against, specs, limit=limit, shots=shots)
    kept = None if against is None else shared_tokens(model, against)
    folder = None if work is None else Path(work)
    with Quiet() if progress is None else progress as display:
        with loaded(model, device=device, dtype=dtype, work=folder) as whole:
            ours = _answers(whole, parsed, tasks, limit, shots, display)
        del whole
        base: dict[str, _Answers] | None = None
        if against is not None:
            with loaded(against, device=device, dtype=dtype, work=folder, tokens=kept) as whole:
                base = _answers(whole, parsed, tasks, limit, shots, display)
            del whole
    files = {x.name: str(x.file) for x in parsed if x.file is not None}
    scored = []
    for name, x in ours.items():
        overlap = "" if calibration is None or name not in tasks else overlap_note(tasks[name], tokenizer, calibration)
        theirs_ = None if base is None else base[name].scores
        scored.append(
            Scored(
                name=name,
                kind=x.kind,
                metric=x.metric,
                shots=x.shots,
                source=files.get(name, "lm-evaluation-harness"),
                fingerprint=x.fingerprint,
                ours=x.scores,
                base=theirs_,
                notes=tuple(x for x in (overlap, "" if kept is None else fewer_note(len(kept))) if x),
                ability=x.ability,
                categories=x.categories,
            )
        )
    return results(scored)
