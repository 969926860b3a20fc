"""Edited models from scores to folder: planned sizes, stock engines, resumption, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import api
from lilliput.errors import LilliputError, PlanError
from lilliput.model.edit import heads_of
from lilliput.model.stored import open_model
from lilliput.plan.plan import make
from lilliput.progress import Quiet
from lilliput.recipe.load import load
from lilliput.run import timing
from lilliput.run.editing import prepared
from lilliput.run.journal import Work

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32"}
RUN: dict[str, Any] = {**ROOM, "eval_windows": 0, "progress": Quiet()}
WIDTH = "steps:\n  - {method: flap, options: {ratio: 0.25}}\n"
HEADS = "steps:\n  - {method: flap, options: {ratio: 0.5, kinds: [channel, head]}}\n  - {method: refit}\n"
REPAIRED = WIDTH + "  - {method: refit}\n  - {method: distil, options: {iters: 4}}\n"
COMPOSED = """steps:
  - {method: shortened-llama, options: {blocks: 1, samples: 2}}
  - {method: llm-pruner, options: {ratio: 0.1, samples: 2}}
  - {method: refit}
  - {method: gptq, target: {bits: 4, group_size: 16}}
"""


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("recipe", [WIDTH, HEADS, REPAIRED, COMPOSED])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_folders_have_the_planned_size_and_open_as_stock_models(
    tiny: Tiny, tmp_path: Path, kind: str, recipe: str
) -> None:
    done = api.compress(tiny(kind), tmp_path / "out", recipe=recipe, **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((tiny(kind) / "config.json").read_text())
    assert config["intermediate_size"] < original["intermediate_size"]
    assert config["architectures"] == original["architectures"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert bool(torch.isfinite(model(ids).logits).all())
        told = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert told.shape == (1, 24)
    assert done.engine is not None
    assert not done.engine.problems
    assert api.verify(tmp_path / "out").problems == ()


def test_repairs_bring_the_stream_nearer_to_the_unedited_one(tiny: Tiny, tmp_path: Path) -> None:
    """Half of the hidden channels are copies that count for less, so that they leave and can be made up for."""
    model = AutoModelForCausalLM.from_pretrained(tiny("wide"))
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[1::2] = linear.weight[::2]
            layer.mlp.down_proj.weight[:, 1::2] *= 0.3
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("wide")).save_pretrained(tmp_path / "model")
    kl = {}
    half = "steps:\n  - {method: flap, options: {ratio: 0.375}}\n"
    last = "  - {method: distil, options: {iters: 4}}\n"
    for name, recipe in {"none": half, "refit": half + "  - {method: refit}\n", "distil": half + last}.items():
        run = {**RUN, "eval_windows": 2, "samples": 16, "tokens": 64}
        done = api.compress(tmp_path / "model", tmp_path / name, recipe=recipe, **run)
        assert done.evaluation is not None
        kl[name] = done.evaluation.to_json()["kl"]["value"]
    assert kl["refit"] < 0.5 * kl["none"]
    assert kl["distil"] < kl["none"]


@pytest.mark.parametrize("stop", ["edit", "block", "edit-score"])
def test_a_run_that_is_stopped_between_scoring_and_slicing_ends_with_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    api.compress(tiny("llama"), tmp_path / "whole", recipe=REPAIRED, **RUN)
    note = Work.note
    seen = []

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == stop:
            seen.append(record)
            if len(seen) == 2 or stop == "edit":
                raise KeyboardInterrupt
        return note(self, record)

    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("llama"), tmp_path / "out", recipe=REPAIRED, **RUN)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    api.compress(tiny("llama"), tmp_path / "out", recipe=REPAIRED, **RUN)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_scores_from_a_backward_pass_that_is_stopped_are_those_of_a_whole_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "steps:\n  - {method: kprune, options: {ratio: 0.25}}\n"
    api.compress(tiny("llama"), tmp_path / "whole", recipe=recipe, **RUN)
    note = Work.note

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == "edit-score" and record["block"] == 1:
            raise KeyboardInterrupt
        return note(self, record)

    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **RUN)
    monkeypatch.undo()
    api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **RUN)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_model_whose_blocks_all_stay_is_what_it_was(tiny: Tiny, tmp_path: Path) -> None:
    recipe = "steps:\n  - {method: flap, options: {ratio: 0.0}}\n  - {method: drop-layers, options: {blocks: 0}}\n"
    api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **RUN)
    before, after = open_model(tiny("llama")), open_model(tmp_path / "out")
    for name in before.skeleton.shapes:
        assert torch.equal(before.read(name), after.read(name))


BOTH = "kinds: [channel, head], ratio: 0.5"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("michel-heads", BOTH),
        ("mini-gpts", BOTH),
        ("gum", BOTH),
        ("kprune", BOTH),
        ("dsp", "ratio: 0.5, steps: 20"),
        ("llm-surgeon", BOTH),
        ("ziplm", BOTH),
    ],
)
def test_the_written_model_is_the_original_with_what_left_masked(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: str
) -> None:
    note, noted = Work.note, []
    monkeypatch.setattr(Work, "note", lambda self, record: (noted.append(record), note(self, record))[1])
    recipe = f"steps:\n  - {{method: {method}, options: {{{options}}}}}\n"
    api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **RUN)
    edit = next(x["edit"] for x in noted if x["kind"] == "edit")
    whole = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block, heads in edit["heads"]:
            for head in {0, 1} - set(heads):
                whole.model.layers[block].self_attn.o_proj.weight[:, 32 * head : 32 * head + 32] = 0.0
        for block, _, kept in edit["channels"]:
            gone = sorted(set(range(128)) - set(kept))
            whole.model.layers[block].mlp.down_proj.weight[:, gone] = 0.0
        smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert len(edit["heads"]) == 4
        assert smaller.config.num_key_value_heads == 1
        torch.testing.assert_close(smaller(ids).logits, whole(ids).logits, rtol=1e-5, atol=2e-5)


def test_a_step_that_is_given_twice_scores_what_the_first_has_left(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, noted = Work.note, []
    monkeypatch.setattr(Work, "note", lambda self, record: (noted.append(record), note(self, record))[1])
    shot = "  - {method: llm-surgeon, options: {ratio: 0.2}}\n"
    api.compress(tiny("llama"), tmp_path / "out", recipe=f"steps:\n{shot}{shot}  - {{method: refit}}\n", **RUN)
    edits = [x["edit"]["channels"] for x in noted if x["kind"] == "edit"]
    widths = [{len(kept) for _, _, kept in x} for x in edits]
    assert widths == [{88}, {56}]
    scores = [len(x["scores"]["channels.0"]) for x in noted if x["kind"] == "edit-score"]
    assert scores == [128] * 4 + [88] * 4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 56


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[{method: gptq}, {method: flap}]", "move it to the front"),
        ("[{method: awq}, {method: flap}, {method: gptq}]", "move it in front of"),
        ("[{method: refit}]", "none stands before it"),
        ("[{method: flap}, {method: refit}, {method: hadamard}, {method: gptq}]", "leave one of the two out"),
        ("[{method: flap, options: {ratio: 1.0}}]", "less than 1"),
        ("[{method: flap, options: {ratio: 0.9}}]", "more than the hidden channels hold"),
        ("[{method: drop-layers, options: {blocks: 4}}]", "at most 3 can"),
        ("[{method: drop-layers, options: {protect: [7]}}]", "blocks 0 to 3"),
        ("[{method: shortened-llama, options: {by: taylor}}]", "at most 0 can"),
        ("[{method: gptq}, {method: llm-surgeon}]", "move it to the front"),
        ("[{method: kprune, options: {samples: 0}}]", "greater than or equal to 1"),
        ("[{method: gum, options: {alike: 0}}]", "greater than 0"),
        ("[{method: flap, target: {ratio: 0.2}}]", "neither a target nor"),
        ("[{method: flap, where: {include: [mlp.down_proj]}}]", "neither a target nor"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tiny: Tiny, steps: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        api.plan(tiny("llama"), recipe=f"steps: {steps}\n", **ROOM)


def test_heads_that_the_config_cannot_leave_out_are_refused(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match="no config of GPT2LMHeadModel"):
        api.plan(tiny("gpt2"), recipe="steps:\n  - {method: flap, options: {ratio: 0.5, kinds: [head]}}\n", **ROOM)


def test_numbers_of_heads_that_an_engine_refuses_are_named(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match=r"no config of LlamaForCausalLM.*not a multiple of the number of attention"):
        api.plan(tiny("wide"), recipe="steps:\n  - {method: flap, options: {ratio: 0.25, kinds: [head]}}\n", **ROOM)


def test_settings_reach_the_options_of_an_edit(tiny: Tiny) -> None:
    plan = api.plan(tiny("llama"), recipe="flap", settings=["flap.ratio=0.4"], **ROOM)
    assert plan.resolved.recipe.steps[0].options == {"ratio": 0.4}
    assert next(x.shape for x in plan.tensors if x.name.endswith("down_proj.weight")) == (64, 48)


@pytest.mark.parametrize("recipe", ["drop-layers", "flap", "w3-fit"])
def test_what_looks_at_all_samples_in_one_process_is_refused_in_several(tiny: Tiny, recipe: str) -> None:
    wanted = load(recipe)
    model = prepared(open_model(tiny("llama")), wanted)
    room: dict[str, Any] = {"samples": 4, "tokens": 32, "budget": None, "size": None, "seed": None}
    make(model, wanted, dtype=torch.float32, **room)
    with pytest.raises(PlanError, match="in one process: start only one"):
        make(model, wanted, dtype=torch.float32, processes=2, **room)


def test_blocks_of_widths_that_errors_chose_open_and_keep_no_more_weights(tiny: Tiny, tmp_path: Path) -> None:
    sizes = {}
    for uniform in ("true", "false"):
        recipe = f"steps:\n  - {{method: ziplm, options: {{ratio: 0.3, uniform: {uniform}}}}}\n  - {{method: refit}}\n"
        api.compress(tiny("llama"), tmp_path / uniform, recipe=recipe, **RUN)
        model = open_model(tmp_path / uniform)
        sizes[uniform] = [x.groups.channels[0].width for x in model.anatomy().blocks]
    assert len(set(sizes["true"])) == 1
    assert len(set(sizes["false"])) > 1
    assert sum(sizes["false"]) <= sum(sizes["true"])
    assert sum(sizes["true"]) - sum(sizes["false"]) < 8


SURGEON = "steps:\n  - {method: llm-surgeon, options: {ratio: 0.3, samples: 3, shots: 2, update: UPDATE}}\n"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_update_changes_what_lost_rows_or_columns_and_survives_a_kill(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe = SURGEON.replace("UPDATE", "true")
    api.compress(tiny(kind), tmp_path / "whole", recipe=recipe, **RUN)
    api.compress(tiny(kind), tmp_path / "none", recipe=SURGEON.replace("UPDATE", "false"), **RUN)
    whole, none = open_model(tmp_path / "whole"), open_model(tmp_path / "none")
    changed = {x for x in whole.skeleton.shapes if not torch.equal(whole.read(x), none.read(x))}
    assert changed == {
        f"{prefix}.{x.name}.weight"
        for prefix, block in zip(whole.skeleton.block_names, whole.anatomy().blocks, strict=True)
        for x in block.linears
        if x.role in ("gate", "up", "down")
    }
    note = Work.note

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == "edit-update" and record["block"] == 1:
            raise KeyboardInterrupt
        return note(self, record)

    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny(kind), tmp_path / "out", recipe=recipe, **RUN)
    monkeypatch.undo()
    api.compress(tiny(kind), tmp_path / "out", recipe=recipe, **RUN)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_shots_that_take_the_curvature_anew_compose_with_what_follows(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    step = "  - {method: llm-surgeon, options: {ratio: 0.2, samples: 2, update: true, kinds: KINDS}}\n"
    step = step.replace("KINDS", "[channel]" if kind == "mixtral" else "[channel, head]")
    rest = "  - {method: refit}\n  - {method: rtn, target: {bits: 8}}\n"
    api.compress(tiny(kind), tmp_path / "out", recipe=f"steps:\n{step}{step}{rest}", **RUN)
    assert api.verify(tmp_path / "out").problems == ()


def test_a_damaged_update_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Work.note

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == "block":
            raise KeyboardInterrupt
        return note(self, record)

    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("llama"), tmp_path / "out", recipe=SURGEON.replace("UPDATE", "true"), **RUN)
    monkeypatch.undo()
    (first, *_) = sorted(tmp_path.glob(".out.partial/work/edit-00-update/*"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    with pytest.raises(LilliputError, match="is not as this run has written it"):
        api.compress(tiny("llama"), tmp_path / "out", recipe=SURGEON.replace("UPDATE", "true"), **RUN)


TIMED = """steps:
  - {method: ziplm, options: {speedup: 1.3, uniform: false, multiple: 2, kinds: [channel, head], timed: DEVICE}}
"""


@pytest.mark.parametrize("device", ["h100", "measure"])
def test_a_speedup_is_decided_by_one_table_of_times_whatever_stops_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The machine's times, which are mostly launches at these sizes, are replaced."""
    monkeypatch.setattr(timing, "measured", lambda shapes, *rest: sum(1e-8 * (a + 7) * (b + 5) for a, b in shapes))
    note, records = Work.note, []

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == "edit-score":
            raise KeyboardInterrupt
        records.append(record)
        return note(self, record)

    recipe = TIMED.replace("DEVICE", device)
    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **RUN)
    monkeypatch.undo()
    monkeypatch.setattr(timing, "table", None)  # the record is enough
    api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **RUN)
    (record,) = [x for x in records if x["kind"] == "edit-times"]
    before, after = open_model(tiny("llama")).anatomy().blocks, open_model(tmp_path / "out").anatomy().blocks
    whole = taken = 0
    for times, old, new in zip(record["blocks"], before, after, strict=True):
        channels, heads = dict(times["channels.0"]), dict(times["heads"])
        whole += channels[old.groups.channels[0].width] + heads[len(heads_of(old))] + times["rest"][0][1]
        taken += channels[new.groups.channels[0].width] + heads[len(heads_of(new))] + times["rest"][0][1]
    assert taken <= whole / 1.3
