"""The block loop end to end on small models: what is written, what stays, and that nothing depends on the batching."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lilliput import api
from lilliput.data.load import load_tokens
from lilliput.metrics.size import measure
from lilliput.model.stored import open_model
from lilliput.plan import footprint
from lilliput.plan import tensors as inventory
from lilliput.progress import Quiet
from lilliput.run import stream
from lilliput.run.journal import Work

Tiny = Callable[[str], Path]
QUICK: dict[str, Any] = {
    "samples": 4,
    "tokens": 32,
    "device": "cpu",
    "dtype": "float32",
    "eval_windows": 0,
    "progress": Quiet(),
}


def compress(model: Path, out: Path, recipe: str, **more: Any) -> api.Compression:
    return api.compress(model, out, recipe=recipe, **(QUICK | more))


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found[name] = file.get_tensor(name)
    return found


def digest(folder: Path) -> dict[str, str]:
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in sorted(folder.glob("*.safetensors"))}


IDS = torch.arange(40, 72).unsqueeze(0)


def own_logits(folder: Path) -> Tensor:
    """Logits of a written folder by our own reader, block by block."""
    model = open_model(str(folder), dtype=torch.float32)
    model.load(model.skeleton.shapes)
    with torch.no_grad():
        whole: Any = model.skeleton.model
        logits: Tensor = whole.eval()(input_ids=IDS, use_cache=False).logits
    return logits.float()


def loaded_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = api.load(folder, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits
    return logits.float()


# recipe, model, settings
CASES = [
    ("gptq", "llama", ()),
    ("rtn", "qwen2", ("rtn.symmetric=false",)),
    ("gptq", "qwen2", ("gptq.bits=3", "gptq.group_size=48")),
    ("gptq", "mixtral", ("gptq.search=minmax",)),
    ("rtn", "gpt2", ()),
    ("gptq", "gpt2", ("gptq.group_size=32",)),
    ("wanda-2of4", "llama", ()),
    ("sparsegpt-2of4", "llama", ()),
    ("prune50", "qwen2", ()),
    ("awq-gptq", "qwen2", ("awq.grid=3",)),
    ("gptq", "neox", ("gptq.search=minmax",)),
    ("smoothquant-w8", "llama", ()),
]


@pytest.mark.parametrize(("recipe", "model", "settings"), CASES, ids=[f"{c[0]}-{c[1]}-{len(c[2])}" for c in CASES])
def test_the_folder_is_as_planned_and_loads(
    tiny: Tiny, tmp_path: Path, recipe: str, model: str, settings: tuple[str, ...]
) -> None:
    source, out = tiny(model), tmp_path / "out"
    done = compress(source, out, recipe, settings=settings)
    plan = done.plan
    assert plan.bytes == sum(x.stat().st_size for x in out.glob("*.safetensors"))
    for number, shard in enumerate(plan.shards):
        assert plan.shard_bytes(number) == (out / shard).stat().st_size
    written = tensors(out)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in written.items()} == {
        x.name: (x.dtype, x.shape) for x in plan.tensors
    }
    size = measure(open_model(str(out)))
    assert size.bytes == plan.bytes
    assert size.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-9)
    assert size.model_bits_per_weight == pytest.approx(plan.model_bits_per_weight, rel=1e-9)
    assert {row["name"] for row in done.rows} == {x.name for x in plan.compressed}
    assert api.verify(out).problems == ()
    logits = loaded_logits(out)
    # transformers decodes asymmetric codes, and experts, in the scales' half precision.
    grids = [x.scheme.integer for x in plan.compressed]
    half = any(x.linear.expert is not None for x in plan.compressed) or any(g and not g.symmetric for g in grids)
    close = 1e-3 if half and plan.exporter != "lilliput" else 1e-5
    assert float((logits - own_logits(out)).norm() / logits.norm()) < close
    # It is another model than the original, and not a random one.
    change = float((logits - loaded_logits(source)).norm() / loaded_logits(source).norm())
    assert 1e-6 < change < 1.0


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_what_is_written_follows_the_umask(tiny: Tiny, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        compress(tiny("llama"), tmp_path / "out", "rtn")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_the_size_of_files_changes_no_tensor(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(tiny("qwen2"), tmp_path / "one", "gptq", settings=("gptq.search=minmax",))
    monkeypatch.setattr(inventory, "SHARD", 20_000)
    done = compress(tiny("qwen2"), tmp_path / "many", "gptq", settings=("gptq.search=minmax",))
    assert os.listdir(tmp_path / "one").count("model.safetensors") == 1
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(done.plan.shards) > 3
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in done.plan.tensors)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert api.verify(tmp_path / "many").problems == ()
    torch.testing.assert_close(loaded_logits(tmp_path / "many"), loaded_logits(tmp_path / "one"), rtol=0, atol=0)


def test_all_experts_are_compressed(tiny: Tiny, tmp_path: Path) -> None:
    done = compress(tiny("mixtral"), tmp_path / "out", "gptq", settings=("gptq.search=minmax",))
    names = [x["name"] for x in done.rows]
    assert len(names) == 2 * (4 + 4 * 3)
    assert sum("experts" in x for x in names) == 2 * 4 * 3
    assert all(x.scheme.parts for x in done.plan.compressed)
    routers = [x for x in done.plan.tensors if x.source.endswith(".gate")]
    assert routers
    assert all(x.kind == "linear" for x in routers)


def test_experts_without_tokens(tiny: Tiny, tmp_path: Path) -> None:
    """Two tokens reach at most four of the four experts' slots, so some expert of some block sees none."""
    for settings in (("gptq.search=minmax",), ("gptq.search=mse",)):
        out = tmp_path / settings[0]
        done = compress(tiny("mixtral"), out, "gptq", settings=settings, samples=1, tokens=2)
        assert any(row["tokens"] == 0 for row in done.rows)
        assert all(row["error"] < 1 for row in done.rows)
        assert api.verify(out).problems == ()
        assert bool(torch.isfinite(loaded_logits(out)).all())


def test_what_no_step_touches_stays(tiny: Tiny, tmp_path: Path) -> None:
    source = tensors(tiny("llama"))
    settings = ("gptq.include=gate_proj,v_proj", "gptq.exclude='*layers.1.*'")
    done = compress(tiny("llama"), tmp_path / "out", "gptq", settings=settings)
    written = tensors(tmp_path / "out")
    changed = {x.name for x in done.plan.compressed}
    assert len(changed) == 6
    for name, value in source.items():
        if name.removesuffix(".weight") in changed:
            assert name not in written
        else:
            assert written[name].dtype == value.dtype
            assert torch.equal(written[name], value), name


def test_the_same_bytes_twice(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(400)))
    more: dict[str, Any] = {"settings": ("awq.grid=3", "gptq.search=minmax"), "data": str(text)}
    for name in ("a", "b"):
        compress(tiny("llama"), tmp_path / name, "awq-gptq", seed=5, **more)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    compress(tiny("llama"), tmp_path / "c", "awq-gptq", seed=6, **more)
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "awq-gptq"), ("mixtral", "gptq"), ("gpt2", "rtn"), ("neox", "gptq")]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_lockstep_and_running_again_agree(tiny: Tiny, tmp_path: Path, name: str, recipe: str, batch: int) -> None:
    """Both ways see each site after the already compressed ones before it, so they write the same bytes."""
    model = open_model(str(tiny(name)))
    quick = {"rtn": (), "gptq": ("gptq.search=minmax",), "awq-gptq": ("gptq.search=minmax", "awq.grid=3")}[recipe]
    made = api.plan(tiny(name), recipe=recipe, settings=quick, samples=4, tokens=32, dtype="float32")
    ids = load_tokens("docs", model.source.tokenizer(), samples=4, tokens=32).ids
    found = []
    for lockstep in (True, False):
        plan = replace(made, batching=footprint.Batching(batch, lockstep, 0, ""))
        with Work(tmp_path / str(lockstep), "same") as work:
            rows = stream.run(plan, model, ids, work, Quiet())
            found.append((digest(work.staging), [(row["name"], row["error"], row["tokens"]) for row in rows]))
    assert found[0] == found[1]


def test_later_blocks_see_the_error_of_earlier_ones(tiny: Tiny, tmp_path: Path) -> None:
    """Coarser first blocks change the inputs, and with them the codes, of the last one."""
    only = "gptq.include='*layers.3.*'"
    compress(tiny("llama"), tmp_path / "alone", "gptq", settings=(only,))
    compress(tiny("llama"), tmp_path / "all", "gptq", settings=("gptq.bits=4",))
    alone, together = tensors(tmp_path / "alone"), tensors(tmp_path / "all")
    name = "model.layers.3.mlp.down_proj.weight_packed"
    assert not torch.equal(alone[name], together[name])


@pytest.mark.slow
def test_calibration_by_the_model_itself(tiny: Tiny, tmp_path: Path) -> None:
    done = compress(tiny("llama"), tmp_path / "out", "gptq", data="self", samples=2, tokens=16)
    written = json.loads((tmp_path / "out" / "lilliput.json").read_text())
    assert written["data"]["source"].startswith("self")
    assert done.rows[0]["tokens"] == 32
    again = compress(tiny("llama"), tmp_path / "again", "gptq", data="self", samples=2, tokens=16)
    assert digest(again.out) == digest(done.out)


def test_calibration_by_chat_rows(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    model = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(model)
    chat = [{"role": "user", "content": "What is a dictionary?"}, {"role": "assistant", "content": "A mapping. " * 9}]
    rows = tmp_path / "chat.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    done = compress(model, tmp_path / "out", "gptq", data=str(rows))
    assert done.rows[0]["tokens"] == 128
    assert api.verify(done.out).problems == ()
    text = AutoTokenizer.from_pretrained(done.out).decode(
        load_tokens(str(rows), tokenizer, samples=1, tokens=32).ids[0]
    )
    assert text.startswith("<|user|>What is")


def test_the_closing_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    done = compress(tiny("llama"), tmp_path / "out", "gptq", eval_windows=2)
    assert done.evaluation is not None
    assert done.evaluation.perplexity_ratio is not None
    report = done.to_json()
    assert report["measured"]["kl"]["value"] > 0
    assert report["measured"]["bytes"] == report["predicted"]["bytes"]
    assert report["blocks_skipped"] == 0
    assert not list(tmp_path.glob(".*"))
