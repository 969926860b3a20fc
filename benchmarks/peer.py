"""llm-compressor on the same job, for comparison: run it with an environment of its own (llmcompressor, torch, CPU).

    PEER_PYTHON benchmarks/peer.py MODEL --calibration VALID.txt --bits 4 --method gptq --out DIR

Group 64, asymmetric, lm_head untouched, 32 x 512 calibration tokens. Writes a dense folder (the quantized weights
decoded), so that perplexity is measured by the same code as ours, and prints one JSON object with the seconds.
"""

from __future__ import annotations

import argparse
import json
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    options = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.calibration, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(400_000), verbose=False).input_ids[: 32 * 512]).view(32, 512)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 512} for row in ids]
    scheme = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": options.bits,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": 64,
            },
        }
    }
    kind = GPTQModifier if options.method == "gptq" else QuantizationModifier
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=[kind(config_groups=scheme, ignore=["lm_head"])],
        max_seq_length=512,
        num_calibration_samples=32,
    )
    seconds = time.perf_counter() - start
    if options.out:
        model.save_pretrained(options.out, save_compressed=True)
        tokenizer.save_pretrained(options.out)
    print(json.dumps({"seconds": seconds, "with_loading_and_saving": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
