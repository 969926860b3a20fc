"""Peak memory of compressing random models: flat in depth, within a hard budget, with a large vocabulary.

    python benchmarks/memory.py depth --folder SCRATCH           # width 1,024, 2 and 32 blocks: the same peaks
    python benchmarks/memory.py billion --folder SCRATCH         # Llama-3.2-1B's shape under --memory 1.5GB
    python benchmarks/memory.py vocabulary --folder SCRATCH      # 262,144 tokens in both containers, under 1 GB

Each job is one `lilliput compress` process. Its VmHWM is read as it ends, file pages included, less that of a process
that has only run `import lilliput.api`, which imports all of the package. The models are written block by block with
random weights in bfloat16; the GGUF file has random blocks of 8 bits, as llama.cpp writes them where 256 does not
divide a row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
CHILD = """
import json, sys
import lilliput.api
from lilliput.machine.memory import peak_rss
base = peak_rss()
from lilliput.cli.main import main
try:
    main()
finally:
    print(json.dumps({"base": base, "peak": peak_rss()}), file=sys.stderr)
"""


def byte_pairs(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """So many tokens of a byte-pair tokenizer, and the merges that make them: bytes, then longer and longer words."""
    from tokenizers import pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [x for x in tokens if x.isascii() and x.isalpha()]
    merges: list[tuple[str, str]] = []
    shorter = letters
    while len(tokens) + len(merges) < count - 1:
        pairs = [(a, b) for a in shorter for b in letters][: count - 1 - len(tokens) - len(merges)]
        merges += pairs
        shorter = [a + b for a, b in pairs]
    return [*tokens, *(a + b for a, b in merges), END], merges


def write_gguf(
    path: Path, *, layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int, context: int = 4096
) -> None:
    """A Llama with tied embeddings as one GGUF file, with a byte-pair tokenizer; 32 has to divide `hidden`."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(vocabulary)
    tokens, merges = byte_pairs(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (vocabulary - 1) + [3])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(vocabulary - 1)
    side = hidden // heads * kv
    shapes = {"token_embd": (vocabulary, hidden)}
    norms = ["output_norm"]
    for block in range(layers):
        norms += [f"blk.{block}.attn_norm", f"blk.{block}.ffn_norm"]
        shapes |= {f"blk.{block}.attn_{x}": (hidden, hidden) for x in ("q", "output")}
        shapes |= {f"blk.{block}.attn_{x}": (side, hidden) for x in ("k", "v")}
        shapes |= {f"blk.{block}.ffn_{x}": (inner, hidden) for x in ("gate", "up")}
        shapes[f"blk.{block}.ffn_down"] = (hidden, inner)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    for name, (rows, width) in shapes.items():
        blocks = rng.integers(0, 256, (rows * width // block_size, block_bytes), dtype=np.uint8)
        blocks[:, :2] = np.full((len(blocks), 1), 0.02 / 64, dtype=np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv: int,
    vocabulary: int,
    context: int = 4096,
    merged: bool = False,
) -> None:
    """A Llama with random weights, one file a block, and a tokenizer with the full vocabulary's size.

    merged: a byte-pair tokenizer, as models have it, instead of one token a word.
    """
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
        max_position_embeddings=context,
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
    if merged:
        tokens, merges = byte_pairs(vocabulary)
        pairs = Tokenizer(models.BPE({x: n for n, x in enumerate(tokens)}, merges))
        pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=END).save_pretrained(folder)
        return
    words = {f"w{n}": n for n in range(vocabulary - 1)} | {"[UNK]": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def measure(model: Path, out: Path, text: Path, arguments: list[str]) -> dict[str, Any]:
    """One compress process: what it planned, took and wrote."""
    command = [sys.executable, "-c", CHILD, "compress", str(model), "--out", str(out), "--data", str(text), "--json"]
    began = time.perf_counter()
    process = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr)
    peaks = json.loads(process.stderr.strip().splitlines()[-1])
    report = json.loads(process.stdout)
    return {
        "seconds": time.perf_counter() - began,
        "peak_above_base": peaks["peak"] - peaks["base"],
        "base": peaks["base"],
        "predicted_peak": report["predicted"]["peak_rss_bytes"],
        "reported_peak": report["measured"]["peak_rss_bytes"],
        "bytes": report["measured"]["bytes"],
        "predicted_bytes": report["predicted"]["bytes"],
        "folder_bytes": report["measured"]["folder_bytes"],
        "predicted_folder_bytes": report["predicted"]["folder_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("depth", "billion", "vocabulary"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--memory", help="1.5GB for billion, 1GB for vocabulary unless given")
    parser.add_argument(
        "--recipe",
        action="append",
        help="for depth and vocabulary: RECIPE [STEP.KEY=VALUE ...]; gptq, or rtn, unless given",
    )
    parser.add_argument("--out")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{(n * 7919) % 1000}" for n in range(80_000)))
    results: dict[str, Any] = {}
    if options.job == "depth":
        for recipe in options.recipe or ["gptq"]:
            figures: dict[str, Any] = {}
            for layers in (2, 32):
                model = folder / f"deep-{layers}"
                if not model.exists():
                    write_model(model, layers=layers, hidden=1024, inner=2816, heads=16, kv=4, vocabulary=8192)
                name, *settings = recipe.split()
                shared = ["--recipe", name, "--samples", "16", "--tokens", "512", "--eval-windows", "2"]
                shared += [word for setting in settings for word in ("--set", setting)]
                figures[f"{layers} blocks"] = measure(model, folder / f"out-{layers}-{time.time_ns()}", text, shared)
            peaks = [row["peak_above_base"] for row in figures.values()]
            results[recipe] = figures | {"ratio": peaks[1] / peaks[0]}
    elif options.job == "vocabulary":
        shape = {"layers": 4, "hidden": 640, "inner": 2048, "heads": 4, "kv": 1, "vocabulary": 262_144}
        file, model = folder / "large.gguf", folder / "large"
        if not file.exists():
            write_gguf(file, **shape)
        if not model.exists():
            write_model(model, merged=True, **shape)
        text.write_text("A day like any other, and the same again. " * 10_000)
        for recipe in options.recipe or ["rtn"]:
            name, *settings = recipe.split()
            for path in (file, model):
                shared = [word for setting in settings for word in ("--set", setting)]
                shared += ["--recipe", name, "--samples", "32", "--tokens", "512", "--eval-windows", "2"]
                shared += ["--memory", options.memory or "1GB"]
                results[f"{recipe}, {path.name}"] = measure(path, folder / f"out-{time.time_ns()}", text, shared)
    else:
        model = folder / "billion"
        if not model.exists():
            write_model(model, layers=16, hidden=2048, inner=8192, heads=32, kv=8, vocabulary=128256)
        shared = ["--recipe", "gptq", "--samples", "16", "--tokens", "512", "--memory", options.memory or "1.5GB"]
        shared += ["--eval-windows", "2"]
        results["billion"] = measure(model, folder / f"out-billion-{time.time_ns()}", text, shared)
    print(json.dumps(results, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
