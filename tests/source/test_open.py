"""From what the user wrote to a source, and every way in which that can go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lilliput.errors import SourceError
from lilliput.source import open_source
from lilliput.source.scan import SAMPLE
from lilliput.source.source import own_name

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=700,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, name: str, row: int, value: float) -> None:
    values = load_file(folder / "model.safetensors")
    values[name][row, 1] = value
    save_file(values, folder / "model.safetensors")


def test_a_folder(folder: Path) -> None:
    source = open_source(str(folder))
    values = load_file(folder / "model.safetensors")
    assert source.folder == folder
    assert source.model == str(folder)
    assert source.text_config.hidden_size == 16
    assert set(source.stored) == set(values)
    for name, stored in source.stored.items():
        got = source.read(name)
        assert torch.equal(got, values[name])
        assert (tuple(got.shape), got.dtype, got.nbytes) == (stored.shape, stored.dtype, stored.nbytes)
        assert source.file_of(name) == folder / "model.safetensors"
    assert torch.equal(source.read(NAME, (3, 9)), values[NAME][3:9])
    source.scan()
    with pytest.raises(SourceError, match="no tensor named nonsense"):
        source.read("nonsense")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
def test_scan_names_what_is_not_finite(folder: Path, dtype: torch.dtype, value: float, word: str) -> None:
    values = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(values, folder / "model.safetensors")
    open_source(str(folder)).scan()
    rewrite(folder, NAME, 11, value)
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=rf"{NAME} in .*model\.safetensors holds .*{word}.*row 11"):
        source.scan()
    source.scan(finite=False)


def test_fingerprint_after_a_scan_sees_every_weight(folder: Path) -> None:
    def scanned() -> str:
        source = open_source(str(folder))
        source.scan()
        return source.fingerprint()

    rewrite(folder, NAME, 0, 0.25)  # the same writer every time: headers have one size
    before, quick = scanned(), open_source(str(folder)).fingerprint()
    assert len(before) == 64
    assert before == scanned()
    assert before != quick == open_source(str(folder)).fingerprint()
    middle = 8  # between the rows that the quick one reads
    width = 700
    assert 1 < SAMPLE // width < middle < 16 - SAMPLE // width - 1
    rewrite(folder, NAME, middle, 0.5)
    assert scanned() != before
    assert open_source(str(folder)).fingerprint() == quick
    rewrite(folder, NAME, 15, 0.5)
    assert open_source(str(folder)).fingerprint() != quick


def test_progress_is_told(folder: Path) -> None:
    from lilliput.progress import Progress

    class Heard(Progress):
        def step(self, done: int, total: int, note: str = "") -> None:
            seen.append((done, total, note))

    seen: list[tuple[int, int, str]] = []
    source = open_source(str(folder))
    source.scan(progress=Heard())
    assert [x[0] for x in seen] == list(range(1, len(source.stored) + 1))
    assert {x[2] for x in seen} == set(source.stored)


def test_weights_that_are_passed_over_are_noted(folder: Path) -> None:
    assert open_source(str(folder)).notes == ()
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "those of model.safetensors" in open_source(str(folder)).notes[0]


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="merge_and_unload"):
        open_source(str(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("declared", "rest"), [("float32", torch.bfloat16), (None, torch.float16), (None, None)])
def test_eight_bit_floats_without_scales(
    folder: Path, dtype: torch.dtype, declared: str | None, rest: torch.dtype | None
) -> None:
    """Read in the dtype that the config declares, else that of the other tensors, else one that holds them all."""
    stored = load_file(folder / "model.safetensors")
    stored = {k: v.to(dtype if "proj" in k else rest or dtype) for k, v in stored.items()}
    save_file(stored, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": declared}))
    source = open_source(str(folder))
    want = torch.float32 if declared else rest or torch.bfloat16
    assert torch.equal(source.read(NAME), stored[NAME].to(want))
    assert torch.equal(source.read(NAME, (2, 5)), stored[NAME][2:5].to(want))
    assert {source.stored[x].dtype for x in stored if "proj" in x} == {want}
    assert source.stored[NAME].nbytes == stored[NAME].numel()
    assert "8-bit floats without scales" in source.notes[0]
    source.scan()


def test_side_files(folder: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_x.py", "optimizer.pt", "notes.json"):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool_use.jinja", "tekken.json", "tokenizer.model.v3"):
        (folder / name).write_text("{}")
    files = open_source(str(folder)).side_files()
    assert list(files) == [
        "LICENSE", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "generation_config.json",
        "tekken.json", "tokenizer.json", "tokenizer.model.v3",
    ]  # fmt: skip
    assert all(files[name] == folder / name for name in files)


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"no tokenizer.*Copy tokenizer\.json"):
        open_source(str(folder)).tokenizer()


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "a/b/c", "missing.gguf"])
def test_no_such_path(model: str) -> None:
    with pytest.raises(SourceError, match="There is no file or folder"):
        open_source(model)


def test_a_hub_id_without_a_network() -> None:
    with pytest.raises(SourceError, match="hf download lilliput-tests/no-such-model"):
        open_source("lilliput-tests/no-such-model")


def cached(folder: Path, cache: Path) -> None:
    """The folder's files as the hub's cache holds them: links to blobs elsewhere."""
    snapshot, blobs = cache / "models--org--tiny" / "snapshots" / "abc", cache / "models--org--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("abc")
    for i, file in enumerate(x for x in sorted(folder.rglob("*.*")) if cache not in x.parents):
        (blobs / f"{i}").write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(blobs / f"{i}")


def test_a_hub_id_in_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOL")
    cached(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source = open_source("org/tiny")
    assert torch.equal(source.read(NAME), load_file(folder / "model.safetensors")[NAME])
    assert source.folder.name == "abc"
    assert source.name == open_source(str(source.folder)).name == "org/tiny"
    assert "additional_chat_templates/tool_use.jinja" in source.side_files()


def test_a_hub_model_that_is_cached_in_part(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, and how to get it: without a network nobody knows what the hub has."""
    cache = tmp_path / "cache"
    cached(folder, cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--org--tiny" / "snapshots" / "abc"
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"only in part: it lacks its weights, .*hf download org/tiny"):
        open_source("org/tiny")
    held, absent = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (snapshot / held).symlink_to(folder / "model.safetensors")
    index = {"weight_map": {NAME: held, "lm_head.weight": absent}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=rf"only in part: it lacks {absent}, .*hf download org/tiny"):
        open_source("org/tiny")
    (snapshot / "config.json").unlink()
    with pytest.raises(SourceError, match=r"only in part: it lacks config\.json"):
        open_source("org/tiny")


def test_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Llama-3.2-1B").mkdir()
    (tmp_path / "x.Q4_K.gguf").touch()
    monkeypatch.chdir(tmp_path / "Llama-3.2-1B")
    for given in (".", "../Llama-3.2-1B", "../Llama-3.2-1B/", str(tmp_path / "Llama-3.2-1B")):
        assert own_name(given) == "Llama-3.2-1B"
    assert own_name(str(tmp_path / "x.Q4_K.gguf")) == "x.Q4_K.gguf"
    assert own_name("org/Llama-3.2-1B") == "org/Llama-3.2-1B"
    assert own_name("docs:library") == "docs:library"


def test_a_hub_model_with_pickles_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    cached(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
        open_source("org/tiny")


def test_what_can_be_no_hub_id() -> None:
    with pytest.raises(SourceError, match="neither an existing folder"):
        open_source("what is this?")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"not a model: it has no config\.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("with_config", [False, True])
def test_pickles_only(folder: Path, with_config: bool) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"pytorch_model\.bin"):
        open_source(str(folder))
    with pytest.raises(SourceError, match="none is opened here"):
        open_source(str(folder / "pytorch_model.bin"))


def test_a_single_safetensors_file(folder: Path) -> None:
    with pytest.raises(SourceError, match="Give the folder"):
        open_source(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not valid JSON"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
        ('{"model_type": "nix"}', "nix"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: str, word: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match=word):
        open_source(str(folder))


def test_code_of_the_model_does_not_run(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "configuration_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(SourceError, match="Python code of its own, which is never run"):
        open_source(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "hqq"])
def test_a_quantization_without_a_reader(folder: Path, method: str) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SourceError, match=f"'{method}'.*unquantized model"):
        open_source(str(folder))
