"""GGUF files from finished folders: the same weights, the same logits, the same tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import api
from lilliput.errors import PlanError, SourceError
from lilliput.export import convert
from lilliput.export.convert import gguf_model
from lilliput.progress import Quiet
from lilliput.source import open_source
from lilliput.source.gguf_header import read_header
from lilliput.source.gguf_metadata import Metadata

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32"}
Q4 = """steps:
  - {method: rtn, target: {format: q4_k}, options: {importance: false, steps: 6}}
  - method: rtn
    target: {format: q6_k}
    options: {search: minmax, importance: false}
    where: {include: [embed, lm_head]}
"""
EIGHT = "steps:\n  - {method: rtn, target: {format: q8_0}}\n"
_SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 256,
    "num_hidden_layers": 1, "intermediate_size": 256, "num_key_value_heads": 2,
}  # fmt: skip
_CONFIGS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: tf.MistralConfig(**_SIZES, sliding_window=None),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, head_dim=128),
    "gemma2": lambda: tf.Gemma2Config(**_SIZES, head_dim=256, query_pre_attn_scalar=256, sliding_window=64),
    "gemma3": lambda: tf.Gemma3TextConfig(**_SIZES, head_dim=256, query_pre_attn_scalar=256, sliding_window=64),
    "phi3": lambda: tf.Phi3Config(**{**_SIZES, "vocab_size": 32064}),
    "gpt2": lambda: tf.GPT2Config(vocab_size=512, n_embd=256, n_layer=1, n_head=4),
}


def _compressed(folder: Path, out: Path, recipe: str = Q4) -> Path:
    api.compress(folder, out, recipe=recipe, eval_windows=0, progress=Quiet(), **ROOM)
    return out


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 256 channels on q4_k and q6_k. Read it only."""
    return _compressed(tiny("wide"), tmp_path_factory.mktemp("folder") / "out")


def _logits(model: Any, vocabulary: int = 300) -> torch.Tensor:
    ids = torch.randint(vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


def _same(folder: Path, file: Path) -> None:
    """Every tensor of the folder, as our own reader gets it out of the file."""
    ours, theirs = open_source(str(folder)), open_source(str(file))
    assert set(ours.stored) == set(theirs.stored)
    for name in ours.stored:
        assert torch.equal(ours.read(name).float(), theirs.read(name).float()), name


def test_a_llama_with_blocks_of_both_kinds(folder: Path, tmp_path: Path) -> None:
    made = api.convert(folder, tmp_path / "m.gguf")
    _same(folder, made.out)
    kinds = {x.kind.name for x in read_header(made.out).tensors.values()}
    assert kinds == {"Q4_K", "Q6_K", "F32"}
    assert made.types == {kind: sum(x.nbytes for x in read_header(made.out).tensors.values() if x.kind.name == kind)
                          for kind in kinds}  # fmt: skip
    assert made.bytes == made.out.stat().st_size
    assert sorted(x.name for x in tmp_path.iterdir()) == ["m.gguf"]


@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same_and_reads_the_same(folder: Path, tmp_path: Path) -> None:
    api.convert(folder, tmp_path / "m.gguf")
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.equal(_logits(ours), _logits(theirs))
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("Hello, world", "  two  spaces\n\n", "naïve 12345 – ü", "def f(x):\n\treturn x"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] if x == "phi3" else []) for x in _CONFIGS])
def test_each_architecture(name: str, tokenizer: tf.PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Norms that are stored as 1 + w come back to within that sum's rounding."""
    torch.manual_seed(0)
    config = _CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(4.0) if x.dim() > 1 else x.add_(torch.randint(-8, 8, x.shape) / 64)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = _compressed(tmp_path / "model", tmp_path / "out")
    (tmp_path / "gguf").mkdir()
    made = api.convert(folder, tmp_path / "gguf" / "m.gguf")
    _same(folder, made.out)
    ours = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="m.gguf", dtype=torch.float32)
    assert torch.allclose(ours, _logits(read), rtol=0, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize(("target", "kind"), [
    ("bits: 4, group_size: 32", "Q4_0"),
    ("bits: 3, group_size: 64", "Q4_0"),
    ("bits: 5, group_size: channel", "Q5_0"),
    ("bits: 8, group_size: 64", "Q8_0"),
    ("format: mxfp4", "MXFP4"),
])  # fmt: skip
def test_grids_that_a_type_holds_without_loss(tiny: Tiny, tmp_path: Path, target: str, kind: str) -> None:
    recipe = f"export: lilliput\nsteps:\n  - {{method: rtn, target: {{{target}, scale_dtype: SCALES}}}}\n"
    scales = "auto" if "mxfp4" in target else "float16"
    folder = _compressed(tiny("qwen2"), tmp_path / "out", recipe.replace("SCALES", scales))
    made = api.convert(folder, tmp_path / "m.gguf")
    _same(folder, made.out)
    assert kind in made.types


@pytest.mark.parametrize(("target", "says"), [
    ("format: nf4", r"_proj.weight is 'nf4 g64'.* no type of GGUF holds: compress again with format q4_k"),
    ("bits: 4, group_size: 16", "int4 g16 sym"),
    ("bits: 4, group_size: 32, symmetric: false", "int4 g32 asym"),
    ("bits: 4, group_size: 32, scale_dtype: float32", "scales that float16 does not hold"),
])  # fmt: skip
def test_what_no_type_holds_is_named_with_what_does(tiny: Tiny, tmp_path: Path, target: str, says: str) -> None:
    recipe = f"export: lilliput\nsteps:\n  - {{method: rtn, target: {{{target}}}}}\n"
    folder = _compressed(tiny("qwen2"), tmp_path / "out", recipe)
    with pytest.raises(PlanError, match=says):
        api.convert(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_plain_model_keeps_its_types(tiny: Tiny, tmp_path: Path) -> None:
    made = api.convert(tiny("llama"), tmp_path / "m.gguf")
    _same(tiny("llama"), made.out)
    assert set(made.types) == {"F32"}


def test_a_folder_for_another_engine_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = _compressed(tiny("qwen2"), tmp_path / "out", "steps:\n  - {method: rtn, target: {bits: 4}}\n")
    with pytest.raises(PlanError, match=r"packed for another engine \(compressed-tensors\)"):
        api.convert(folder, tmp_path / "m.gguf")


def test_bad_outputs_and_containers(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(PlanError, match="exists already"):
        api.convert(folder, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(PlanError, match="does not exist"):
        api.convert(folder, tmp_path / "none" / "m.gguf")
    with pytest.raises(PlanError, match="Did you mean 'gguf'"):
        convert.get("ggufs")
    with pytest.raises(PlanError, match="models of type 'mixtral' are not written as GGUF"):
        api.convert(tiny("mixtral"), tmp_path / "m.gguf")
    with pytest.raises(SourceError, match="no file"):
        api.convert(folder, tmp_path / "m.gguf", like=tmp_path / "none.gguf")


def test_an_attention_that_llama_cpp_scales_otherwise_is_refused() -> None:
    config = tf.Gemma2Config(**_SIZES, head_dim=64, query_pre_attn_scalar=144)
    assert "scaled by 144" in str(gguf_model.refuse(config))
    config = tf.LlamaConfig(**_SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    assert "of type 'yarn'" in str(gguf_model.refuse(config))


def test_the_frequencies_of_llama_3_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = tf.LlamaConfig(**_SIZES, rope_parameters=rope)
    theirs = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    factors = gguf_model.frequency_factors(config)
    assert factors is not None
    assert torch.allclose(plain / factors, theirs, rtol=1e-5)


def test_metadata_of_a_gguf_source_are_carried_over(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    first = api.convert(tiny("wide"), tmp_path / "a.gguf").out
    with pytest.raises(PlanError, match="has block_count 8 and the folder 4"):
        api.convert(tiny("llama"), tmp_path / "b.gguf", like=first)
    second = api.convert(folder, tmp_path / "b.gguf", like=first).out
    ours, theirs = Metadata(first).fields, Metadata(second).fields
    assert set(ours) == set(theirs)
    for key, x in ours.items():
        if key != "general.file_type":
            same = theirs[key]
            assert (x.types, [bytes(x.parts[i]) for i in x.data]) == (
                same.types,
                [bytes(same.parts[i]) for i in same.data],
            )
    _same(folder, second)


def test_compressed_and_converted_in_one_go(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    done = api.compress(tiny("llama"), out, recipe="q4_0", to="gguf", eval_windows=2, progress=Quiet(), **ROOM)
    assert [x.name for x in tmp_path.iterdir()] == ["m.gguf"]
    said = done.to_json()
    assert said["measured"]["bytes"] == out.stat().st_size
    assert said["format"] == "gguf"
    assert "llama.cpp" in said["measured"]["engine"]
    assert done.converted is not None
    assert set(done.converted.notes) <= set(said["notes"])
    assert not any("reads this folder" in x for x in (*said["notes"], *said["evidence"].get("notes", ())))
    assert {x.kind.name for x in read_header(out).tensors.values()} == {"Q4_0", "Q8_0", "F32"}
    again = api.compress(out, tmp_path / "n.gguf", recipe=EIGHT, to="gguf", eval_windows=0, progress=Quiet(), **ROOM)
    assert Metadata(again.out).fields.keys() == Metadata(out).fields.keys()
    with pytest.raises(PlanError, match="exists already"):
        api.compress(tiny("llama"), out, recipe="q4_0", to="gguf", **ROOM)
    with pytest.raises(PlanError, match=r"cannot be written as gguf: .*'nf4 g64', which no type of GGUF holds"):
        api.compress(tiny("qwen2"), tmp_path / "o.gguf", recipe="nf4", to="gguf", **ROOM)


def test_the_file_is_read_by_the_package_that_defines_it(folder: Path, tmp_path: Path) -> None:
    made = api.convert(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(made.out)
    assert [x.name for x in reader.tensors] == list(read_header(made.out).tensors)
    assert all(x.data_offset % 32 == 0 for x in reader.tensors)
