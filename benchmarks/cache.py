#!/usr/bin/env python3
"""Compressed caches beside transformers' own `QuantizedCache`: the same pieces of the same texts, the same prompts.

    python benchmarks/cache.py MODEL --text TEST.txt --recipes kv8 kv4 kv2 "kv4-s0=kv4 kivi.sinks=0" \
        --theirs quanto:4 quanto:2 hqq:4 hqq:2 fp8 --out cache.json

MODEL: a folder or hub id. A recipe is a name, a method's name or a YAML file, NAME=RECIPE STEP.KEY=VALUE ... with
settings; its folder is written in the native layout, whose caches run in transformers. Theirs: backend, and bits where
it has a choice; groups of 64, 128 plain tokens, grouped along the axis that transformers' documentation recommends. A
backend whose library is not installed (optimum-quanto, hqq) has a row that says so.

Every model is transformers' own, whole in memory, and reads a window in pieces of `--chunk` tokens into a cache of its
own; the original does so with a plain cache. What `QuantizedCache` is given in pieces of 128 tokens it rounds anew with
all that came before, once for each piece, as it does every 128 tokens while it generates. Then each continues prompts
greedily, one at a time: the tokens before the first that differs from the original's, and the share of all places with
the same token. Bytes: of one sequence of `--at` tokens in bfloat16; theirs are counted in what the layers hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import lilliput
from lilliput.anatomy.cached import options as reading
from lilliput.data import load_tokens
from lilliput.errors import LilliputError
from lilliput.metrics.agreement import agreement
from lilliput.metrics.generation import first_differences
from lilliput.metrics.interval import clip, mean_interval
from lilliput.metrics.kl import kl
from lilliput.metrics.perplexity import perplexity
from lilliput.metrics.perplexity_ratio import perplexity_ratio
from lilliput.progress import Quiet
from lilliput.recipe.load import load
from lilliput.runtime import caches
from lilliput.source import open_source

Make = Callable[[], Any]
AXES = {"quanto": 0, "hqq": 1}  # of keys and values, as transformers' documentation recommends
THEIRS = ("quanto:4", "quanto:2", "hqq:8", "hqq:4", "hqq:2", "fp8")
ITEM = 16  # bits of a plain element where bytes are counted


class Texts:
    """Windows and prompts, int64, and what the original makes of them, on disk where it is large.

    logits: a file for each window, float32 [tokens - 1, vocabulary]; answers int64 [prompts, new].
    """

    def __init__(self, ids: Tensor, prompts: Tensor, place: Path) -> None:
        self.ids, self.prompts, self.place = ids, prompts, place
        self.answers = torch.empty(0)


def pieces(model: Any, window: Tensor, cache: Any, chunk: int) -> Iterator[Tensor]:
    """Logits of each piece of a window int64 [tokens], float32 [piece, vocabulary]."""
    with torch.no_grad():
        for part in window[None].split(chunk, dim=1):
            yield model(part, **reading(model, cache)).logits[0].float()


def continued(model: Any, prompts: Tensor, make: Make, new: int) -> Tensor:
    """Greedy continuations int64 [prompts, new], past any end of text."""
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            out = model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
                **reading(model, make()),
            )
        rows.append(out[0, len(prompt) :])
    return torch.stack(rows)


def original(model: Any, texts: Texts, chunk: int, new: int) -> Tensor:
    """The original's nll [windows, tokens - 1]; its logits and continuations go to `texts`."""
    nll = []
    plain = lambda: tf.DynamicCache(config=model.config)  # noqa: E731
    for n, window in enumerate(texts.ids):
        logits = torch.cat(list(pieces(model, window, plain(), chunk)))[:-1]
        torch.save(logits, texts.place / f"{n}.pt")
        nll.append(torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="none"))
    texts.answers = continued(model, texts.prompts, plain, new)
    return torch.stack(nll)


def compared(model: Any, make: Make, texts: Texts, reference: Tensor, chunk: int, new: int) -> dict[str, Any]:
    """The figures of a model whose caches `make` gives, beside the original's."""
    began = time.process_time()
    nll, apart, same = (torch.empty(reference.shape, dtype=x) for x in (torch.float64, torch.float64, torch.bool))
    for n, window in enumerate(texts.ids):
        expected, at = torch.load(texts.place / f"{n}.pt", mmap=True), 0
        for logits in pieces(model, window, make(), chunk):
            logits = logits[: len(expected) - at]  # nothing is known of what comes behind the window
            span = slice(at, at + len(logits))
            ours, theirs = logits.double().log_softmax(-1), expected[span].double().log_softmax(-1)
            nll[n, span] = -ours.gather(1, window[at + 1 : at + 1 + len(logits), None])[:, 0]
            apart[n, span] = (theirs.exp() * (theirs - ours)).sum(-1)
            same[n, span] = ours.argmax(-1) == theirs.argmax(-1)
            at += len(logits)
    answers = continued(model, texts.prompts, make, new)
    first = first_differences(answers, texts.answers)
    return {
        "perplexity": perplexity(nll).to_json(),
        "perplexity_ratio": perplexity_ratio(nll, reference).to_json(),
        "kl": kl(apart).to_json(),
        "agreement": agreement(same).to_json(),
        "first_difference": clip(mean_interval(first.double()), 0.0, float(new)).to_json(),
        "first_differences": first.tolist(),
        "same_tokens": clip(mean_interval((answers == texts.answers).double().mean(1)), 0.0, 1.0).to_json(),
        "cpu": time.process_time() - began,
    }


def held(x: Any) -> int:
    """Bytes of all tensors within what a layer holds."""
    if isinstance(x, Tensor):
        if is_traceable_wrapper_subclass(x):
            names, _ = x.__tensor_flatten__()
            return sum(held(getattr(x, name)) for name in names)
        return x.numel() * x.element_size()
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return sum(map(held, inside))


def their_bytes(model: Any, make: Make, tokens: int, chunk: int) -> int:
    """What a `QuantizedCache` holds of one sequence in bfloat16, with random keys and values."""
    shapes = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64), **reading(model, shapes))
    cache, total = make(), 0
    draw = torch.Generator().manual_seed(0)
    for number, layer in enumerate(cache.layers):
        sides = [
            torch.randn(1, x.shape[1], tokens, x.shape[3], generator=draw).bfloat16()
            for x in (shapes.layers[number].keys, shapes.layers[number].values)
        ]
        for keys, values in zip(*(x.split(chunk, dim=2) for x in sides), strict=True):
            layer.update(keys, values)
        names = ("_quantized_keys", "_quantized_values", "keys", "values")
        total += sum(held(getattr(layer, name)) for name in names)
        cache.layers[number] = None  # one at a time
    return total


@contextmanager
def made(model: str, words: list[str], options: argparse.Namespace) -> Iterator[Path]:
    """The folder of a recipe, as long as the context lasts. Raises LilliputError for what a model refuses."""
    with tempfile.TemporaryDirectory(prefix="lilliput-cache-") as scratch:
        out = Path(scratch) / "out"
        lilliput.compress(
            model,
            out,
            recipe=load(words[0]).model_copy(update={"export": "lilliput"}),
            settings=words[1:],
            data=options.calibration,
            samples=options.samples,
            tokens=options.sample_tokens,
            eval_windows=0,
            device="cpu",
            progress=Quiet(),
        )
        yield out


def ours(words: list[str], texts: Texts, reference: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a recipe."""
    try:
        with made(options.model, words, options) as folder:
            model = lilliput.load(folder, dtype=getattr(torch, options.dtype))
            row = compared(
                model, lambda: tf.DynamicCache(config=model.config), texts, reference, options.chunk, options.new
            )
            entries = open_source(str(folder)).caches
            return {**row, "bytes": caches.size_bits(entries, options.at, ITEM) // 8, "entries": list(entries)}
    except LilliputError as error:
        return {"refused": str(error)}


def theirs(kind: str, model: Any, texts: Texts, reference: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a backend of `QuantizedCache`."""
    backend, _, bits = kind.partition(":")
    settings: dict[str, Any] = {"backend": backend, "config": model.config}
    if backend in AXES:
        axis = AXES[backend]
        settings |= {"nbits": int(bits or 4), "axis_key": axis, "axis_value": axis, "q_group_size": options.group}
        settings |= {"residual_length": options.residual}
    make = lambda: tf.QuantizedCache(**settings)  # noqa: E731
    try:
        make()
    except ImportError as error:
        return {"missing": str(error)}
    except ValueError as error:
        return {"refused": str(error)}
    row = compared(model, make, texts, reference, options.chunk, options.new)
    told = {key: x for key, x in settings.items() if key != "config"}
    return {**row, "bytes": their_bytes(model, make, options.at, options.chunk), "settings": told}


def table(rows: dict[str, Any]) -> str:
    """Rows in Markdown."""
    heads = ["cache", "perplexity ratio", "KL, nats", "top-1 agreement", "first difference", "same tokens", "MB"]
    lines = [heads, ["---"] * len(heads)]
    for name, row in rows.items():
        why = next((f"{x}: {row[x]}" for x in ("missing", "refused") if x in row), None)
        if why is not None:
            lines.append([name, why.splitlines()[0], *[""] * (len(heads) - 2)])
            continue
        ratio = row["perplexity_ratio"]
        cells = [f"{ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]", f"{row['kl']['value']:.4f}"]
        cells += [f"{row['agreement']['value']:.3f}", f"{row['first_difference']['value']:.0f}"]
        lines.append([name, *cells, f"{row['same_tokens']['value']:.3f}", f"{row['bytes'] / 1e6:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="docs:library", help="text to measure on, and behind its windows the prompts")
    parser.add_argument("--recipes", nargs="*", default=["kv8", "kv4", "kv2"], help="RECIPE or NAME=RECIPE ...")
    parser.add_argument("--theirs", nargs="*", default=list(THEIRS), help="BACKEND or BACKEND:BITS")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a window")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a piece")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=512, help="tokens of a continuation")
    parser.add_argument("--at", type=int, default=8192, help="tokens whose bytes are counted")
    parser.add_argument("--group", type=int, default=64, help="of theirs")
    parser.add_argument("--residual", type=int, default=128, help="of theirs")
    parser.add_argument("--calibration", default="docs", help="for recipes that read text")
    parser.add_argument("--samples", type=int, default=32, help="of the calibration text")
    parser.add_argument("--sample-tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that models compute in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON, after each one")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tf.utils.logging.set_verbosity_error()
    tokenizer = tf.AutoTokenizer.from_pretrained(options.model)
    count = options.windows * options.tokens + options.prompts * options.prompt
    ids = load_tokens(options.text, tokenizer, samples=1, tokens=count).ids[0]
    windows, prompts = ids.split([options.windows * options.tokens, options.prompts * options.prompt])
    with tempfile.TemporaryDirectory(prefix="lilliput-cache-") as scratch:
        texts = Texts(windows.view(options.windows, -1), prompts.view(options.prompts, -1), Path(scratch))
        plain = tf.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
        reference = original(plain, texts, options.chunk, options.new)
        asked = {key: str(x) if isinstance(x, Path) else x for key, x in vars(options).items() if key != "out"}
        found: dict[str, Any] = {"asked": asked, "transformers": tf.__version__, "torch": torch.__version__}
        found["original"] = {"perplexity": perplexity(reference).to_json()}
        rows: dict[str, Any] = {}
        found["rows"] = rows

        def add(name: str, row: dict[str, Any]) -> None:
            rows[name] = row
            print(table({name: row}).splitlines()[-1], file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

        for kind in options.theirs:
            add(kind, theirs(kind, plain, texts, reference, options))
        del plain
        for recipe in options.recipes:
            before, _, rest = recipe.partition("=") if "=" in recipe.split()[0] else (recipe, "", recipe)
            add(before.strip(), ours(rest.split(), texts, reference, options))
    print(json.dumps(found) if options.json else table(rows))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
