"""Distillation from end to end on a small model: losses fall, the folder computes what training computed, killed runs
go on, and teachers that cannot teach are refused before anything runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from lilliput import api
from lilliput.data.load import load_tokens
from lilliput.errors import LilliputError, PlanError
from lilliput.progress import Quiet
from lilliput.run import teaching
from lilliput.training.student import Student

Tiny = Callable[[str], Path]
STEPS = 6
WINDOWS = {"samples": 4, "tokens": 24}
# Name, its options, and whether its loss is the same from step to step, so that it has to fall.
OBJECTIVES: list[tuple[str, dict[str, Any], bool]] = [
    ("divergence-kd", {"kind": "reverse"}, True),
    ("divergence-kd", {"kind": "jsd", "rest": "renormalised"}, True),
    ("cakld", {}, True),
    ("tsld", {}, True),
    ("cross-entropy", {}, True),
    ("feature-kd", {"layers": "dynamic", "soft": 0.5}, True),
    ("minilm", {}, True),
    ("tinybert", {}, True),
    ("ted", {"filter_steps": 2}, True),
    ("relation-kd", {}, True),
    ("gkd", {"on_policy": 1.0, "prompt": 6}, False),
    ("minillm", {"prompt": 6}, False),
]


def recipe(objective: str, options: dict[str, Any] | None = None, **more: Any) -> str:
    asked = {"objective": objective, "objective_options": options or {}, "steps": STEPS, "lr": 0.003, "batch": 4}
    steps = [
        {"method": "wanda", "target": {"sparsity": 0.6}},
        {"method": "full", "options": {**asked, "warmup": 0.0, "schedule": "constant", **more}},
    ]
    return json.dumps({"steps": steps}, indent=1)


def run(model: Path, out: Path, text: str, **more: Any) -> Any:
    options = {"recipe": text, "eval_windows": 0, "device": "cpu", "dtype": "float32", "progress": Quiet(), **WINDOWS}
    return api.compress(model, out, **{**options, **more})


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of all batches that were trained on, per token."""
    found: list[float] = []
    real = Student.forward

    def kept(self: Student, batch: Any) -> Any:
        value = real(self, batch)
        found.append(float(value.detach()) / max(batch.tokens, 1))
        return value

    monkeypatch.setattr(Student, "forward", kept)
    return found


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "falls"), OBJECTIVES, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(OBJECTIVES)]
)
def test_a_training_runs_and_its_loss_falls(
    tiny: Tiny, tmp_path: Path, losses: list[float], name: str, options: dict[str, Any], falls: bool
) -> None:
    run(tiny("qwen2"), tmp_path / "out", recipe(name, options))
    rows = [sum(losses[a : a + 4]) / 4 for a in range(0, 4 * STEPS, 4)] if name != "minillm" else losses
    assert all(torch.isfinite(torch.tensor(rows)))
    if falls:
        assert rows[-1] < rows[0]
    model: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pruned = [x for key, x in model.named_parameters() if "proj.weight" in key]
    assert all(0.55 < float((x == 0).float().mean()) < 0.65 for x in pruned)
    assert not [key for key in model.state_dict() if "maps" in key]


def test_the_folder_computes_what_training_computed(tiny: Tiny, tmp_path: Path, losses: list[float]) -> None:
    """One batch of all text: after n steps the folder's loss is what step n + 1 would begin with."""
    run(tiny("qwen2"), tmp_path / "long", recipe("divergence-kd", {"kind": "reverse"}, top=None))
    before = sum(losses[20:24]) / 4
    run(tiny("qwen2"), tmp_path / "out", recipe("divergence-kd", {"kind": "reverse"}, top=None, steps=5))
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(tiny("qwen2")).eval()
    ours: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float().eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny("qwen2"))
    ids = load_tokens("docs", tokenizer, samples=4, tokens=24).ids
    with torch.no_grad():
        log_p, log_q = (x(ids).logits[:, :-1].log_softmax(-1) for x in (theirs, ours))
    expected = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    assert before == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ted", "gkd"])
def test_a_killed_training_goes_on_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With maps that were trained before, and with text that is drawn."""
    options = {"filter_steps": 2} if name == "ted" else {"prompt": 6}
    text = recipe(name, options, save=2)
    run(tiny("qwen2"), tmp_path / "whole", text)
    real, calls = Student.forward, 0

    def killed(self: Student, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4 * 3 + 2:
            raise RuntimeError("killed")
        return real(self, batch)

    monkeypatch.setattr(Student, "forward", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(tiny("qwen2"), tmp_path / "out", text)
    monkeypatch.setattr(Student, "forward", real)
    monkeypatch.setattr(teaching.opening, "open_maps", lambda *_: pytest.fail("the maps were trained before the kill"))
    run(tiny("qwen2"), tmp_path / "out", text)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def small(tiny: Tiny, folder: Path, **sizes: Any) -> Path:
    """A student of another shape, with the teacher's tokenizer."""
    config: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(tf.Qwen2Config(**{**config, **sizes}))
    model.save_pretrained(folder)
    for path in tiny("qwen2").glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def test_maps_bridge_two_widths_and_are_left_behind(tiny: Tiny, tmp_path: Path, losses: list[float]) -> None:
    student = small(tiny, tmp_path / "student")
    text = json.dumps(
        {"steps": [{"method": "full", "options": {"objective": "feature-kd", "steps": STEPS, "lr": 0.003, "batch": 4}}]}
    )
    run(student, tmp_path / "out", text + "\n", teacher=tiny("qwen2"))
    assert sum(losses[-4:]) < sum(losses[:4])
    with_maps = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert with_maps.keys() == tf.AutoModelForCausalLM.from_pretrained(student).state_dict().keys()


FULL = "steps:\n  - {method: full, options: {steps: 2, objective: %s, objective_options: {%s}}}\n"


def planned(model: Path, teacher: Path, objective: str = "logit-kd", options: str = "") -> Any:
    text = FULL % (objective, options)
    return api.plan(model, recipe=text, teacher=teacher, device="cpu", dtype="float32", **WINDOWS)


def test_a_teacher_of_another_vocabulary_is_refused_with_the_remedy(tiny: Tiny, tmp_path: Path) -> None:
    rows = small(tiny, tmp_path / "rows", vocab_size=520)
    with pytest.raises(PlanError, match=r"has 512 tokens, and the student 520: .*objective: cross-entropy"):
        planned(rows, tiny("qwen2"))
    other = Path(shutil.copytree(tiny("qwen2"), tmp_path / "other"))
    known = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = known["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(PlanError, match=r"has another tokenizer than the student: .*objective: cross-entropy"):
        planned(other, tiny("qwen2"))
    assert planned(other, tiny("qwen2"), "cross-entropy").bytes > 0  # reads no teacher


def test_teachers_of_another_size_are_spoken_of(tiny: Tiny, tmp_path: Path) -> None:
    student = small(tiny, tmp_path / "student")
    assert not [x for x in planned(student, tiny("qwen2")).notes if "teacher" in x]
    larger = [x for x in planned(tiny("qwen2"), student).notes if "teacher" in x]
    assert len(larger) == 1
    assert "times the parameters of its teacher" in larger[0]
    distant = [x for x in planned(small(tiny, tmp_path / "tiny", hidden_size=8), tiny("wide")).notes if "teacher" in x]
    assert len(distant) == 1
    assert "train one in between first" in distant[0]


def test_heads_that_do_not_match_are_refused_before_anything_runs(tiny: Tiny, tmp_path: Path) -> None:
    student = small(tiny, tmp_path / "student", num_attention_heads=2)
    with pytest.raises(PlanError, match=r"objective minilm: the student has 2 heads .* its teacher 4 in 2"):
        planned(student, tiny("qwen2"), "minilm")
    with pytest.raises(PlanError, match="kind: pairwise"):
        planned(student, tiny("qwen2"), "relation-kd", "kind: flow")
    with pytest.raises(PlanError, match=r"no option 'weigth'.*Did you mean 'weight'"):
        planned(student, tiny("qwen2"), "feature-kd", "weigth: 2")


def test_a_teacher_beside_the_student_is_counted(tiny: Tiny) -> None:
    plain, beside, written = (
        api.plan(tiny("wide"), recipe=FULL % (x, ""), device="cpu", dtype="float32", **WINDOWS).batching
        for x in ("logit-kd", "feature-kd", "gkd")
    )
    weights = 4 * sum(x.numel() for x in tf.AutoModelForCausalLM.from_pretrained(tiny("wide")).parameters())
    assert plain.where == "training"
    assert beside.where == written.where == "training beside its teacher"
    assert beside.bytes >= plain.bytes + weights
    assert written.bytes > beside.bytes


def test_a_prompt_without_room_is_an_error_with_its_remedy(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LilliputError, match="give a shorter `prompt`"):
        run(tiny("qwen2"), tmp_path / "out", recipe("gkd", {"on_policy": 1.0, "prompt": 24}))
