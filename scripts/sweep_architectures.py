"""Compress a tiny random model of every causal language model of transformers, and see what the engine makes of it.

    python scripts/sweep_architectures.py              # compare with docs/architectures.md, status 1 where it differs
    python scripts/sweep_architectures.py --write      # measure again and write the page
    python scripts/sweep_architectures.py llama mamba  # only these, with everything that there is to say

Every configuration that `AutoModelForCausalLM` knows is made small by the names of its fields. What a recipe makes of
it is one of
- compressed: transformers opens the written folder, finds every tensor, and its logits are those of the weights that
  Lilliput's own reader decodes;
- refused: one message before any work;
- wrong: anything else. Nothing may be wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lilliput import api
from lilliput.anatomy.wrapper import opener
from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.model.stored import Model, open_model
from lilliput.progress import Quiet

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
# Scales as wide as the models: where transformers decodes, it does so in the dtype of the scales.
QUICK = ("rtn.importance=false", "rtn.search=minmax", "rtn.scale_dtype=float32")
RECIPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "w4": ("w4-engines", ("gptq.scale_dtype=float32",)),
    "rtn": ("rtn", QUICK),
    "w8": ("w8-engines", QUICK),
    "native": ("export: lilliput\nsteps: [{method: rtn}]\n", QUICK),
}
APART = 2e-5  # relative: batched experts add up in another order than single ones
LARGEST = 12_000_000  # parameters of a model that is still called tiny
VOCABULARY = 320

HEAD = """# Architectures

Every causal language model of transformers {version} of which a tiny one can be made from its configuration class:
{tried} of them, random, through {recipes} recipes; {summary}. A cell names the layout of a folder that
transformers opens whole and with the logits of the decoded weights; "decoded": config.json asks transformers to decode
while it loads, for models whose own code needs plain weights. `w4` and `w8` are `w4-engines` and `w8-engines`,
`native` is `rtn` with `export: lilliput`. Refusals come before any work, with the message on the right.

Made by `scripts/sweep_architectures.py --write`; `make sweep` does it again.
"""

# How large an integer field may be, by its name: the first pattern that fits decides. None: as it is.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"(\w+_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"\w*nextn_predict_layers|num_kv_shared_layers", None),
    (r"first_k_dense_replace|num_dense_layers|n_(in|out)put_layers", 1),
    (r"((num|n|encoder|decoder|hidden|recurrent)_)*layers?", 2),
    (r"mamba_num_heads|n_mamba_heads|mamba_n_heads", 8),
    (r"((num|n|encoder|decoder|swa|attention)_)*heads?", 4),
    (r"((num|n|swa)_)*(key_value|kv)_heads|num_(query|attention)_groups", 2),
    (r"linear_num_(key|value)_heads|index_n_heads|linear_num_heads", 2),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"(\w+_)?(head_dim|head_size|d_head|kv_channels|dim_head)", 16),
    (r"\w+_rank|d_rel", 8),
    (r"\w*intermediate\w*_size\w*|\w*ffn_(dim|hidden_size)|dim_ff|d_?ff|n_inner|d_inner|feed_forward_size", 64),
    (r"\w*hidden_size_per_layer_input|ple_embed_dim", 16),
    (
        r"(\w+_)?hidden_size|n_embd|d_model|(word_)?emb\w*_(size|dim)|lru_width|hidden_dim|(in|out)put_embedding_size",
        64,
    ),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|zero_expert_num", 2),
    (r"n_group|num_expert_group|topk_group|\w*n_?groups", 1),
    (r"(\w+_)*shared_experts", 1),
    (r"max_\w*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 256),
    (r"\w*d_state|\w*state_size", 16),
    (r"(\w+_)?window(_size)?|local_attention", 16),
    (r"encoder_hash_byte_group_vocab", 64),
)
SAME = (("head_dim", "qk_rope_head_dim"), ("num_key_value_heads", "num_attention_heads"))
# What names of fields do not tell: fields that belong together, and what a default leaves open.
BESIDES: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 3, "n_recurrent_layers": 1},
    "gemma4_text": {"hidden_size_per_layer_input": 0},  # as the larger ones have it: no inputs from the tokens
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}


@dataclass(frozen=True)
class Result:
    """What became of one architecture under one recipe. kind: "compressed", "refused", "wrong"."""

    recipe: str
    kind: str
    layout: str = ""
    message: str = ""


@dataclass(frozen=True)
class Row:
    """An architecture, and what each recipe makes of it; `unmade`: why there is no tiny model of it."""

    name: str
    results: tuple[Result, ...] = ()
    unmade: str = ""


def names() -> tuple[str, ...]:
    """Every model type of transformers that `AutoModelForCausalLM` knows."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny(name: str) -> Any:
    """A config of the model type with small sizes. Raises whatever the config class does not like about them."""
    kind = CONFIG_MAPPING[name]
    base = kind()
    plain = base.to_dict()
    fields = _shrunk(plain)
    for key, value in plain.items():
        if isinstance(value, dict) and value.get("model_type") in CONFIG_MAPPING:
            fields[key] = tiny(value["model_type"])
        elif isinstance(value, dict) and hasattr(getattr(base, key), "to_dict"):
            fields[key] = {**value, **_shrunk(value)}
    for one, other in SAME:  # two names of one size
        if one in plain and plain[one] is not None and plain[one] == plain.get(other):
            fields[one] = fields.get(other, plain[other])
    return kind(**{**fields, **BESIDES.get(name, {})})


def _shrunk(plain: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in plain.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)
        if key.endswith(("token_id", "token_index")) and value >= VOCABULARY:
            fields[key] = VOCABULARY - 1 - len(fields) % 16
        elif most is not None and value > most:
            fields[key] = most
    return fields


def make(name: str, folder: Path) -> None:
    """Write a random model of the type, with weights of the size that layers keep, and a tokenizer of single bytes."""
    config = tiny(name)
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(x.numel() for x in opener(config).from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters at its smallest")
    model = opener(config).from_config(config).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(0, value.shape[-1] ** -0.5)
            else:
                value.add_(torch.randn(value.shape) * 0.05)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def sweep(name: str, place: Path) -> Row:
    """What each recipe makes of a tiny model of the type, written below `place`."""
    source = place / "source"
    with quiet():
        try:
            make(name, source)
            logits(engine(source)[0])
        except Exception as error:  # whatever transformers says about its own model
            return Row(name, unmade=_first(error))
        try:
            opened = open_model(source)
        except LilliputError as error:
            return Row(name, tuple(Result(label, "refused", message=str(error)) for label in RECIPES))
        except Exception as error:
            return Row(name, tuple(Result(label, "wrong", message=f"not read, {_first(error)}") for label in RECIPES))
        return Row(name, tuple(measure(opened, place, label) for label in RECIPES))


def measure(model: Model, place: Path, label: str) -> Result:
    """Compress the model and compare what transformers opens with what Lilliput decodes."""
    recipe, settings = RECIPES[label]
    text = place / "text.txt"
    text.write_text("".join(chr(32 + i * i % 91) for i in range(400)))
    out = place / label
    try:
        compression = api.compress(
            model, out, recipe=recipe,  # type: ignore[arg-type]  # looked at once for all recipes
            settings=settings, data=str(text), samples=2, tokens=24, dtype="float32",
            device="cpu", eval_windows=0, progress=Quiet(),
        )  # fmt: skip
    except (PlanError, SourceError) as error:
        return Result(label, "refused", message=str(error))
    except Exception as error:  # whatever comes once the work is done is no refusal
        return Result(label, "wrong", message=f"compress ended with {_first(error)}")
    entry = compression.plan.quantization_config
    layout = "dense" if entry is None else compression.plan.exporter + (", decoded" if entry.get("dequantize") else "")
    try:
        opened, info = engine(out)
        problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info[key]}
        distance = difference(logits(opened), logits(own(out)))
    except Exception as error:
        return Result(label, "wrong", layout, f"opened, {_first(error)}")
    if problems:
        return Result(label, "wrong", layout, f"transformers reports {problems}")
    if not distance <= APART:
        return Result(label, "wrong", layout, f"logits are {distance:.1e} from those of the decoded weights")
    return Result(label, "compressed", layout, f"{distance:.0e}")


def engine(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model as transformers opens it, in float32, and what it says of the loading."""
    auto = opener(transformers.AutoConfig.from_pretrained(folder))
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def own(folder: Path) -> Any:
    """The model as Lilliput reads it, whole."""
    opened = open_model(folder)
    opened.load(opened.skeleton.shapes)
    return opened.skeleton.model


def logits(model: Any) -> Tensor:
    """float32 logits [1, 24, V] of fixed tokens. ValueError: they are not finite."""
    ids = torch.arange(24).mul(7).remainder(250).add(3).unsqueeze(0)
    torch.manual_seed(0)
    with torch.no_grad():
        scores: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("logits are not finite")
    return scores


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Frobenius norms."""
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No load reports, progress bars and warnings of the libraries below."""
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(sink), contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        yield


def _first(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"


def _one(name: str) -> Row:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        return sweep(name, Path(place))


def line(row: Row) -> str:
    """The row of the page."""
    if row.unmade:
        return f"| {row.name} |  |  |  |  | not tried: {_cell(row.unmade)} |"
    cells = " | ".join(x.layout if x.kind == "compressed" else x.kind for x in row.results)
    reasons = dict.fromkeys(_cell(x.message) for x in row.results if x.kind != "compressed")
    return f"| {row.name} | {cells} | {' '.join(reasons)} |"


def page(rows: Sequence[Row]) -> str:
    """docs/architectures.md."""
    counts = Counter(x.kind for row in rows for x in row.results)
    count = sum(not row.unmade for row in rows)
    summary = f"{counts['compressed']} compressed, {counts['refused']} refused, {counts['wrong']} wrong"
    head = HEAD.format(version=transformers.__version__, tried=count, recipes=len(RECIPES), summary=summary)
    labels = " | ".join(RECIPES)
    return "\n".join((head, f"| model type | {labels} | why not |", "| --- " * 6 + "|", *map(line, rows), ""))


def _cell(text: str) -> str:
    short = re.sub(r"(/\S+)?/source\b", "its folder", text).replace("|", "/")
    return short if len(short) <= 160 else short[:157] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all where none is named")
    parser.add_argument("--write", action="store_true", help="write the page instead of comparing with it")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    rows: list[Row] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        for row in pool.map(_one, options.names or names()):
            rows.append(row)
            print(line(row), flush=True)
            for x in row.results if options.names else ():
                print(f"    {x.recipe}: {x.kind} {x.layout} {x.message}")
    wrong = sum(x.kind == "wrong" for row in rows for x in row.results)
    if options.names:
        return int(wrong > 0)
    if options.write:
        PAGE.write_text(page(rows), encoding="utf-8")
        return int(wrong > 0)
    same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(rows)
    print(f"{PAGE.name} {'says the same' if same else 'says something else: run with --write'}; {wrong} wrong")
    return int(wrong > 0 or not same)


if __name__ == "__main__":
    sys.exit(main())
