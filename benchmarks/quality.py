"""Perplexity, time and memory of recipes on one model, each compressed in a fresh process.

    python benchmarks/quality.py MODEL --calibration VALID.txt --text test=TEST.txt --text c4=C4.jsonl \
        --run "gptq-4=gptq gptq.bits=4 gptq.group_size=64 gptq.symmetric=false" --out results.json

Calibration: 32 x 512 tokens from the start. Perplexity: 16 windows of 1,024 tokens, float32, on the folder as re-read.
A run named `original` is the model itself. Times are wall-clock seconds of the whole call, `forwards` the same in
bfloat16 forward passes of the calibration tokens through the model (blocks and head), timed in the same process on half
of them and doubled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def compress(model: str, calibration: str, out: str, words: list[str]) -> dict[str, Any]:
    """In this process: one recipe, timed with the forward pass beside it."""
    import time

    import torch

    import lilliput
    from lilliput.machine import memory

    began = time.perf_counter()
    result = lilliput.compress(
        model, out, recipe=words[0], settings=words[1:], data=calibration, samples=32, tokens=512, eval_windows=0
    )
    seconds = time.perf_counter() - began
    peak = memory.peak_above_base()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(calibration, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(400_000), verbose=False).input_ids[: 32 * 512]).view(32, 512)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    times = []
    with torch.no_grad():
        whole(ids[:4])
        for _ in range(3):
            start = time.perf_counter()
            for a in range(0, 16, 4):
                whole(ids[a : a + 4])
            times.append(2 * (time.perf_counter() - start))  # half of the tokens, which are all of one length
    forward = sorted(times)[1]
    return {
        "seconds": seconds,
        "forward_bf16": forward,
        "forwards": seconds / forward,
        "peak_rss_bytes": peak,
        "predicted_peak_rss_bytes": result.plan.batching.bytes,
        "bytes": result.to_json()["measured"]["bytes"],
        "predicted_bytes": result.plan.bytes,
        "folder_bytes": result.folder_bytes,
        "predicted_folder_bytes": result.plan.folder_bytes,
        "bits_per_weight": result.plan.bits_per_weight,
        "model_bits_per_weight": result.plan.model_bits_per_weight,
    }


def fresh(arguments: list[str]) -> dict[str, Any]:
    """The same script in a fresh process, which prints one JSON object last."""
    process = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE or NAME=FILE@WINDOWS to measure on")
    parser.add_argument("--run", action="append", default=[], help="NAME=RECIPE [STEP.KEY=VALUE ...]")
    parser.add_argument("--runs", help="file of such lines; with --run only those of these names are run")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--together", type=int, default=4, help="models measured against one pass of the original")
    parser.add_argument("--out")
    parser.add_argument("--keep", help="folder that keeps the compressed models")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compress(options.model, options.calibration, options.child, options.run[0].split())))
        return
    runs = options.run
    if options.runs:
        lines = [x for x in Path(options.runs).read_text().splitlines() if x.strip() and not x.startswith("#")]
        named = {x.partition("=")[0].strip(): x for x in lines}
        runs = [named[x] for x in runs] if runs else lines
    results: dict[str, Any] = {}
    failed: list[str] = []
    if options.out and Path(options.out).exists():
        results = json.loads(Path(options.out).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(options.keep or scratch)
        base.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(runs), options.together):
            rows: dict[str, dict[str, Any]] = {}
            folders: dict[str, str] = {}
            for run in runs[first : first + options.together]:
                name, _, words = (x.strip() for x in run.partition("="))
                folders[name] = options.model if words == "original" else str(base / name)
                row: dict[str, Any] = {"recipe": words}
                if words != "original":
                    shared = ["--calibration", options.calibration]
                    try:
                        row |= fresh([options.model, *shared, "--child", folders[name], "--run", words])
                    except subprocess.CalledProcessError:  # it has said why; the others of its batch go on
                        failed.append(name)
                        continue
                    print(name, json.dumps(row), file=sys.stderr, flush=True)
                rows[name] = row
            if not rows:
                continue
            measure(options, rows, folders)
            for name, row in rows.items():
                print(name, json.dumps(row), file=sys.stderr, flush=True)
                if not options.keep and row["recipe"] != "original":
                    shutil.rmtree(folders[name])
            results |= rows
            if options.out:
                Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def measure(options: argparse.Namespace, rows: dict[str, dict[str, Any]], folders: dict[str, str]) -> None:
    """Add the metrics on each text, the models side by side against the original."""
    from lilliput.metrics.evaluate import evaluate_all

    for text in options.text:
        label, _, place = text.partition("=")
        file, _, count = place.partition("@")
        windows = int(count or options.windows)
        # The original's own row has nothing to be compared with.
        for alone in (True, False):
            names = [x for x in rows if (rows[x]["recipe"] == "original") == alone]
            if not names:
                continue
            against = None if alone else options.model
            evaluations = evaluate_all([folders[x] for x in names], against, data=file, windows=windows, tokens=1024)
            for name, evaluation in zip(names, evaluations, strict=True):
                plain = evaluation.to_json()
                keys = ("perplexity", "perplexity_ratio", "kl", "agreement")
                rows[name][label] = {"windows": windows} | {key: plain[key] for key in keys if plain.get(key)}


if __name__ == "__main__":
    main()
