"""A model against a reference on text: all metrics in one pass of each, under a memory budget."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput import memory as ram
from lilliput.activations import Activations
from lilliput.data import Tokens, load_tokens, overlap
from lilliput.errors import DataError, PlanError
from lilliput.forward import last_hidden
from lilliput.metrics.agreement import agreement
from lilliput.metrics.interval import Interval
from lilliput.metrics.kl import kl
from lilliput.metrics.logits import ROWS, TILE, Scores, StreamedHead, score
from lilliput.metrics.perplexity import perplexity
from lilliput.metrics.perplexity_ratio import perplexity_ratio
from lilliput.metrics.size import Size, measure
from lilliput.model import Model, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lilliput.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OVERLAP = 0.01  # share of 13-grams from which on evaluation text counts as seen


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Metrics against a reference are None where there was none.

    bytes, bits_per_weight, model_bits_per_weight: see `lilliput.metrics.size.Size`; seconds: wall time of the
    evaluation; peak_rss_bytes: this process's peak so far above a fresh import; fingerprint: of the token windows.
    """

    model: str
    against: str | None
    perplexity: Interval
    reference_perplexity: Interval | None
    perplexity_ratio: Interval | None
    kl: Interval | None
    agreement: Interval | None
    bytes: int
    bits_per_weight: float
    model_bits_per_weight: float
    seconds: float
    peak_rss_bytes: int
    data: str
    fingerprint: str
    windows: int
    tokens: int
    dtype: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON: each metric as {value, low, high}, or null."""
        out: dict[str, Any] = dict(vars(self))
        for key, value in out.items():
            if isinstance(value, Interval):
                out[key] = value.to_json()
        out["notes"] = list(self.notes)
        return out


def window(model: Model) -> int:
    """Tokens in a window where nobody says otherwise: 1,024, or as many as the model knows positions."""
    return min(1024, int(getattr(model.source.text_config, "max_position_embeddings", None) or 1024))


def _vocabulary(model: Model) -> int:
    return model.skeleton.shapes[model.skeleton.head][0]


def _outside(model: Model, seen: int, itemsize: int) -> int:
    """Bytes of the embeddings in the compute dtype, of the token table the rows of at most `seen` tokens, and of the
    rows at hand as they are stored."""
    shapes = model.skeleton.shapes
    rows = {n: min(shapes[n][0], max(seen, ram.TABLE_ROWS)) for n in model.skeleton.embeddings}
    sizes = {n: rows[n] * prod(shapes[n][1:]) for n in rows}
    stored = max((sizes[n] * model.dtype(n).itemsize for n in sizes), default=0)
    return sum(sizes.values()) * itemsize + min(stored, ram.TABLE_ROWS * model.skeleton.hidden_size * 4)


def _block(model: Model, batch: int, tokens: int, itemsize: int) -> int:
    """Bytes of the largest block with the forward pass of one batch through it."""
    skeleton = model.skeleton
    weights, widest = 0, 0
    for i in range(len(skeleton.block_names)):
        shapes = [skeleton.shapes[name] for name in skeleton.names_of(i)]
        weights = max(weights, sum(prod(x) for x in shapes))
        widest = max(widest, *(max(x) for x in shapes if x))
    hidden = int(model.source.text_config.hidden_size)
    live = batch * tokens * (4 * widest + 6 * hidden)
    return (weights + live) * itemsize


@dataclass(frozen=True)
class Layout:
    """How an evaluation spends its memory: windows per forward pass, and vocabulary entries of the heads and of the
    logits at a time."""

    batch: int
    columns: int
    tile: int


def least(models: list[Model], tokens: int, seen: int, itemsize: int) -> int:
    """Bytes, beside ram.BASE, without which these models cannot be measured on `seen` tokens in windows of `tokens`.

    itemsize: of the dtype that blocks are computed in.
    """
    fewest = min(256, *(_vocabulary(m) for m in models))
    return max(
        max(_outside(m, seen, itemsize) for m in models),
        max(_block(m, 1, tokens, itemsize) for m in models),
        4 * fewest * len(models) * models[0].skeleton.hidden_size * 8,
        fewest * 4 * 4 * min(ROWS, tokens) * 2,
    )


def _layout(models: list[Model], tokens: int, budget: int | None, windows: int = 8) -> Layout:
    """The fastest layout within the budget. Raises PlanError that names the smallest budget that would do."""
    room = ceil((budget if budget is not None else max(ram.available() // 2, 1)) / ram.SLACK) - ram.BASE
    vocabulary = max(_vocabulary(m) for m in models)
    # A vocabulary entry costs its row of each head (twice while it is cast), and four columns of logits.
    row = len(models) * int(models[0].source.text_config.hidden_size) * 8
    logits = 4 * 4 * min(ROWS, tokens)
    fewest = min(vocabulary, 256)
    itemsize = models[0].skeleton.dtype.itemsize
    floor = least(models, tokens, windows * tokens, itemsize)
    if budget is not None and floor > room:
        need = ram.readable((floor + ram.BASE) * ram.SLACK, up=True)
        raise PlanError(f"--memory {ram.readable(budget)} is too little to evaluate: give --memory {need} or more.")
    batch = max(1, 2048 // tokens)
    while batch > 1 and max(_block(m, batch, tokens, itemsize) for m in models) > room:
        batch //= 2
    tile = min(vocabulary, TILE, max(fewest, room // 2 // logits))
    return Layout(batch, min(vocabulary, max(fewest, (room - tile * logits) // row)), tile)


def _same_vocabulary(model: Model, against: Model, ours: PreTrainedTokenizerBase, data: Tokens, source: str) -> None:
    """Raises DataError where the two models do not read and predict the same tokens."""
    where = f"'{model.source.model}' and '{against.source.model}' cannot be compared token by token"
    if _vocabulary(model) != _vocabulary(against):
        raise DataError(f"{where}: {_vocabulary(model)} and {_vocabulary(against)} vocabulary entries.")
    theirs = against.source.tokenizer()
    if ours.get_vocab() != theirs.get_vocab():
        raise DataError(f"{where}: their tokenizers have different vocabularies.")
    samples, tokens = data.ids.shape
    if load_tokens(source, theirs, samples=samples, tokens=tokens).fingerprint != data.fingerprint:
        raise DataError(f"{where}: their tokenizers cut '{source}' into different tokens.")


def _finished(model: Model, ids: torch.Tensor, folder: Path, batch: int, progress: Progress | None) -> Activations:
    """Hidden states as the head reads them, in a file."""
    hidden = last_hidden(model, ids, folder, batch=batch, progress=progress)
    skeleton = model.skeleton
    model.load(skeleton.final)
    try:
        with torch.no_grad():
            for i in range(len(hidden)):
                hidden.write(i, skeleton.finish(hidden.read(i, i + 1).to(skeleton.device)))
    except BaseException:
        hidden.delete()
        raise
    finally:
        model.unload(skeleton.final)
    return hidden


def _scores(
    models: list[Model], ids: torch.Tensor, work: Path | None, budget: int | None, progress: Progress | None
) -> Scores:
    layout = _layout(models, ids.shape[1], budget, len(ids))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lilliput-eval-", dir=work)))
        heads = []
        for number, model in enumerate(models):
            place = folder / str(number)
            place.mkdir()
            hidden = _finished(model, ids, place, layout.batch, progress)
            stack.callback(hidden.delete)
            heads.append(StreamedHead(model, hidden))
        reference = heads[1] if len(heads) > 1 else None
        found = score(ids, heads[0], reference, columns=layout.columns, tile=layout.tile)
    ram.trim()
    return found


def _notes(size: Size, dtype: str, windows: int, shared: float | None) -> tuple[str, ...]:
    notes = [f"intervals: 95 %, Student's t over {windows} windows"]
    if dtype != "float32":
        notes.append(f"blocks computed in {dtype}, the head in float32")
    if size.compressed == 0:
        notes.append("no linear is compressed: bits_per_weight is over all linears of the blocks")
    if shared is not None and shared > OVERLAP:
        notes.append(f"the model was calibrated on {shared:.0%} of this text: its figures look better than they are")
    return tuple(notes)


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    data: str | Path = "docs:library",
    windows: int = 8,
    tokens: int = 1024,
    memory: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    work: str | Path | None = None,
    calibration: Tokens | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model and, against a reference, the paired ratio, KL divergence and top-1 agreement.

    Text: `windows` consecutive windows of `tokens` tokens from the start of `data`, each scored by itself without its
    first token. Both models are streamed block by block, the head in slices; hidden states lie in a file under `work`
    (the system's temporary folder by default). `memory`: bytes above a fresh import. `dtype` is that of the blocks; the
    head and all sums are float32 and float64. `calibration`: windows that the model was calibrated on; text that
    occurs in both is noted.

    Raises DataError (text too short, fewer than 2 windows or tokens, models that do not share a tokenizer),
    SourceError (a model that cannot be read, logits that are not finite), PlanError (budget too small, unknown dtype).
    """
    began = time.monotonic()
    ram.steady()
    if windows < 2 or tokens < 2:
        raise DataError(f"{windows} windows of {tokens} tokens: an interval needs 2 windows, a prediction 2 tokens.")
    if dtype not in DTYPES:
        raise PlanError(f"unknown dtype '{dtype}': one of {', '.join(DTYPES)}.")
    names = [str(model)] + ([str(against)] if against is not None else [])
    models = [
        open_model(name, dtype=DTYPES[dtype], device=device, trust_remote_code=trust_remote_code) for name in names
    ]
    tokenizer = models[0].source.tokenizer()
    text = load_tokens(data, tokenizer, samples=windows, tokens=tokens)
    if len(models) > 1:
        _same_vocabulary(models[0], models[1], tokenizer, text, str(data))
    size = measure(models[0])
    scores = _scores(models, text.ids, Path(work) if work is not None else None, memory, progress)
    shared = overlap(calibration, text) if calibration is not None else None
    paired = scores.reference
    return Evaluation(
        model=names[0],
        against=names[1] if len(names) > 1 else None,
        perplexity=perplexity(scores.nll),
        reference_perplexity=None if paired is None else perplexity(paired),
        perplexity_ratio=None if paired is None else perplexity_ratio(scores.nll, paired),
        kl=None if scores.divergence is None else kl(scores.divergence),
        agreement=None if scores.same is None else agreement(scores.same),
        bytes=size.bytes,
        bits_per_weight=size.bits_per_weight,
        model_bits_per_weight=size.model_bits_per_weight,
        seconds=time.monotonic() - began,
        peak_rss_bytes=ram.peak_above_base(),
        data=text.source,
        fingerprint=text.fingerprint,
        windows=windows,
        tokens=tokens,
        dtype=dtype,
        notes=_notes(size, dtype, windows, shared),
    )
