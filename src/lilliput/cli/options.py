"""Options that several commands share, each declared once: alone, or as a group that commands take as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lilliput.errors import PlanError
from lilliput.options import HELD_OUT, Calibration, Compute, Decoding, Limits, Text
from lilliput.units import parse_size, parse_time

ModelArg = Annotated[str, typer.Argument(help="A folder with safetensors, a GGUF file, or a Hugging Face id.")]
MemoryOpt = Annotated[str | None, typer.Option(help="RAM limit that is never exceeded, such as 4GB.")]
HtmlOpt = Annotated[Path | None, typer.Option(help="Write the report as one page to this file.")]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output, everything else on standard error.")
]


@dataclass(frozen=True)
class Job:
    """What compress and plan are told alike."""

    recipe: Annotated[
        str | None, typer.Option(help="A named recipe, a method, an id, or a .yaml file; by default w4-engines.")
    ] = None
    data: Annotated[
        str,
        typer.Option(
            help="docs, self, a .txt or .jsonl file, wikitext2:train, or hub:DATASET[:CONFIG][:SPLIT][:COLUMN]."
        ),
    ] = Calibration.data
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = Calibration.samples
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in a calibration sample.")] = Calibration.tokens
    memory: MemoryOpt = None
    size: Annotated[
        str | None,
        typer.Option(help="Largest output, such as 400MB: finds the best that fits; refuses a --recipe that does not."),
    ] = None
    bits: Annotated[
        float | None, typer.Option(help="Find the best with this average of stored bits per weight of the linears.")
    ] = None
    decode_time: Annotated[
        str | None,
        typer.Option(metavar="TIME@DEVICE", help="Find the best whose decoding step is so short, such as 2ms@h100."),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of one sequence whose keys and values count in --size, chosen like the weights."
        ),
    ] = None
    menu: Annotated[
        str | None,
        typer.Option(help="Formats to choose from: native, integers, compressed-tensors, gguf, prune, or int4/64,..."),
    ] = None
    fit_blocks: Annotated[
        bool, typer.Option("--fit-blocks", help="Then fit the codes of each block to its outputs: closer, and slower.")
    ] = False
    teacher: Annotated[
        str | None, typer.Option(help="Model that training steps learn from; by default MODEL as it is.")
    ] = None
    dtype: Annotated[str, typer.Option(help="Dtype of calibration passes: auto, bfloat16 or float32.")] = Compute.dtype
    device: Annotated[str, typer.Option(help="auto, cpu, or a torch device.")] = Compute.device
    work: Annotated[Path | None, typer.Option(help="Folder for the unfinished run; by default beside the output.")] = (
        None
    )
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="STEP.KEY=VALUE", help="Change the recipe; may be repeated.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Draw calibration samples at random instead of from the start.")] = (
        None
    )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `lilliput.compress` and `lilliput.plan`. Raises PlanError for what is no size."""
        sizes = {"memory": parse_size(self.memory, "--memory"), "size": parse_size(self.size, "--size")}
        menu = () if self.menu is None else tuple(x.strip() for x in self.menu.split(","))
        decoding = None if self.decode_time is None else _decoding(self.decode_time)
        return {**vars(self), **sizes, "menu": menu, "decode_time": decoding, "settings": tuple(self.settings or ())}


def _decoding(text: str) -> Decoding:
    """From "2ms@DEVICE". Raises PlanError."""
    time, at, device = text.partition("@")
    if not at or not device.strip():
        raise PlanError(f"--decode-time '{text}' names no device: write it after an @, such as 2ms@h100")
    return Decoding(parse_time(time, "--decode-time"), device.strip())


@dataclass(frozen=True)
class Measure:
    """What eval and compare are told alike."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure on: docs:library, a file, wikitext2, c4, hub:DATASET[:CONFIG][:SPLIT]; may "
            "be repeated."
        ),
    ] = None
    windows: Annotated[int, typer.Option(min=2, help="Windows to score, from the first token on.")] = Text.windows
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens in a window; by default 1,024, or all positions of the model if it has fewer."
        ),
    ] = None
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure prefill and decoding, together with the original.")
    ] = False
    memory: MemoryOpt = None
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32"

    def text(self, stride: int | None = None, chunk: int = Text.chunk) -> Text:
        return Text(tuple(self.data or (HELD_OUT,)), self.windows, self.tokens, stride, chunk)

    def limits(self) -> Limits:
        """Raises PlanError for what is no size."""
        return Limits(parse_size(self.memory, "--memory"))

    def compute(self) -> Compute:
        return Compute(self.dtype, "cpu")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer takes it, which knows no groups: for a parameter that is a dataclass, one option for each
    of its fields."""
    own = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {x.name: x.annotation for x in own.parameters.values() if is_dataclass(x.annotation)}

    def flat() -> Iterator[inspect.Parameter]:
        for x in own.parameters.values():
            if x.name not in groups:
                yield x.replace(kind=x.KEYWORD_ONLY)
                continue
            hints = get_type_hints(x.annotation, include_extras=True)
            for y in fields(x.annotation):
                yield inspect.Parameter(y.name, x.KEYWORD_ONLY, default=y.default, annotation=hints[y.name])

    @wraps(command)
    def called(**given: Any) -> None:  # whatever options the signature below has, by name
        instances = {name: kind(**{x.name: given.pop(x.name) for x in fields(kind)}) for name, kind in groups.items()}
        command(**given, **instances)

    parameters = list(flat())
    called.__annotations__ = {x.name: x.annotation for x in parameters}
    vars(called)["__signature__"] = own.replace(parameters=parameters)
    return called
