"""A small folder of 4-bit codes, adapters trained for it, and what stock peft makes of both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load, save
from torch import Tensor

import lilliput
from lilliput import api
from lilliput.data.lessons import whole
from lilliput.model.stored import open_model
from lilliput.plan.plan import Plan
from lilliput.progress import Quiet
from lilliput.run import adapting
from lilliput.run.teaching import Teaching
from lilliput.training import loop
from lilliput.training.adapted import Adapted
from lilliput.training.text import Text
from lilliput.training.whole import Whole
from lilliput.verbs.objective import TokenIO
from lilliput.verbs.spec import Task

RTN = "{method: rtn, target: {bits: 4, group_size: 32}}"
AFFINE = "{method: rtn, target: {format: affine, bits: 4, group_size: 16, scale_dtype: float32}}"
Tiny = Callable[[str], Path]


def compressed(model: Path, out: Path, *steps: str, export: str = "lilliput", **more: Any) -> Path:
    """The folder `out` of a recipe."""
    recipe = "steps:\n" + "\n".join(f"  - {x}" for x in steps) + f"\nexport: {export}"
    given = {"samples": 4, "tokens": 16, "device": "cpu", "dtype": "float32", "eval_windows": 0} | more
    api.compress(model, out, recipe=recipe, progress=Quiet(), **given)
    return out


def ids(rows: int = 2, tokens: int = 12) -> Tensor:
    """A text."""
    return torch.randint(1, 512, (rows, tokens), generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> Any:
    """A folder as stock transformers opens it."""
    lilliput.load  # noqa: B018  the native layout is known from here on
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loaded(folder: Path, adapter: Path) -> Any:
    """A folder with an adapter, as stock peft loads it without a warning."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".past_key_values. is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)  # of any AdaLoRA
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias", UserWarning)
        return peft.PeftModel.from_pretrained(opened(folder), adapter)


@dataclass
class Memory:
    """A `whole.Place` that keeps what is saved as bytes."""

    folder: Path
    held: dict[str, bytes] = field(default_factory=dict)

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        return load(self.held[name]) if name in self.held else None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.held[name] = save(dict(tensors))


@dataclass
class Lab:
    """An adapter of a folder, before and while it is trained."""

    folder: Path
    student: Adapted
    task: Task
    trainer: Whole

    @torch.no_grad()
    def logits(self, text: Tensor | None = None) -> Tensor:
        """What the model says of a text, as it is trained but for what steps draw."""
        text = ids() if text is None else text
        adapter = self.student.adapter
        assert adapter is not None
        self.student.eval()
        skeleton = self.student.skeleton
        out = skeleton.logits(adapter.read(skeleton, text, None, None))
        self.student.train()
        return out

    def steps(self, *which: int) -> list[float]:
        """Carry out steps by their numbers; their losses."""
        return [self.trainer.step([0, 1], loop.Now(n, n)) for n in which]

    def leaves(self) -> dict[str, Tensor]:
        """Everything of the model that wants gradients."""
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> Path:
        adapter = self.student.adapter
        assert adapter is not None
        adapter.save(folder)
        return folder


def cross_entropy(io: TokenIO) -> Tensor:
    """Of each token."""
    return torch.nn.functional.cross_entropy(io.logits, io.labels, reduction="none")


def planned(folder: Path, method: str, teacher: Path | None = None, **more: Any) -> Plan:
    """The plan of a step that trains an adapter for a folder."""
    step = {"method": method, **{k: more.pop(k) for k in ("target", "where") if k in more}, "options": more}
    step["options"] = {"tokens": 16, "steps": 4, "lr": 0.01, "objective": "cross-entropy"} | more
    recipe = json.dumps({"steps": [step], "export": "lilliput"}, indent=1)
    return api.plan(folder, recipe=recipe, samples=2, tokens=16, device="cpu", dtype="float32", teacher=teacher)


@pytest.fixture(scope="session")
def coded(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a small model in 4 bits, by name and step. Read it only."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str = "llama", step: str = RTN) -> Path:
        if (name, step) not in made:
            made[name, step] = compressed(tiny(name), tmp_path_factory.mktemp("coded") / name, step)
        return made[name, step]

    return make


@pytest.fixture
def lab(coded: Callable[..., Path], tmp_path: Path) -> Callable[..., Lab]:
    """Attaches a method's adapter to a folder."""

    def make(
        method: str, folder: Path | None = None, original: Path | None = None, place: Memory | None = None, **more: Any
    ) -> Lab:
        folder = coded() if folder is None else folder
        plan = planned(folder, method, **more)
        (task,) = plan.resolved.tasks
        model = open_model(folder)
        lessons = whole(ids(2, 16), "rows")
        taught = Teaching(None, None, cross_entropy, None, None, None, lessons)  # type: ignore[arg-type]
        before = model if original is None else open_model(original)
        student = adapting.student(plan, task, model, before, taught)
        trainer = Whole(student, Text(lessons), task.options, Memory(tmp_path) if place is None else place)  # type: ignore[arg-type]
        return Lab(folder, student, task, trainer)

    return make


@pytest.fixture(autouse=True)
def _deprecations() -> Iterator[None]:
    """What peft still calls by old names is not ours to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".past_key_values. is deprecated", FutureWarning)
        yield


def faithful(lab: Lab, tmp_path: Path) -> tuple[Tensor, Tensor]:
    """The largest differences of an adapter's logits, as stock peft loads it, from the trained model's, and from the
    folder's own."""
    with torch.no_grad():
        text = ids()
        # A prompt's own places come first.
        stock = loaded(lab.folder, lab.save(tmp_path / "adapter"))(text).logits[:, -text.shape[1] :]
        return (stock - lab.logits()).abs().max(), (stock - opened(lab.folder)(ids()).logits).abs().max()


@pytest.fixture(scope="session")
def shared() -> SimpleNamespace:
    """What is above."""
    return SimpleNamespace(**globals())


@pytest.fixture
def losses() -> Callable[[Lab], tuple[float, ...]]:
    """Trains to the end, from what was saved on."""

    def run(lab: Lab) -> tuple[float, ...]:
        return loop.train(lab.trainer, whole(ids(2, 16), "rows"), lab.task.options, Quiet()).losses  # type: ignore[arg-type]

    return run
