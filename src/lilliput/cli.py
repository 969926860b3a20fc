"""The command line: arguments to one call of `lilliput.api`, its answer to a table or to one JSON object."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from lilliput.errors import LilliputError

app = typer.Typer(
    name="lilliput",
    help="Compress a Hugging Face causal language model under a budget, and say what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArg = Annotated[str, typer.Argument(help="A folder with safetensors, a GGUF file, or a Hugging Face id.")]
RecipeOpt = Annotated[str, typer.Option(help="A named recipe, a method, a catalogue id, or a .yaml file.")]
DataOpt = Annotated[
    str, typer.Option(help="docs, self, a .txt or .jsonl file, or hub:DATASET[:CONFIG][:SPLIT][:COLUMN].")
]
SamplesOpt = Annotated[int, typer.Option(min=1, help="Calibration samples.")]
TokensOpt = Annotated[int, typer.Option(min=2, help="Tokens in a calibration sample.")]
MemoryOpt = Annotated[str | None, typer.Option(help="RAM that is never exceeded, such as 4GB.")]
SizeOpt = Annotated[str | None, typer.Option(help="Largest output, such as 400MB: the plan refuses more.")]
DtypeOpt = Annotated[str, typer.Option(help="Calibration forward: auto, bfloat16 or float32.")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, or a torch device.")]
WorkOpt = Annotated[Path | None, typer.Option(help="Folder for the unfinished run; beside the output unless given.")]
SetOpt = Annotated[list[str] | None, typer.Option("--set", metavar="STEP.KEY=VALUE", help="Change the recipe. Repeat.")]
SeedOpt = Annotated[int | None, typer.Option(help="Draw calibration samples at random instead of from the start.")]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output, all else on standard error.")
]


@app.command()
def compress(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    recipe: RecipeOpt = "w4",
    data: DataOpt = "docs",
    samples: SamplesOpt = 128,
    tokens: TokensOpt = 512,
    memory: MemoryOpt = None,
    size: SizeOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    work: WorkOpt = None,
    settings: SetOpt = None,
    seed: SeedOpt = None,
    eval_data: Annotated[str | None, typer.Option(help="Text to measure on [docs:library].")] = None,
    eval_windows: Annotated[int, typer.Option(min=0, help="Windows of 1,024 tokens to measure on; 0: none.")] = 8,
    as_json: JsonOpt = False,
) -> None:
    """Compress MODEL into a folder that engines load, and report what it cost."""

    def run() -> Any:
        from lilliput import api
        from lilliput.progress import Progress
        from lilliput.report.units import parse_size

        with Progress() as progress:
            return api.compress(
                model,
                out,
                recipe=recipe,
                data=data,
                samples=samples,
                tokens=tokens,
                memory=None if memory is None else parse_size(memory, "--memory"),
                size=None if size is None else parse_size(size, "--size"),
                dtype=dtype,
                device=device,
                work=work,
                seed=seed,
                settings=tuple(settings or ()),
                eval_data=eval_data,
                eval_windows=eval_windows,
                progress=progress,
            ).to_json()

    _answer(run, "compress", as_json, resume=True)


@app.command()
def plan(
    model: ModelArg,
    recipe: RecipeOpt = "w4",
    data: DataOpt = "docs",
    samples: SamplesOpt = 128,
    tokens: TokensOpt = 512,
    memory: MemoryOpt = None,
    size: SizeOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = "auto",
    work: WorkOpt = None,
    settings: SetOpt = None,
    seed: SeedOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """What compress would do: bytes by kind of tensor, bits per weight, peak RAM, time. Reads no weights."""

    def run() -> Any:
        from lilliput import api
        from lilliput.report.units import parse_size

        return api.plan(
            model,
            recipe=recipe,
            data=data,
            samples=samples,
            tokens=tokens,
            memory=None if memory is None else parse_size(memory, "--memory"),
            size=None if size is None else parse_size(size, "--size"),
            dtype=dtype,
            device=device,
            work=work,
            seed=seed,
            settings=tuple(settings or ()),
        ).to_json()

    _answer(run, "plan", as_json)


@app.command(name="eval")
def evaluate(
    model: ModelArg,
    against: Annotated[str | None, typer.Option(help="The original: adds ratio, KL divergence and agreement.")] = None,
    data: DataOpt = "docs:library",
    windows: Annotated[int, typer.Option(min=2, help="Windows to score, from the first token on.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    memory: MemoryOpt = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: JsonOpt = False,
) -> None:
    """Measure MODEL as it lies on disk: every quality figure with its 95 % interval."""

    def run() -> Any:
        from lilliput import api
        from lilliput.progress import Progress
        from lilliput.report.units import parse_size

        budget = None if memory is None else parse_size(memory, "--memory")
        with Progress() as progress:
            return api.evaluate(
                model,
                against,
                data=data,
                windows=windows,
                tokens=tokens,
                memory=budget,
                dtype=dtype,
                progress=progress,
            ).to_json()

    _answer(run, "evaluation", as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compress wrote.")],
    as_json: JsonOpt = False,
) -> None:
    """Check that a written folder is whole: hashes, shapes, finite, and that its engine loads it."""

    def run() -> Any:
        from lilliput import api

        return _plain(api.verify(folder))

    if _answer(run, "verify", as_json).get("problems"):
        raise typer.Exit(2)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method or a catalogue id.")] = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print a recipe that runs NAME, as YAML.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """All methods; one method's page; or a recipe that runs a method or a catalogue id."""
    from lilliput import catalogue
    from lilliput.errors import PlanError
    from lilliput.recipe import load, to_yaml

    with _guarded():
        if recipe:
            if name is None:
                raise PlanError("--recipe needs a name, a method's or a catalogue id: `lilliput methods gptq --recipe`")
            found = load(name)
            _write(_dump(found.model_dump(mode="json", exclude_defaults=True)) if as_json else to_yaml(found))
        elif as_json:
            _write(_dump(catalogue.index() if name is None else catalogue.entry(catalogue.find(name))))
        elif name is not None:
            _write(catalogue.page(catalogue.find(name)))
        else:
            from lilliput.report import table

            Console().print(table.methods(catalogue.index()))


@app.command()
def inspect(
    model: ModelArg,
    data: Annotated[str | None, typer.Option(help="Text to measure per-site outliers on.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Anatomy of MODEL: blocks, sites, links, groups, parameter counts; outliers by site when --data is given."""

    def run() -> Any:
        from lilliput import api

        return _plain(api.inspect(model, data=data))

    _answer(run, "inspect", as_json)


@app.command()
def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
) -> None:
    """Let MODEL continue a prompt, to see with your own eyes that it still speaks."""

    def run() -> Any:
        from lilliput import api

        return api.generate(model, prompt, max_new_tokens=max_new_tokens)

    with _guarded():
        with _redirected():
            text = run()
        _write(f"{text}\n")


def main() -> None:
    """Entry point of the `lilliput` command."""
    app()


def _answer(run: Callable[[], Any], view: str, as_json: bool, resume: bool = False) -> Any:
    """Run, then print the plain data that came back: a table, or one JSON object. Returns it."""
    with _guarded(resume):
        with _redirected():
            data = run()
        if as_json:
            _write(_dump(data))
        else:
            from lilliput.report import table

            views: dict[str, Callable[[Any], RenderableType]] = {
                "compress": table.compress,
                "plan": table.plan,
                "evaluation": table.evaluation,
                "verify": table.verify,
                "inspect": table.inspect,
            }
            Console().print(views[view](data))
    return data


def _plain(answer: Any) -> Any:
    return answer.to_json() if hasattr(answer, "to_json") else answer


def _dump(data: Any) -> str:
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    """The same data with null for NaN and infinity, which JSON cannot say."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _redirected() -> Iterator[None]:
    """What libraries print, from C as well, goes to standard error: standard output is for the answer alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _guarded(resume: bool = False) -> Iterator[None]:
    """Turn errors that the user can mend into one message and exit status 2, and Ctrl-C into status 130."""
    try:
        yield
    except LilliputError as error:
        _say(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        more = " Run the same command again: it goes on after the last finished block." if resume else ""
        _say(f"interrupted.{more}")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename}"
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = ". Make room" + (" and run the same command again: finished blocks are kept" if resume else "")
        _say(f"error: {error.strerror or error}{place}{remedy}")
        raise typer.Exit(2) from None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
