"""Lilliput from Python: compress, plan, evaluate, load, verify, inspect, generate. The command line calls these."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lilliput.attribution import outlier_features
from lilliput.data.load import load_tokens
from lilliput.errors import PlanError
from lilliput.export import convert as converters
from lilliput.export.convert import Converted, Wanted
from lilliput.export.verify import Verification
from lilliput.export.verify import verify as verify_folder
from lilliput.machine import memory as ram
from lilliput.machine.device import compute_dtype
from lilliput.metrics.evaluate import Evaluation
from lilliput.metrics.evaluate import evaluate as measure
from lilliput.model import inspect as anatomy
from lilliput.model.stored import open_adapted, open_model
from lilliput.options import HELD_OUT, Calibration, Compute, Decoding, Fit, Limits, Text
from lilliput.plan.plan import Plan
from lilliput.progress import Progress
from lilliput.recipe.schema import Recipe
from lilliput.run import calibration, merging, session
from lilliput.run import frontier as curve
from lilliput.run import masks as recording
from lilliput.run.continuation import continuation
from lilliput.run.converted import converted
from lilliput.run.frontier import Frontier
from lilliput.run.merging import Merged
from lilliput.run.result import Compression
from lilliput.runtime import adapter as adapters
from lilliput.runtime.behaviours import masks
from lilliput.runtime.load import load as load

DEFAULT_RECIPE = "w4-engines"


def plan(
    model: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    data: str = Calibration.data,
    samples: int = Calibration.samples,
    tokens: int = Calibration.tokens,
    memory: int | None = None,
    size: int | None = None,
    bits: float | None = None,
    decode_time: Decoding | None = None,
    context: int | None = None,
    menu: Sequence[str] = (),
    fit_blocks: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    work: str | Path | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    to: str | None = None,
    teacher: str | Path | None = None,
) -> Plan:
    """What `compress` with the same arguments would do. Reads no weights and writes nothing.

    `memory` and `size` are budgets in bytes; `context`: tokens of one sequence whose keys and values count in the size,
    and without one are counted all the same. The calibration text is read, and the place for `work` looked at. Raises
    LilliputError for whatever stands in the way.
    """
    text, limits, fit = (
        Calibration(data, samples, tokens, seed),
        Limits(memory, size, context),
        _fit(recipe, size, bits, decode_time, context, menu, to, fit_blocks),
    )
    chosen = DEFAULT_RECIPE if recipe is None else recipe
    job = session.Job(model, chosen, settings, text, limits, _compute(dtype, device, work), fit, teacher)
    return session.planned(job)


def frontier(
    model: str | Path,
    *,
    context: int | None = None,
    menu: Sequence[str] = (),
    to: str | None = None,
    data: str = Calibration.data,
    samples: int = Calibration.samples,
    tokens: int = Calibration.tokens,
    memory: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    work: str | Path | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    progress: Progress | None = None,
) -> Frontier:
    """How small the model can get: the best choice of grids at many sizes, with the predicted KL divergence of each.

    One measuring pass over the calibration text; no model is written. `context`: tokens of one sequence whose keys and
    values count beside the folder. `work`: where a killed call can go on from. Raises LilliputError.
    """
    text, fit = Calibration(data, samples, tokens, seed), Fit(size=1, menu=tuple(menu), to=to, context=context)
    job = session.Job(
        model, DEFAULT_RECIPE, settings, text, Limits(memory, context=context), _compute(dtype, device, work), fit
    )
    return curve.frontier(job, progress)


def compress(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    data: str = Calibration.data,
    samples: int = Calibration.samples,
    tokens: int = Calibration.tokens,
    memory: int | None = None,
    size: int | None = None,
    bits: float | None = None,
    decode_time: Decoding | None = None,
    context: int | None = None,
    menu: Sequence[str] = (),
    fit_blocks: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    work: str | Path | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    eval_data: str | None = None,
    eval_windows: int = Text.windows,
    to: str | None = None,
    teacher: str | Path | None = None,
    progress: Progress | None = None,
) -> Compression:
    """Compress `model` into the new folder `out` and measure it as re-read from there.

    model: Hugging Face id, folder with safetensors, or GGUF file. recipe: a named recipe, a method's name, a YAML file
    or a Recipe (None: `w4-engines`, or with `size` or `bits` the best composition that keeps to it, of the grids of
    `menu`, and `fit_blocks` to fit its codes block by block); `settings` such as "gptq.bits=3" change it. bits:
    average of stored bits over the linears. decode_time: the longest time that a decoding step is predicted to take on
    a named device. context: tokens of one sequence whose keys and values count in `size` beside the folder; without a
    recipe it is chosen block by block how they are stored. data: calibration text, `samples` windows of `tokens`
    tokens. memory: the most bytes of RAM to take above the imported package. size: the most bytes that `out` may have.
    eval_data: text to measure on (default: the second half of `docs`); eval_windows: windows of 1,024 tokens, 0 for
    none. to: the container to write `out` as in place of a folder, see `convert`. teacher: the model that training
    steps learn from, by default `model` as it is. A killed call continues when it is repeated. Raises LilliputError;
    nothing half-written ever shows at `out`.

    Under torchrun every process calls this, and they share the samples; the first writes, measures and shows progress,
    and what the others return lacks the evaluation.
    """
    text, limits, fit = (
        Calibration(data, samples, tokens, seed),
        Limits(memory, size, context),
        _fit(recipe, size, bits, decode_time, context, menu, to, fit_blocks),
    )
    chosen = DEFAULT_RECIPE if recipe is None else recipe
    job = session.Job(model, chosen, settings, text, limits, _compute(dtype, device, work), fit, teacher)
    text_to_score = Text((eval_data or HELD_OUT,), eval_windows)
    if to is not None:
        return converted(job, Path(out), to, text_to_score, progress)
    return session.compressed(job, Path(out), text_to_score, progress)


def convert(
    folder: str | Path,
    out: str | Path,
    *,
    to: str = "gguf",
    like: str | Path | None = None,
    checkpoint_format: str | None = None,
) -> Converted:
    """Write a finished folder as another engine's container: codes are copied unchanged, nothing is quantized twice.

    folder: one that `compress` wrote on grids that the container has (docs/convert.md); for "gguf" also a plain model.
    to: "gguf", "gptq", "awq", "mlx", "compressed-tensors" or "adapter". like: a GGUF file of the same model, whose
    metadata and tokenizer are carried over. checkpoint_format: "gptq" or "gptq_v2", how GPTQ's layout holds zero
    points. Raises LilliputError for what the container cannot hold, with the tensor and the nearest that it can;
    nothing half-written ever shows at `out`.
    """
    wanted = Wanted(None if like is None else Path(like), checkpoint_format)
    return converters.get(to).convert(Path(folder), Path(out), wanted)


def _fit(
    recipe: str | Path | Recipe | None,
    size: int | None,
    bits: float | None,
    decoding: Decoding | None,
    context: int | None,
    menu: Sequence[str],
    to: str | None,
    fit_blocks: bool,
) -> Fit | None:
    """The search for a composition, where one is asked for. Raises PlanError where a recipe is given as well."""
    if recipe is None:
        asked = size is not None or bits is not None or decoding is not None or menu or fit_blocks
        return Fit(size, bits, decoding, tuple(menu), to, fit_blocks, context) if asked else None
    given = {"--bits": bits, "--decode-time": decoding, "--menu": menu or None, "--fit-blocks": fit_blocks or None}
    for option, value in given.items():
        if value is not None:
            raise PlanError(
                f"{option} asks for a composition found by measuring, and --recipe names one: give only one of them"
            )
    return None


def _compute(dtype: str, device: str, work: str | Path | None) -> Compute:
    return Compute(dtype, device, None if work is None else Path(work))


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    data: str = HELD_OUT,
    windows: int = Text.windows,
    tokens: int | None = None,
    memory: int | None = None,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity and, against a reference, the paired ratio, KL divergence and agreement, each with a 95 % interval.

    Windows have `tokens` tokens: 1,024, or as many as the models know positions. adapter: folder of one that the model
    computes with; raises PlanError for prefixes and prompts, which are in front of the text.
    """
    ours = model if adapter is None else open_adapted(model, Path(adapter), dtype=compute_dtype(dtype, "cpu"))
    return measure(
        ours, against, data=data, windows=windows, tokens=tokens, memory=memory, dtype=dtype, progress=progress
    )


def verify(folder: str | Path, *, memory: int | None = None) -> Verification:
    """Whether a written folder is whole: hashes, shapes, finite values, and that its engine computes what it holds.

    memory: bytes above the imported package, half of what is free where None; a folder whose model needs more is
    compared block by block.
    """
    return verify_folder(Path(folder), memory=memory)


def inspect(
    model: str | Path, data: str | None = None, *, samples: int = 8, tokens: int | None = None, alpha: float = 6.0
) -> dict[str, Any]:
    """Anatomy of a model; with `data`, the outlier channels of each input site as well, over `samples` windows of
    `tokens` tokens (512, or as many as the model knows positions), and those with an input of `alpha` or more."""
    opened = open_model(model, dtype=compute_dtype("auto", "cpu"))
    if data is None:
        return anatomy.inspect(opened)
    length = min(512, opened.positions or 512) if tokens is None else tokens
    calibration.known_positions(opened, length)
    windows = load_tokens(data, opened.source.tokenizer(), samples=samples, tokens=length, vocabulary=opened.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        found = outlier_features.measured(opened, windows.ids, Path(folder), alpha)
    listed = {"outliers": anatomy.outliers(found.stats), "outlier_features": found.to_json()}
    return anatomy.inspect(opened) | listed


def generate(model: str | Path, prompt: str, *, max_new_tokens: int = 64) -> str:
    """The model's greedy continuation of a prompt (through the chat template where there is one).

    It stops where transformers stops, and heeds what else generation_config.json says of a greedy choice. Raises
    DataError for a prompt that the model cannot read or that leaves no room for `max_new_tokens`.
    """
    return continuation(open_model(model, dtype=compute_dtype("auto", "cpu")), prompt, max_new_tokens)


ram.set_base()


def merge(folder: str | Path, out: str | Path, *, adapter: str | Path | None = None, rank: int | None = None) -> Merged:
    """Write a folder with an adapter that was trained for it merged in, so that it computes the same without it.

    adapter: its folder, by default the subfolder "adapter". rank: to which one by dylora is cut. Plain linears and
    biases take it up, rounded once to their type, and codes with real zeros what qa-lora has trained. Raises PlanError
    for others, with what quantizing anew would lose.
    """
    return merging.merge(Path(folder), Path(out), None if adapter is None else Path(adapter), rank)


def use_adapter(model: Any, folder: str | Path) -> None:
    """Let the linears of a loaded model compute with an adapter, without peft: networks behind linears (`adapter`),
    products (`lora`, `dylora`, `adalora`, `qa-lora`) or biases (`bitfit`).

    Prefixes and prompts are loaded with `peft.PeftModel.from_pretrained`. Raises PlanError for those and for a folder
    without an adapter, SourceError for one of another model.
    """
    adapters.attach(model, Path(folder), next(model.parameters()).device)


def use_mask(model: Any, name: str | None, *, folder: str | Path | None = None) -> None:
    """Run a loaded model, whose MLPs have gates (dynamic-pruning), with a mask that was recorded for a task; None: with
    its predictors again. No weight changes. folder: where the mask lies, by default where the model was loaded from.

    Raises LilliputError for a model without gates, and for a mask that is missing or of another model.
    """
    masks.use(model, name, folder)


def record_mask(
    folder: str | Path,
    name: str,
    data: str,
    *,
    windows: int = 8,
    tokens: int | None = None,
    keep: float | None = None,
) -> Path:
    """Record which groups of hidden channels a text uses most, as the mask `name` of a folder that dynamic-pruning has
    written; the path of its file. keep: share of the groups (None: that of the folder). Raises LilliputError."""
    return recording.record(Path(folder), name, data, windows=windows, tokens=tokens, keep=keep)
