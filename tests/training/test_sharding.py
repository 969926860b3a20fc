"""Two processes that share out a model: the losses of one, a state that either goes on from, results whole on both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

CODE = """
import json
from pathlib import Path
import torch
from lilliput.data.lessons import whole
from lilliput.machine import ranks
from lilliput.methods.train import lsq, peqa
from lilliput.methods.train.full import Full
from lilliput.formats.integer import IntegerFormat
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.progress import Quiet
from lilliput.run.training import Place
from lilliput.training import loop, sharding
from lilliput.training.optimizers import local, sharded
from lilliput.training.student import Student
from lilliput.training.text import Text
from lilliput.training.whole import Whole
from lilliput.verbs.train import TrainOptions

torch.set_num_threads(1)
job = json.loads({job!r})

def core(name, weight):
    if job["method"] == "full":
        return Full(Layer(name, weight))
    form = IntegerFormat(4, False, 8, torch.float32)
    grid = form.fit(weight)
    layer = Layer(name, weight).with_part(QuantizedPart(form, form.encode(weight, grid), grid))
    return lsq.begin(layer, weight, lsq.Options())

with ranks.joined():
    model = open_model(job["model"])
    def loss(io):
        return torch.nn.functional.cross_entropy(io.logits, io.labels, reduction="none")
    student = Student(model.skeleton, loss, checkpointing=True)
    skeleton = model.skeleton
    for number, prefix in enumerate(skeleton.block_names):
        linears = {{f"{{prefix}}.{{x.name}}": x for x in model.anatomy().blocks[number].linears}}
        model.load(x for x in skeleton.names_of(number) if x.removesuffix(".weight") not in linears)
        for name, x in linears.items():
            weight = model.read(f"{{name}}.weight")
            student.place(name, core(name, weight.T.contiguous() if x.transposed else weight))
        if job["shard"] and ranks.size() > 1:
            sharding.share_block(student, number)
    inside = {{x for n in range(len(skeleton.block_names)) for x in skeleton.names_of(n)}}
    model.load(x for x in skeleton.shapes if x not in inside)
    generator = torch.Generator().manual_seed(0)
    lessons = whole((torch.randint(1, 48, (7, 1), generator=generator) + torch.arange(12) * 3) % 47 + 1, "rows")
    o = TrainOptions(**job["options"])
    trainer = Whole(student, Text(lessons), o, Place(Path(job["folder"])))
    if job["stop"]:
        plain = Whole.step
        def step(self, samples, now):
            if now.step == job["stop"]:
                raise SystemExit(0)
            return plain(self, samples, now)
        Whole.step = step
    curve = loop.train(trainer, lessons, o, Quiet())
    sums = {{}}
    for n, x in trainer.results():
        x = x.decode() if isinstance(x, Layer) else x
        assert not sharded(x)
        sums[n] = float(x.double().square().sum())
    held = sum(local(x.value).numel() for x in trainer._leaves)
    print(json.dumps({{"losses": curve.losses, "held_out": curve.held_out, "held": held, "sums": sums}}))
"""
OPTIONS = {"steps": 5, "batch": 3, "lr": 0.01, "save": 2, "clip": 0.5, "others": ["*norm*"], "held_out": 0.2}
IMPORTS = ["torch.distributed.fsdp", "torch.distributed.tensor", "lilliput.methods.train.lsq", "lilliput.run.training"]
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(
    together: Callable[..., dict[str, Any]], noisy: Callable[[int], Path], tiny: Callable[[str], Path], tmp_path: Path
) -> Train:
    """A training in some processes, and what each says."""

    def run(
        ranks: int, name: str, *, method: str = "full", shard: bool = True, stop: int = 0, model: str = "", **more: Any
    ) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir(exist_ok=True)
        folder = noisy(0) if not model else tiny(model)
        job = {"model": str(folder), "folder": str(tmp_path / name), "method": method, "shard": shard, "stop": stop}
        code = CODE.format(job=json.dumps(job | {"options": OPTIONS | more}))
        done = together(ranks=ranks, code=code, imports=IMPORTS)
        assert set(done["code"]) == {0}, done["stderr"]
        return [] if stop else [json.loads(x) for x in done["stdout"]]

    return run


@pytest.mark.parametrize(
    ("method", "model", "shard"), [("full", "", True), ("lsq", "", True), ("full", "gpt2", True), ("full", "", False)]
)
def test_two_processes_train_as_one(train: Train, method: str, model: str, shard: bool) -> None:
    """Also where samples do not divide evenly: two and one a step."""
    (alone,) = train(1, "alone", method=method, model=model)
    both = train(2, "both", method=method, model=model, shard=shard)
    assert both[0]["losses"] == both[1]["losses"]
    for x in both:
        assert x["losses"] == pytest.approx(alone["losses"], abs=1e-3)
        assert x["sums"] == pytest.approx(alone["sums"], rel=1e-3)
        assert [n for n, _ in x["held_out"]] == [n for n, _ in alone["held_out"]]
    parts = [x["held"] for x in both]
    assert sum(parts) < 1.1 * alone["held"] if shard else parts == [alone["held"]] * 2
    assert alone["losses"][-1] < alone["losses"][0]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 2)])
def test_a_state_is_that_of_the_whole_model(train: Train, tmp_path: Path, first: int, then: int) -> None:
    unbroken = train(1, "unbroken")[0]
    train(first, "cut", stop=3)
    state = load_file(tmp_path / "cut" / "state.safetensors")
    whole = load_file(tmp_path / "unbroken" / "state.safetensors")
    assert {n: x.shape for n, x in state.items() if "fact." not in n} == {
        n: x.shape for n, x in whole.items() if "fact." not in n
    }
    again = train(then, "cut")[0]
    assert again["losses"] == pytest.approx(unbroken["losses"], abs=1e-3)
    assert again["sums"] == pytest.approx(unbroken["sums"], rel=1e-3)


def test_moments_on_disk_stay_with_their_process(train: Train, tmp_path: Path) -> None:
    alone = train(1, "alone", optimizer="paged")[0]
    both = train(2, "both", optimizer="paged")[0]
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-3)
    train(2, "cut", optimizer="paged", stop=3)
    assert train(2, "cut", optimizer="paged")[0]["losses"] == both["losses"]
    sizes = [(tmp_path / "both" / f"rank-{n}" / "moments.bin").stat().st_size for n in (0, 1)]
    assert sum(sizes) < 1.1 * (tmp_path / "alone" / "moments.bin").stat().st_size
    assert torch.isfinite(torch.tensor(both["losses"])).all()
