"""GGUF files of ours beside those of llama-quantize: bytes, and quality by our evaluation and out of llama.cpp.

    python benchmarks/llamacpp.py MODEL --calibration VALID.txt --text wikitext=TEST.txt \
        --peer Q4_K_M=15 --run "ours-q4_k=q4_k" --keep FOLDER --out llamacpp.json

MODEL: a folder, or a GGUF file, which the peer then quantizes anew and whose metadata our files carry over.
Calibration: 32 x 512 tokens from the start (--samples, --tokens). Peers are made of MODEL as float32 by
llama_model_quantize, without an importance matrix; NAME=NUMBER is its file type. Texts: NAME=FILE or
NAME=FILE@WINDOWS, windows of 1,024 tokens. Every row is measured by our evaluation of the file as decoded, in float32
against MODEL; --engine WINDOWS adds perplexity and KL from the log-probabilities that llama.cpp computes on the first
text. Both need a Python with llama_cpp (LILLIPUT_LLAMACPP_PYTHON). A row is written as soon as it is measured;
repeated with the same --out, only rows that are missing are made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

METRICS = ("perplexity", "reference_perplexity", "perplexity_ratio", "kl", "agreement")
QUANTIZE = """
import ctypes, sys, llama_cpp as l
p = l.llama_model_quantize_default_params()
p.ftype, p.nthread, p.allow_requantize = int(sys.argv[3]), 2, True
sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""


def ours(words: list[str], out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compress in this process."""
    import lilliput

    result = lilliput.compress(
        options.model,
        out,
        recipe=words[0],
        settings=words[1:],
        data=options.calibration,
        samples=options.samples,
        tokens=options.tokens,
        eval_windows=0,
        to="gguf",
    )
    assert result.converted is not None
    return {"seconds": result.seconds, "types": dict(result.converted.types), "engine": result.converted.engine}


def peer(number: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize MODEL, or a float32 file of it, in llama.cpp."""
    from lilliput import api
    from lilliput.export.convert import llamacpp

    base = Path(options.model)
    if base.is_dir():
        base = options.keep / "float32.gguf"
        if not base.exists():
            api.convert(options.model, base)
    python = llamacpp.python()
    if python is None:
        sys.exit(f"error: no llama.cpp here: {llamacpp.INSTALL}")
    subprocess.run([python, "-c", QUANTIZE, str(base), str(out), number], check=True, capture_output=True)
    return {}


def engine(file: Path, options: argparse.Namespace, text: str) -> dict[str, Any]:
    """Perplexity and KL of llama.cpp's log-probabilities, and those of MODEL as our reader decodes it."""
    from lilliput.data import load_tokens
    from lilliput.export.convert import gguf_check, llamacpp
    from lilliput.metrics.interval import exp_interval, mean_interval
    from lilliput.model.stored import open_model

    model = open_model(options.model, dtype=torch.float32)
    python = llamacpp.python()
    if python is None:
        sys.exit(f"error: no llama.cpp here: {llamacpp.INSTALL}")
    read = load_tokens(text, model.source.tokenizer(), samples=options.engine, tokens=1024, vocabulary=model.vocabulary)
    losses, kls = [], []
    for i, row in enumerate(read.ids):
        original = options.keep / f"original-{options.engine}-{i}.pt"
        if not original.exists():
            torch.save(gguf_check.logits(model, row[None]).log_softmax(-1), original)
        before = torch.load(original)[:-1]
        answer = llamacpp.ask(python, file, (), [row.tolist()])
        if answer.logits is None:
            sys.exit(f"error: {file}: {answer.problem}")
        after = answer.logits[0, :-1].log_softmax(-1)
        losses.append(float(-after.gather(1, row[1:, None]).double().mean()))
        kls.append(
            sum(
                float((p.exp() * (p - q)).sum(dtype=torch.float64))
                for p, q in zip(before.split(64), after.split(64), strict=True)
            )
            / len(before)
        )
    return {
        "version": answer.version,
        "windows": options.engine,
        "perplexity": exp_interval(torch.tensor(losses)).to_json(),
        "kl": mean_interval(torch.tensor(kls)).to_json(),
    }


def measured(files: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Our evaluation of files, side by side, on every text."""
    from lilliput.metrics.evaluate import evaluate_all

    metrics: dict[str, dict[str, Any]] = {name: {} for name in files}
    for text in options.text:
        label, _, place = text.partition("=")
        file, _, count = place.partition("@")
        windows = int(count or options.windows)
        rows = evaluate_all([str(x) for x in files.values()], options.model, data=file, windows=windows, tokens=1024)
        for name, evaluation in zip(files, rows, strict=True):
            plain = evaluation.to_json()
            metrics[name][label] = {"windows": windows} | {key: plain[key] for key in METRICS}
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="docs")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE or NAME=FILE@WINDOWS to measure on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--run", action="append", default=[], help="NAME=RECIPE [STEP.KEY=VALUE ...]")
    parser.add_argument("--peer", action="append", default=[], help="NAME=NUMBER of llama.cpp's file type")
    parser.add_argument("--engine", type=int, default=0, help="windows of the first text to ask llama.cpp for")
    parser.add_argument("--keep", type=Path, required=True, help="folder that keeps the files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    if options.child:
        name, _, words = options.run[-1].partition("=")
        print(json.dumps(ours(words.split(), options.keep / f"{name}.gguf", options)))
        return
    rows: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    wanted = [(x, False) for x in options.run] + [(x, True) for x in options.peer]
    files: dict[str, Path] = {}
    for line, is_peer in wanted:
        name, _, words = line.partition("=")
        files[name] = options.keep / f"{name}.gguf"
        row = rows.setdefault(name, {})
        if "bytes" in row:
            continue
        if is_peer:
            row |= {"peer": words} | peer(words, files[name], options)
        else:
            child = [sys.executable, *sys.argv, "--child", "yes", "--run", line]  # so that its peak is its own
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            row |= {"recipe": words} | json.loads(done.stdout.splitlines()[-1])
        row["bytes"] = files[name].stat().st_size
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    missing = {name: file for name, file in files.items() if "texts" not in rows[name]}
    for name, texts in (measured(missing, options) if missing and options.text else {}).items():
        rows[name]["texts"] = texts
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    for name, file in files.items():
        if options.engine and "llama.cpp" not in rows[name]:
            rows[name]["llama.cpp"] = engine(file, options, options.text[0].partition("=")[2].partition("@")[0])
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table({name: rows[name] for name in files}))


def table(rows: dict[str, Any]) -> str:
    """Rows in Markdown."""
    texts = list(dict.fromkeys(label for row in rows.values() for label in row.get("texts", {})))
    lines = [["file", "MB", *(f"{x}: KL" for x in texts), "ratio", "llama.cpp: KL"]]
    lines.append(["---"] * len(lines[0]))
    for name, row in rows.items():
        cells = [name, f"{row['bytes'] / 1e6:.1f}"]
        for label in texts:
            text = row.get("texts", {}).get(label)
            cells.append("" if text is None else "{value:.4f} [{low:.4f}, {high:.4f}]".format(**text["kl"]))
        first = row.get("texts", {}).get(texts[0]) if texts else None
        cells.append("" if first is None else "{value:.3f}".format(**first["perplexity_ratio"]))
        cells.append("{value:.4f}".format(**row["llama.cpp"]["kl"]) if "llama.cpp" in row else "")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
