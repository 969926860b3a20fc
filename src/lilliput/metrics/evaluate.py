"""A model against a reference on text: all metrics in one pass of each, under a memory budget."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput.data import Tokens, load_tokens, overlap
from lilliput.data.tokens import same_vocabulary, vocabulary_of
from lilliput.errors import DataError, PlanError
from lilliput.machine import memory as ram
from lilliput.metrics import slices
from lilliput.metrics.cached import CacheSize, cache_size
from lilliput.metrics.executed import Executed, executed, prunes
from lilliput.metrics.interval import Interval
from lilliput.metrics.logits import Scores, StreamedHead, same_head, score
from lilliput.metrics.size import Size, measure
from lilliput.metrics.slices import vocabulary
from lilliput.metrics.text import TextResult, result
from lilliput.metrics.vocabulary import cut, fewer
from lilliput.model.stored import Model, open_model
from lilliput.runtime import behaviours
from lilliput.source.source import own_name
from lilliput.streaming.forward import finish
from lilliput.streaming.pieces import CHUNK
from lilliput.streaming.walk import last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lilliput.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OVERLAP = 0.01  # share of 13-grams from which on evaluation text counts as seen


def compute_dtype(name: str) -> torch.dtype:
    """The dtype that blocks are computed in, by name. Raises PlanError for an unknown one."""
    if name not in DTYPES:
        raise PlanError(f"unknown dtype '{name}': one of {', '.join(DTYPES)}.")
    return DTYPES[name]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: one `TextResult` for every text, the first of which is the headline.

    work: of a model that leaves something out while it runs; cache: of one that stores keys and values compressed;
    bytes, bits_per_weight, model_bits_per_weight: see `lilliput.metrics.size.Size`; seconds: wall time of the
    evaluation; peak_rss_bytes: this process's peak so far above a fresh import.
    """

    model: str
    against: str | None
    texts: tuple[TextResult, ...]
    bytes: int
    bits_per_weight: float
    model_bits_per_weight: float
    seconds: float
    peak_rss_bytes: int
    dtype: str
    notes: tuple[str, ...]
    work: Executed | None = None
    cache: CacheSize | None = None

    @property
    def perplexity(self) -> Interval:
        return self.texts[0].perplexity

    @property
    def reference_perplexity(self) -> Interval | None:
        return self.texts[0].reference_perplexity

    @property
    def perplexity_ratio(self) -> Interval | None:
        return self.texts[0].perplexity_ratio

    @property
    def kl(self) -> Interval | None:
        return self.texts[0].kl

    @property
    def agreement(self) -> Interval | None:
        return self.texts[0].agreement

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON: the headline's figures, each metric as {value, low, high} or null, and all `texts`."""
        own = {k: v for k, v in vars(self).items() if k not in {"texts", "notes", "work", "cache"}}
        if self.work is not None:
            own["work"] = self.work.to_json()
        if self.cache is not None:
            own["cache"] = self.cache.to_json()
        texts = [x.to_json() for x in self.texts]
        return own | texts[0] | {"texts": texts if len(texts) > 1 else [], "notes": list(self.notes)}


def _same_tokens(model: Model, against: Model, ours: str, texts: Sequence[Tokens], stride: int) -> None:
    """Raises DataError where the two models do not read and predict the same tokens."""
    names = f"'{model.source.model}' and '{against.source.model}'"
    if vocabulary(model) != vocabulary(against):
        sizes = f"{vocabulary(model)} and {vocabulary(against)}"
        raise DataError(f"{names} cannot be compared: their heads have {sizes} vocabulary entries.")
    theirs = against.source.tokenizer()
    same_vocabulary(ours, vocabulary_of(theirs), names)
    for text in texts:
        windows, tokens = text.ids.shape
        if _load(text.source, theirs, windows, tokens, stride, against.vocabulary).fingerprint != text.fingerprint:
            raise DataError(f"{names} cannot be compared: their tokenizers cut '{text.source}' into different tokens.")


def _load(
    source: str, tokenizer: PreTrainedTokenizerBase, windows: int, tokens: int, stride: int, vocabulary: int
) -> Tokens:
    """Windows that begin every `stride` tokens, from the first token on."""
    if stride >= tokens:
        return load_tokens(source, tokenizer, samples=windows, tokens=tokens, vocabulary=vocabulary)
    length = tokens + (windows - 1) * stride
    whole = load_tokens(source, tokenizer, samples=1, tokens=length, vocabulary=vocabulary)
    return Tokens.of(whole.ids[0].unfold(0, tokens, stride).contiguous(), whole.source)


def _scores(
    models: list[Model],
    against: Model | None,
    ids: torch.Tensor,
    work: Path | None,
    budget: int | None,
    progress: Progress | None,
    prompt: int,
    chunk: int,
) -> tuple[list[Scores], list[Executed | None]]:
    """One for each model. The reference runs once, and so does its head for all models that have the same head.

    prompt: tokens of each window that models which prune prompts read as one; chunk: tokens that models with a
    compressed cache read at a time."""
    everyone = [*models, *([] if against is None else [against])]
    shape = slices.choose(everyone[:1] + everyone[1:][-1:], ids.shape[1], budget, len(ids))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lilliput-eval-", dir=work)))
        hidden, done = [], []
        for number, model in enumerate(everyone):
            place = folder / str(number)
            place.mkdir()
            with behaviours.prompted(model.skeleton.model, prompt):
                hidden.append(last_hidden(model, ids, place, batch=shape.batch, chunk=chunk, progress=progress))
            done.append(executed(model, prompt, ids.shape[1]))
            stack.callback(hidden[-1].delete)
            finish(model, hidden[-1])
        reference = None if against is None else StreamedHead(against, hidden[-1])
        scores: dict[int, Scores] = {}
        for first, model in enumerate(models):
            if first in scores:
                continue
            alike = [n for n in range(first, len(models)) if n == first or same_head(model, models[n])]
            head = StreamedHead(model, *(hidden[n] for n in alike))
            names = [models[n].source.model for n in alike]
            several = score(
                ids, head, reference, columns=shape.columns, tile=shape.tile, streams=len(alike), names=names
            )
            scores |= {n: several.stream(stream, len(ids)) for stream, n in enumerate(alike)}
    ram.trim()
    return [scores[n] for n in range(len(models))], done[: len(models)]


def _notes(
    size: Size, dtype: str, windows: int, shared: Mapping[str, float], special: Sequence[Executed | CacheSize | None]
) -> tuple[str, ...]:
    notes = [x.note() for x in special if x is not None]
    notes += [f"intervals: 95 %, Student's t over {windows} windows"]
    if dtype != "float32":
        notes.append(f"blocks computed in {dtype}, the head in float32")
    if size.compressed == 0:
        notes.append("no linear is compressed: bits_per_weight is over all linears of the blocks")
    for source, share in shared.items():
        if share > OVERLAP:
            notes.append(
                f"the model was calibrated on {share:.0%} of {own_name(source)}: its figures look better than "
                "they should"
            )
    return tuple(notes)


def evaluate(
    model: str | Path | Model,
    against: str | Path | Model | None = None,
    *,
    data: str | Path | Sequence[str | Path] = "docs:library",
    windows: int = 8,
    tokens: int | None = None,
    stride: int | None = None,
    chunk: int = CHUNK,
    detail: bool = False,
    memory: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    work: str | Path | None = None,
    calibration: Tokens | Sequence[Tokens] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model and, against a reference, the paired ratio, KL divergence, agreement and flips.

    Text: `windows` consecutive windows of `tokens` tokens (1,024, or as many as all models know positions) from the
    start of `data`, each scored by itself without its first token; several texts are measured each for itself, in one
    pass over the models. With a `stride` windows begin that many tokens apart and only their last `stride` tokens are
    scored, so that each has a long context. `detail`
    adds, against a reference, token classes, positions and the worst tokens. Both models are streamed block by block,
    the head in slices; a model that stores keys and values compressed reads `chunk` tokens at a time through that
    cache. Hidden states lie in a file under `work` (the system's temporary folder by default). `memory`: bytes above a
    fresh import. `dtype` is that of the blocks; the head and all sums are float32 and float64. A model that is open
    already keeps its own dtype, and its device. `calibration`: windows that the model was calibrated or trained
    on; text that occurs in both is noted. Against a
    reference that has more tokens (`trim-vocabulary`), the reference is measured with the model's alone.

    Raises DataError (text too short, fewer than 2 windows or tokens, models that do not share a tokenizer),
    SourceError (a model that cannot be read, logits that are not finite), PlanError (budget too small, unknown dtype).
    """
    return evaluate_all(
        [model],
        against,
        data=data,
        windows=windows,
        tokens=tokens,
        stride=stride,
        chunk=chunk,
        detail=detail,
        memory=memory,
        dtype=dtype,
        device=device,
        work=work,
        calibration=calibration,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )[0]


@ram.steady(ram.FORWARD)
def evaluate_all(
    models: Sequence[str | Path | Model],
    against: str | Path | Model | None = None,
    *,
    data: str | Path | Sequence[str | Path] = "docs:library",
    windows: int = 8,
    tokens: int | None = None,
    stride: int | None = None,
    chunk: int = CHUNK,
    detail: bool = False,
    memory: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    work: str | Path | None = None,
    calibration: Tokens | Sequence[Tokens] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """`evaluate` for several models on the same text, against one reference that runs only once.

    `seconds` and `peak_rss_bytes` are those of the whole call.
    """
    began = time.monotonic()
    ram.based()
    if windows < 2:
        raise DataError(f"{windows} windows: an interval needs 2 windows or more.")
    compute = compute_dtype(dtype)
    sources = [str(x) for x in ([data] if isinstance(data, str | Path) else data)]
    if not sources:
        raise DataError("there is no text to measure on: give at least one.")
    if chunk < 1:
        raise DataError(f"a chunk of {chunk} tokens: a piece of a text has at least 1.")
    if not models:
        raise DataError("there is no model to measure: give at least one.")
    opened = [open_model(x, dtype=compute, device=device, trust_remote_code=trust_remote_code) for x in models]
    base = (
        None
        if against is None
        else open_model(against, dtype=compute, device=device, trust_remote_code=trust_remote_code)
    )
    original, base = base, None if base is None else fewer(opened[0], base)
    tokens = slices.tokens([*opened, *([] if base is None else [base])], tokens)
    step = tokens if stride is None else stride
    if not 1 <= step <= tokens:
        raise DataError(f"a stride of {stride} does not fit windows of {tokens} tokens: give 1 to {tokens}.")
    tokenizer = opened[0].source.tokenizer()
    loaded = [_load(source, tokenizer, windows, tokens, step, opened[0].vocabulary) for source in sources]
    ours = vocabulary_of(tokenizer)
    del tokenizer  # one at a time: of 262,144 tokens it takes 0.1 GB, and three times that while it is read
    ram.trim()
    for other in [*opened[1:], *([] if base is None else [base])]:
        _same_tokens(opened[0], other, ours, loaded, step)
        ram.trim()
    ids = torch.cat([text.ids for text in loaded])
    noted = () if base is None or original is None or base is original else (cut(base, original, ids),)
    # A prompt that is pruned has no predictions of its own: half of each window is scored, with the rest before it.
    last = step if step < tokens or not any(map(prunes, opened)) else tokens // 2
    place = Path(work) if work is not None else None
    scores, done = _scores(opened, base, ids, place, memory, progress, tokens - last, chunk)
    seen = [] if calibration is None else [calibration] if isinstance(calibration, Tokens) else list(calibration)
    shared = {text.source: max(overlap(x, text) for x in seen) for text in loaded} if seen else {}
    scored = slice(None) if last == tokens else slice(-last, None)
    tokenizer = opened[0].source.tokenizer() if detail else None
    evaluations = []
    for one, its, left in zip(opened, scores, done, strict=True):
        texts = tuple(
            result(text, its.of(slice(n * windows, (n + 1) * windows), scored), step, tokenizer)
            for n, text in enumerate(loaded)
        )
        size, stored = measure(one), cache_size(one, tokens, chunk)
        used = str(one.skeleton.dtype).removeprefix("torch.")
        evaluations.append(
            Evaluation(
                model=one.source.model,
                against=None if base is None else base.source.model,
                texts=texts,
                bytes=size.bytes,
                bits_per_weight=size.bits_per_weight,
                model_bits_per_weight=size.model_bits_per_weight,
                seconds=time.monotonic() - began,
                peak_rss_bytes=ram.peak_above_base(),
                dtype=used,
                notes=(*_notes(size, used, windows, shared, (left, stored)), *noted),
                work=left,
                cache=stored,
            )
        )
    return evaluations
