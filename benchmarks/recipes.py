"""Named recipes on any model: quality, size, time and memory of each, one row after the other.

    python benchmarks/recipes.py MODEL --recipes w4 w3 w2 gptq "gptq-3=gptq gptq.bits=3" \
        --calibration VALID.txt --data wikitext=TEST.txt c4=C4.jsonl@4 --out rows.json

MODEL: whatever `lilliput compress` takes. A recipe is a name, a method's name or a YAML file, with settings
NAME=RECIPE STEP.KEY=VALUE ...; without --recipes all named ones. A text is NAME=FILE or NAME=FILE@WINDOWS, as are the
texts in the package, which both calibration and measuring fall back to. Each recipe is compressed in a process of its
own, so that its peak is its own, and measured as re-read in float32 against the original. A row is written as soon as
it is measured; repeated with the same --out, only rows that are missing or were made otherwise are run. A recipe that
a model refuses gets a row with the reason. Seconds are wall-clock, of compression alone. With --teacher MODEL is a
finished folder that recipes train further, and what they make of it is measured against the teacher.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METRICS = ("perplexity", "reference_perplexity", "perplexity_ratio", "kl", "agreement")


def compress(model: str, out: str, words: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """In this process: one recipe, and what it cost; a refusal is a row too."""
    import lilliput
    from lilliput.errors import LilliputError

    try:
        result = lilliput.compress(
            model,
            out,
            recipe=words[0],
            teacher=options.teacher,
            settings=words[1:],
            data=options.calibration,
            samples=options.samples,
            tokens=options.tokens,
            seed=options.seed,
            eval_windows=0,
        )
    except LilliputError as error:
        return {"refused": str(error)}
    return {
        "bits_per_weight": result.plan.bits_per_weight,
        "model_bits_per_weight": result.plan.model_bits_per_weight,
        "folder_bytes": result.folder_bytes,
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "predicted_peak_rss_bytes": result.plan.batching.bytes,
    }


def measured(folder: str, model: str, texts: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """The metrics on every text; texts of equally many windows share one pass."""
    from lilliput.metrics.evaluate import evaluate
    from lilliput.metrics.slices import window
    from lilliput.model.stored import open_model

    tokens = window(open_model(model))
    figures: dict[str, Any] = {}
    for windows in dict.fromkeys(count for _, count in texts.values()):
        names = [name for name, (_, count) in texts.items() if count == windows]
        evaluation = evaluate(folder, model, data=[texts[name][0] for name in names], windows=windows, tokens=tokens)
        for name, text in zip(names, evaluation.texts, strict=True):
            plain = text.to_json()
            figures[name] = {"windows": windows} | {key: plain[key] for key in METRICS}
    return {name: figures[name] for name in texts}


def table(rows: dict[str, Any], texts: list[str]) -> str:
    """Rows in Markdown: ratio and KL on each text with 95 % intervals, bits, folder, seconds and peak."""

    def interval(figure: dict[str, float], digits: int) -> str:
        low, high = figure["low"], figure["high"]
        return f"{figure['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    heads = ["recipe", "bits per weight", *(f"{x}: {y}" for x in texts for y in ("ratio", "KL")), "MB", "s", "peak, MB"]
    lines = [heads, ["---"] * len(heads)]
    for name, row in rows.items():
        if "refused" in row:
            lines.append([name, f"refused: {row['refused']}", *[""] * (len(heads) - 2)])
            continue
        bits = row["bits_per_weight"]  # None: no linear is compressed
        cells = [name, "" if bits is None else f"{bits:.3f}"]
        for text in texts:
            cells += [interval(row["texts"][text][key], 3) for key in ("perplexity_ratio", "kl")]
        sizes = (row["folder_bytes"] / 1e6, row["seconds"], row["peak_rss_bytes"] / 1e6)
        lines.append([*cells, *(f"{x:.0f}" for x in sizes)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def texts_of(words: list[str], windows: int) -> dict[str, tuple[str, int]]:
    """NAME=FILE[@WINDOWS] as name -> (file, windows)."""
    texts = {}
    for word in words:
        name, _, place = word.partition("=") if "=" in word else (word, "", word)
        file, at, count = place.rpartition("@")
        texts[name] = (file, int(count)) if at and count.isdecimal() else (place, windows)
    return texts


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--teacher", help="the original, where MODEL is a folder made of it")
    parser.add_argument("--recipes", nargs="+", help="RECIPE or NAME=RECIPE [STEP.KEY=VALUE ...]; default: all named")
    parser.add_argument("--calibration", default="docs", help="calibration text")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each")
    parser.add_argument("--seed", type=int, help="draw the calibration windows instead of taking the first")
    parser.add_argument("--data", nargs="+", default=["docs:library"], help="NAME=FILE[@WINDOWS] to measure on")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text (1,024 tokens or all positions)")
    parser.add_argument("--out", type=Path, help="JSON file of the rows, read first where it exists")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(compress(options.model, options.child, options.recipes[0].split(), options)))
        return
    from lilliput.recipe.load import named

    texts = texts_of(options.data, options.windows)
    protocol = {
        "model": options.model,
        "calibration": [options.calibration, options.samples, options.tokens, options.seed],
        "data": {name: list(place) for name, place in texts.items()},
    }
    rows: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    runs: list[str] = []
    for recipe in options.recipes or named():
        before, _, words = recipe.partition("=") if "=" in recipe.split()[0] else (recipe, "", recipe)
        name, words = before.strip(), words.strip()
        runs.append(name)
        request = {"recipe": words} | protocol | ({"teacher": options.teacher} if options.teacher else {})
        if request.items() <= rows.get(name, {}).items():
            continue
        with tempfile.TemporaryDirectory(prefix="lilliput-recipes-") as scratch:
            folder = str(Path(scratch) / "out")
            child = [sys.executable, __file__, *arguments, "--child", folder, "--recipes", words]
            process = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            row = request | json.loads(process.stdout.splitlines()[-1])
            if "refused" not in row:
                row["texts"] = measured(folder, options.teacher or options.model, texts)
        rows[name] = row
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(table({name: row}, list(texts)).splitlines()[-1], file=sys.stderr, flush=True)
    print(table({name: rows[name] for name in runs}, list(texts)))


if __name__ == "__main__":
    main()
