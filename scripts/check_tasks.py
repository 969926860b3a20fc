#!/usr/bin/env python3
"""Compare our task scores with those of EleutherAI's lm-evaluation-harness on the same local items.

    python scripts/check_tasks.py MODEL NAME=FILE.jsonl [NAME=FILE.jsonl ...] [--limit 40] [--json OUT.json]

The harness reads its own task definitions, with only the place of the data set replaced, and scores them with its own
model class: nothing of ours is in its way. Compared are the prompts and continuations, the log-likelihood of each
request, and each metric of each item. Ends with status 1 where prompts or metrics differ, or a log-likelihood by more
than --tolerance nats. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.tasks import files
from lilliput.tasks.choice import Choice
from lilliput.tasks.likelihood import Loaded, log_likelihoods
from lilliput.tasks.run import loaded

Row = Mapping[str, Any]


def _lettered(question: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        letters = list("ABCDEFGH"[: len(row["choices"])])
        choices = {"text": row["choices"], "label": letters}
        return {question: row["question"], "choices": choices, "answerKey": letters[row["label"]]}

    return convert


def _same(row: Row) -> dict[str, Any]:
    return dict(row)


# Our name -> the harness's, and rows as the hub has them.
TASKS: Mapping[str, tuple[str, Callable[[Row], dict[str, Any]]]] = {
    "piqa": ("piqa", _same),
    "arc_easy": ("arc_easy", _lettered("question")),
    "arc_challenge": ("arc_challenge", _lettered("question")),
    "openbookqa": ("openbookqa", _lettered("question_stem")),
    "hellaswag": ("hellaswag", lambda row: {**row, "label": str(row["label"])}),
    "winogrande": ("winogrande", _same),
    "boolq": ("boolq", lambda row: {**row, "label": int(row["answer"])}),
    "copa": ("copa", _same),
    "sciq": ("sciq", _same),
    "social_iqa": ("social_iqa", _same),
    "commonsenseqa": ("commonsense_qa", _lettered("question")),
    "lambada": ("lambada_openai", lambda row: {"text": f"{row['context']} {row['target']}"}),
}


def _definition(name: str, rows: Sequence[Row], folder: Path) -> Path:
    """A task file that is the harness's own but for where the rows lie."""
    from lm_eval.tasks import TaskManager

    theirs, convert = TASKS[name]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(convert(row)) + "\n" for row in rows), encoding="utf-8")
    place = TaskManager().task_index[theirs].yaml_path
    config = {
        "include": str(place),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    file = folder / f"local_{name}.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def _theirs(model: Loaded, file: Path) -> list[dict[str, Any]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4, device=str(model.model.device))
    results: Any = lm_eval.simple_evaluate(model=lm, tasks=[str(file)], log_samples=True, bootstrap_iters=0)
    (samples,) = results["samples"].values()
    return sorted(samples, key=lambda x: int(x["doc_id"]))


def compare(model: Loaded, spec: files.Spec, limit: int, folder: Path) -> dict[str, Any]:
    """One row of the table: how far our scores are from the harness's."""
    task = files.load_task(spec, limit=limit, shots=0)
    assert spec.file is not None
    rows = [row for _, row in files.rows(spec.file)][:limit]
    theirs = _theirs(model, _definition(spec.entry, rows, folder))
    prompts, gaps, differing = 0, [0.0], 0
    ours = task.kind.measure(model, task.shape, task.items, lambda done, total: None)
    for i, (item, sample) in enumerate(zip(task.items, theirs, strict=True)):
        choice = isinstance(item, Choice)
        pairs = list(zip(item.contexts, item.continuations, strict=True)) if choice else [(item.context, item.target)]
        prompts += [tuple(x) for x in sample["arguments"]] != pairs
        scores = log_likelihoods(model, pairs)
        gaps += [abs(a.value - float(b[0][0])) for a, b in zip(scores, sample["resps"], strict=True)]
        differing += any(float(sample[m]) != ours[m][i] for m in ("acc", "acc_norm") if m in ours and m in sample)
    metric = task.shape.metric if task.shape.metric in theirs[0] else "acc"
    return {
        "task": spec.name,
        "items": len(theirs),
        "metric": metric,
        "ours": sum(ours[metric]) / len(theirs),
        "harness": sum(float(x[metric]) for x in theirs) / len(theirs),
        "prompts_differing": prompts,
        "items_differing": differing,
        "largest_gap_nats": max(gaps),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    table = []
    with loaded(options.model) as model, tempfile.TemporaryDirectory() as folder:
        for text in options.tasks:
            row = compare(model, files.parse(text), options.limit, Path(folder))
            table.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    bad = [x for x in table if x["prompts_differing"] or x["items_differing"]]
    bad += [x for x in table if x["largest_gap_nats"] > options.tolerance]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
