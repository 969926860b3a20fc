"""Peak memory of compressing random models: flat in depth, and within a hard budget.

    python benchmarks/memory.py depth --folder SCRATCH           # width 1,024, 2 and 32 blocks: the same peaks
    python benchmarks/memory.py billion --folder SCRATCH         # Llama-3.2-1B's shape under --memory 1.5GB

Each job is one `lilliput compress` process. Its VmHWM is read as it ends, file pages included, less that of a process
that has only run `import lilliput`. The models are written block by block with random weights in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, sys
import lilliput
from lilliput.memory import peak_rss
base = peak_rss()
from lilliput.cli import main
try:
    main()
finally:
    print(json.dumps({"base": base, "peak": peak_rss()}), file=sys.stderr)
"""


def write_model(folder: Path, *, layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int) -> None:
    """A Llama with random weights, one file a block, and a small tokenizer with the full vocabulary's size."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=0,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    side = hidden // heads * kv
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (side, hidden),
        "self_attn.v_proj": (side, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    count = layers + 1
    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, Any]) -> None:
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    table = torch.empty(vocabulary, hidden, dtype=torch.bfloat16)
    for a in range(0, vocabulary, 8192):
        b = min(a + 8192, vocabulary)
        table[a:b] = torch.randn(b - a, hidden, generator=generator) * 0.02
    save(0, {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    for block in range(layers):
        prefix = f"model.layers.{block}"
        tensors = {
            f"{prefix}.{name}.weight": (torch.randn(*shape, generator=generator) * 0.02).bfloat16()
            for name, shape in shapes.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(block + 1, tensors)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {f"w{n}": n for n in range(vocabulary - 1)} | {"[UNK]": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def measure(model: Path, out: Path, text: Path, arguments: list[str]) -> dict[str, Any]:
    """One compress process: what it planned, took and wrote."""
    command = [sys.executable, "-c", CHILD, "compress", str(model), "--out", str(out), "--data", str(text), "--json"]
    began = time.perf_counter()
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    seen = json.loads(done.stderr.strip().splitlines()[-1])
    report = json.loads(done.stdout)
    return {
        "seconds": time.perf_counter() - began,
        "peak_above_base": seen["peak"] - seen["base"],
        "base": seen["base"],
        "predicted_peak": report["predicted"]["peak_rss_bytes"],
        "reported_peak": report["measured"]["peak_rss_bytes"],
        "bytes": report["measured"]["bytes"],
        "predicted_bytes": report["predicted"]["bytes"],
        "folder_bytes": report["measured"]["folder_bytes"],
        "predicted_folder_bytes": report["predicted"]["folder_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("depth", "billion"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--memory", default="1.5GB")
    parser.add_argument("--recipe", action="append", help="for depth: RECIPE [STEP.KEY=VALUE ...]; gptq unless given")
    parser.add_argument("--out")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{(n * 7919) % 1000}" for n in range(80_000)))
    results: dict[str, Any] = {}
    if options.job == "depth":
        for recipe in options.recipe or ["gptq"]:
            found: dict[str, Any] = {}
            for layers in (2, 32):
                model = folder / f"deep-{layers}"
                if not model.exists():
                    write_model(model, layers=layers, hidden=1024, inner=2816, heads=16, kv=4, vocabulary=8192)
                name, *settings = recipe.split()
                shared = ["--recipe", name, "--samples", "16", "--tokens", "512", "--eval-windows", "2"]
                shared += [word for setting in settings for word in ("--set", setting)]
                found[f"{layers} blocks"] = measure(model, folder / f"out-{layers}-{time.time_ns()}", text, shared)
            peaks = [row["peak_above_base"] for row in found.values()]
            results[recipe] = found | {"ratio": peaks[1] / peaks[0]}
    else:
        model = folder / "billion"
        if not model.exists():
            write_model(model, layers=16, hidden=2048, inner=8192, heads=32, kv=8, vocabulary=128256)
        shared = ["--recipe", "gptq", "--samples", "16", "--tokens", "512", "--memory", options.memory]
        shared += ["--eval-windows", "2"]
        results["billion"] = measure(model, folder / f"out-billion-{time.time_ns()}", text, shared)
    print(json.dumps(results, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
