"""The commands that measure and compare: `lilliput eval` and `lilliput compare`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lilliput.cli import command
from lilliput.cli.options import HtmlOpt, JsonOpt, Measure, ModelArg, grouped
from lilliput.errors import DataError, PlanError
from lilliput.options import JUDGE_KEY, Gates, Judge, Parts, Text

MISSED = 3  # exit status where a stated limit is missed

JudgeOpt = Annotated[
    str | None,
    typer.Option(help="OpenAI-compatible server whose model judges instructions, such as http://localhost:8000/v1."),
]


@grouped
def evaluate(
    model: ModelArg,
    *,
    against: Annotated[str | None, typer.Option(help="The original: adds every comparison and the verdict.")] = None,
    measure: Measure,
    stride: Annotated[int | None, typer.Option(min=1, help="Begin windows this many tokens apart.")] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens read at a time where keys and values are stored compressed.")
    ] = Text.chunk,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, comma-separated: NAME=FILE.jsonl, NAME=FILE.yaml, instructions=FILE.jsonl, or one lm-eval "
            "knows."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task; by default all.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each item; by default the task's own number.")
    ] = None,
    judge: JudgeOpt = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name on that server.")] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Prompts that both models continue greedily; 0: none.")] = 0,
    where: Annotated[bool, typer.Option("--where", help="Find where the loss comes from; implied by --html.")] = False,
    roofline: Annotated[bool, typer.Option("--roofline", help="Predict times on named devices.")] = False,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter that MODEL computes with; text alone is measured.")
    ] = None,
    html: HtmlOpt = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0.0, help="Exit with 3 above this KL divergence, in nats.")
    ] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(min=0.0, help="Exit with 3 above this rise of perplexity; 0.05 is 5 %.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Exit with 3 below this share of equal first choices.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps answers, so that an interrupted run can continue.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure MODEL as stored on disk: every figure with its 95 % interval, and a verdict."""

    gates = Gates(max_kl, max_ppl_increase, min_agreement)
    parts = Parts(
        tasks=tuple(x.strip() for x in (tasks or "").split(",") if x.strip()),
        limit=limit,
        shots=shots,
        prompts=prompts,
        where=where or (html is not None and against is not None),
        speed=measure.speed,
        roofline=roofline or html is not None,
        judge=None if judge is None or judge_model is None else Judge(judge, judge_model, os.environ.get(JUDGE_KEY)),
        adapter=adapter,
    )

    def run() -> Any:
        from lilliput.progress import Progress
        from lilliput.report import page
        from lilliput.report.evidence import gather

        if against is None and gates != Gates():
            raise PlanError("a limit compares with the original: give it with --against")
        if (judge is None) != (judge_model is None):
            raise PlanError("a judge is a model on a server: give both --judge and --judge-model")
        if html is not None:
            page.writable(html)
        limits = measure.limits()
        with Progress() as progress:
            evaluation, evidence = gather(
                model,
                against,
                text=measure.text(stride, chunk),
                parts=parts,
                limits=limits,
                compute=replace(measure.compute(), work=work),
                gates=gates,
                progress=progress,
            )
        if html is not None:
            page.write(html, page.render(evidence))
        return evaluation.to_json() | evidence | {"suspects": (evidence.get("loss") or {}).get("suspects", [])}

    from lilliput.report import terminal

    answer = command.answer(run, terminal.evaluation, as_json)
    _complain([answer])
    if not all(gate["passed"] for gate in answer["gates"]):
        raise typer.Exit(MISSED)


@grouped
def compare(
    models: Annotated[list[str], typer.Argument(metavar="DIR DIR...", help="Compressed models, or saved evidence.")],
    *,
    against: Annotated[str | None, typer.Option(help="Their original; not needed for saved evidence.")] = None,
    measure: Measure,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Sizes and bit widths of one family: loss against the model's bits.")
    ] = False,
    html: HtmlOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Compare compressed models: folders, or files written by `lilliput eval --json`."""

    def run() -> Any:
        from lilliput.metrics.evaluate import evaluate_all
        from lilliput.progress import Progress
        from lilliput.report import page
        from lilliput.report.compare import comparison_rows, render_comparison
        from lilliput.report.evidence import gather
        from lilliput.report.scaling import render_scaling, scaling_rows

        if html is not None:
            page.writable(html)
        folders = [name for name in models if not name.endswith(".json")]
        if scaling and (against is not None or measure.speed):
            raise PlanError("models of several sizes have no common original: leave out --against and --speed")
        if folders and against is None and not scaling:
            raise PlanError(f"measuring {folders[0]} needs its original: give it with --against")
        saved = {name: _saved(Path(name)) for name in models if name not in folders}
        limits, compute, parts = measure.limits(), measure.compute(), Parts(speed=measure.speed)
        measured = {}
        with Progress() as progress:
            shared: Any = {"memory": limits.memory, "dtype": compute.dtype, "detail": True, "progress": progress}
            texts: list[Any] = [None] * len(folders)
            if folders and not scaling:
                texts = [*evaluate_all(folders, against, **vars(measure.text()), **shared)]
            for name, evaluation in zip(folders, texts, strict=True):
                settings: Any = {"limits": limits, "compute": compute, "evaluation": evaluation, "progress": progress}
                measured[name] = gather(name, against, text=measure.text(), parts=parts, **settings)[1]
        answer: list[Any] = [(saved | measured)[name] for name in models]
        rows = scaling_rows(answer) if scaling else comparison_rows(answer)
        if html is not None:
            page.write(html, render_scaling(answer) if scaling else render_comparison(answer))
        return {"models": rows, "evidence": answer}

    from lilliput.report import terminal

    view = terminal.scaling if scaling else terminal.comparison
    answer = command.answer(run, lambda answer: view(answer["evidence"]), as_json)
    _complain(answer["evidence"])


def _complain(evidences: Sequence[Any]) -> None:
    """Exit status 2 where a part that was asked for could not be measured; the others have been printed."""
    failed = [f"{part}: {why}" for x in evidences for part, why in (x.get("failed") or {}).items()]
    for line in failed:
        command.say(f"error: {line}")
    if failed:
        raise typer.Exit(2)


def _saved(path: Path) -> Any:
    try:
        evidence = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not evidence written by `lilliput eval --json`: {error}") from None
    if not isinstance(evidence, dict) or "quality" not in evidence:
        raise DataError(f"{path} contains no evidence: write it with `lilliput eval MODEL --against BASE --json`")
    return evidence


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(name="eval")(evaluate)
    app.command(name="compare")(compare)
