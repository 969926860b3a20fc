"""llm-compressor on the same job, for comparison: run it with an environment of its own.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0+cpu               # or whatever build llm-compressor takes
    ENV/bin/pip install llmcompressor                   # 0.14 was tried
    ENV/bin/python benchmarks/peer.py MODEL --calibration VALID.txt --bits 4 --method gptq --out DIR
    ENV/bin/python benchmarks/peer.py MODEL --calibration VALID.txt --scheme w8a8 --method gptq --out DIR
    lilliput eval DIR --against MODEL --data TEST.txt

Weights: group 64, asymmetric. w8a8: SmoothQuant, then 8-bit weights with a scale for each row and 8-bit inputs by
token. lm_head untouched, 32 x 512 calibration tokens, the first of the text, as `lilliput compress --data VALID.txt`
takes them. The folder is in compressed-tensors' layout, inputs included, so that perplexity is measured by the same
code as ours; prints one JSON object with the seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any


def steps(options: argparse.Namespace) -> list[Any]:
    """llm-compressor's recipe."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    kind = GPTQModifier if options.method == "gptq" else QuantizationModifier
    if options.scheme == "w8a8":
        smooth = [SmoothQuantModifier(smoothing_strength=options.smoothing)] if options.smoothing else []
        return [*smooth, kind(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    weights = {"num_bits": options.bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
    return [kind(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--scheme", choices=("weights", "w8a8"), default="weights")
    parser.add_argument("--bits", type=int, default=4, help="of weights alone")
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--smoothing", type=float, default=0.8, help="of w8a8: SmoothQuant's alpha; 0: without it")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="of a sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    options = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count = options.samples * options.tokens
    with open(options.calibration, encoding="utf-8") as file:
        ids = tokenizer(file.read(25 * count), verbose=False).input_ids[:count]
    if len(ids) < count:
        sys.exit(f"{options.calibration} has {len(ids)} tokens, and {count} are asked for")
    rows = [
        {"input_ids": ids[at : at + options.tokens], "attention_mask": [1] * options.tokens}
        for at in range(0, count, options.tokens)
    ]
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=steps(options),
        max_seq_length=options.tokens,
        num_calibration_samples=options.samples,
    )
    seconds = time.perf_counter() - start
    if options.out:
        model.save_pretrained(options.out, save_compressed=True)
        tokenizer.save_pretrained(options.out)
    print(json.dumps({"seconds": seconds, "with_loading_and_saving": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
