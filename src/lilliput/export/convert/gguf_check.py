"""llama.cpp's eye: the logits and tokens that it has of a written file, beside those of what was to be written.

It multiplies a quantized matrix by inputs that it rounds itself (8 bits in blocks), float16 by float16, bfloat16 by
bfloat16, so that logits agree as far as that goes and no further. Where it is not installed nothing is checked, and
the note says so.
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lilliput import units
from lilliput.errors import LilliputError
from lilliput.export.convert import gguf_texts, llamacpp
from lilliput.export.engine import Look
from lilliput.model.stored import Model, open_model
from lilliput.model.weights import TABLE_ROWS
from lilliput.source.gguf_header import read_header
from lilliput.streaming.forward import embed, finish
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import resident

ENGINE = "llama.cpp"
TOKENS = 64
# `distance` at most, by the coarsest type in a file. A wrong tensor differs by about 1.
CLOSE = {"F32": 5e-3, "F16": 1e-2, "BF16": 5e-2}
ROUNDED = 0.15
_NAMED = re.compile(r"</?\w+>|<\|[^|]*\|>")  # how markers are spelled
_SHOWN = 3
_MARKERS = 8


def look(file: Path, like: Path) -> Look:
    """What llama.cpp makes of `file`, beside the model `like`, a folder or GGUF file, as Lilliput's reader decodes it.

    Problems are reported, not raised. Raises LilliputError where llama.cpp is not where the environment says.
    """
    python = llamacpp.python()
    if python is None:
        return Look(ENGINE, notes=(f"not checked in {ENGINE}, which is not here: {llamacpp.INSTALL}",))
    room, needed = psutil.virtual_memory().available, file.stat().st_size * 5 // 4
    if needed > room:
        return Look(
            ENGINE, notes=(f"not checked in {ENGINE}, which takes {units.readable(needed, up=True)} of memory",)
        )
    ours = open_model(str(like), dtype=torch.float32)
    tokenizer = ours.source.tokenizer()
    texts, composed = gguf_texts.texts(_markers(tokenizer)), _composes(tokenizer)
    if composed:
        texts = tuple(dict.fromkeys(unicodedata.normalize("NFC", x) for x in texts))
    row = _row(tokenizer, ours)
    answer = llamacpp.ask(python, file, texts, [row])
    if answer.problem is not None or answer.logits is None:
        return Look(ENGINE, (str(answer.problem),))
    name = f"{ENGINE} (llama-cpp-python {answer.version})"
    problems, marked = _tokens(tokenizer, texts, answer)
    wanted = logits(ours, torch.tensor([row]))
    error = distance(answer.logits[0], wanted)
    bound = tolerance(file)
    if not error <= bound:
        problems += (
            f"{ENGINE} computes other logits than the weights do: they differ by {error:.2g}, {bound:g} at most",
        )
    notes = [] if problems else [f"{len(texts) - len(marked)} strings are the same tokens in {name}"]
    if marked:
        words = ", ".join(repr(x) for x in sorted(set(marked)))
        notes.append(f"{ENGINE} takes {words} for a marker wherever a text has it, as it does with every file of this "
                     "vocabulary")  # fmt: skip
    if composed:
        notes.append(f"{ENGINE} reads letters and accents that are written apart (not in NFC) as other tokens")
    return Look(name, problems, tuple(notes), logits=error)


def refuse(seen: Look, out: Path) -> None:
    """Raises LilliputError for anything that is wrong in llama.cpp."""
    if seen.problems:
        raise LilliputError(
            f"{out} is not written, because {seen.engine} does not run what was to be written: "
            f"{'; '.join(seen.problems[:_SHOWN])}. Leave the model as a folder, or convert it with the metadata of "
            "a GGUF file of it that works (--like FILE)"
        )


def tolerance(file: Path) -> float:
    """How far logits may differ, by the types in the file."""
    kinds = {x.kind.name for x in read_header(file).tensors.values()}
    return max(CLOSE.get(kind, ROUNDED) for kind in kinds)


def distance(theirs: Tensor, ours: Tensor) -> float:
    """Of logits [T, V], relative to how far ours are from their mean; infinite where one is not finite."""
    if theirs.shape != ours.shape or not bool(torch.isfinite(theirs).all()):
        return float("inf")
    off = (theirs - ours).double()
    off -= off.mean(-1, keepdim=True)  # adding one number to all logits changes nothing
    spread = (ours - ours.mean(-1, keepdim=True)).double()
    return float(off.norm() / spread.norm().clamp_min(1e-30))


def logits(model: Model, ids: Tensor) -> Tensor:
    """float32 [T, V] of ids [1, T], with one block in memory, and of the head a few rows at a time."""
    skeleton = model.skeleton
    shape = (*ids.shape, skeleton.hidden_size)
    with tempfile.TemporaryDirectory(prefix="lilliput-logits-") as place, torch.no_grad():
        states = Activations(Path(place) / "states", shape, torch.float32, create=True)
        calls = embed(model, ids, 1, states).calls[1]
        for i in resident(model):
            states.write(0, skeleton.run(i, states.read(0, 1), calls))
        finish(model, states)
        out = _head(model, states.read(0, 1)[0])
        states.delete()
    return out


def _head(model: Model, hidden: Tensor) -> Tensor:
    """Logits [T, V] of finished hidden states [T, H]."""
    skeleton = model.skeleton
    module, stem = skeleton.head_module, skeleton.head.rpartition(".")[0]
    names = {n.rpartition(".")[2]: n for n in skeleton.shapes if n.rpartition(".")[0] == stem}
    before, count = dict(module._parameters), skeleton.shapes[skeleton.head][0]
    out = torch.empty(len(hidden), count)
    try:
        for a in range(0, count, TABLE_ROWS):
            b = min(a + TABLE_ROWS, count)
            for key, name in names.items():
                module._parameters[key] = nn.Parameter(model.read_rows(name, a, b).float(), requires_grad=False)
            out[:, a:b] = skeleton.logits(hidden)
    finally:
        module._parameters.update(before)
    return out


def _composes(tokenizer: Any) -> bool:
    """Whether the tokenizer brings text into NFC first, as llama.cpp never does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "NFC(" in repr(getattr(backend, "normalizer", None))


def _markers(tokenizer: Any) -> list[str]:
    """Tokens that a text is searched for as a whole, few enough to try them all: the first and the last ones by id."""
    added = tokenizer.added_tokens_decoder
    words = [added[i].content for i in sorted(added)]
    return words if len(words) <= 2 * _MARKERS else words[:_MARKERS] + words[-_MARKERS:]


def _row(tokenizer: Any, model: Model) -> list[int]:
    ids: list[int] = tokenizer(gguf_texts.PROSE, verbose=False)["input_ids"]
    return ids[: min(TOKENS, model.positions or TOKENS)]


def _tokens(tokenizer: Any, texts: Sequence[str], answer: llamacpp.Answer) -> tuple[tuple[str, ...], list[str]]:
    """What is wrong with the engine's tokens, in words; and words that it alone takes for markers, once for each text
    that is read otherwise because of them."""
    different: list[str] = []
    marked: list[str] = []
    for text, alone, prompt in zip(texts, answer.tokens, answer.prompts, strict=True):
        for special, theirs in ((False, alone), (True, prompt)):
            ours = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            if list(theirs) == ours:
                continue
            word = _marker(tokenizer, text, list(theirs), ours)
            if word is None:
                different.append(f"{text!r} as {list(theirs)[:8]} for {ours[:8]}")
            else:
                marked.append(word)
            break
    if not different:
        return (), marked
    said = "; ".join(different[:_SHOWN])
    return (f"{ENGINE} reads {len(different)} of {len(texts)} strings as other tokens, {said}",), marked


def _marker(tokenizer: Any, text: str, theirs: list[int], ours: list[int]) -> str | None:
    """The word of the vocabulary, no marker of the tokenizer's, which is all that the engine reads otherwise: it knows
    some by their names, such as </s>, whatever the file says of them."""
    for token in theirs:
        word = tokenizer.convert_ids_to_tokens(token)
        if token in ours or token in tokenizer.added_tokens_decoder or not isinstance(word, str):
            continue
        if _NAMED.fullmatch(word) is None or word not in text:
            continue
        pieces = [
            tokenizer(x, add_special_tokens=False, verbose=False)["input_ids"] if x else [] for x in text.split(word)
        ]
        joined = [i for n, piece in enumerate(pieces) for i in ([token] if n else []) + piece]
        if theirs[-len(joined) :] == joined:
            return word
    return None
